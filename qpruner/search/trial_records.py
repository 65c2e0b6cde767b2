"""The interface of a trial, and the records of a search's trials.

Searches share a folder of trials if a trial gives the same result in each of them
(`TrialRecord.digest`). `TrialRecord.search` is the search that a trial belongs to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile
from qpruner.plans.plan import UNPRUNED, cut_title
from qpruner.runs import storage
from qpruner.runs.records import RungResult, SearchClock, TrialPulse, TrialRecord
from qpruner.training import checkpoints

if TYPE_CHECKING:
    from qpruner.quantization.bank import BankSource

SETTING_REMEDIES = {
    "diverged": "lower `training.learning_rate`",
    "infeasible": "lower `data.max_length`, or set `training.gradient_checkpointing`",
    "hung": "raise `search.trial_timeout_seconds`",
}
REMEDIES = SETTING_REMEDIES | {
    "lost": (
        "the usual cause is too little memory: lower `data.max_length`, or `search.max_concurrent`"
    ),
    "storage": (
        "make room or bring the storage back, then repeat the command: the trial resumes where it "
        "was saved"
    ),
    "damaged": "repeat the command: it builds damaged files again",
    "machine": (
        "repair that machine or remove it from the cluster (`ray stop` on it), then repeat the "
        "command: its trials are retried"
    ),
    "error": (
        "the search continues without this plan; to retry it, fix the cause, delete the trial's "
        "folder and the run's `records/search.json`, then repeat the command"
    ),
}
"""What to do about each kind of failure."""

Report = Callable[[RungResult | None, Path], None]
"""Callback that gets a checkpoint and the result of its rung, None between rungs; may raise to stop
the trial."""
Progress = Callable[[int], None]
"""Callback that gets the last optimizer step, before every forward pass and whenever something is
loaded."""


@dataclass(frozen=True)
class Materials:
    """What a trial reads of the run; the paths are the same on every node."""

    banks: Mapping[str, BankSource]  # of each cut
    data: Path  # the encoded rows

    def model_of(self, cut: str) -> str:
        """Return the digest of a cut's weights and of what its bank is made by."""
        return self.banks[cut].inputs if cut in self.banks else ""


@dataclass(frozen=True)
class TrialJob:
    """The inputs of a trial."""

    config: RunConfig
    materials: Materials
    plan: Mapping[str, str]
    cut: str = UNPRUNED
    save_seconds: float = checkpoints.SECONDS


Trial = Callable[[TrialJob, Path | None, Report, Progress], None]
"""The type of `run_trial` and of what tests run instead; the path is the last checkpoint of the
trial, if any."""


def read_trials(folder: Path, skip_damaged: bool = False) -> list[TrialRecord]:
    """Read every recorded trial, in order of index.

    Raises `CorruptFile` for a damaged one unless `skip_damaged`.
    """
    found = list(_records(folder).values())
    damaged = [each for each in found if isinstance(each, CorruptFile)]
    if damaged and not skip_damaged:
        raise damaged[0]
    return [record for record in found if isinstance(record, TrialRecord)]


def set_aside_damaged(folder: Path, search: str, notify: Callable[[str], None]) -> None:
    """Move damaged files of trials into `damaged/`.

    These are damaged records, and damaged checkpoints of unfinished trials. The number of a damaged
    record gets another plan; the other trials restart. If the clock of `search` is damaged, its
    time counts from zero again. `notify` gets one line about each damaged file.
    """
    for path, record in _records(folder).items():
        if isinstance(record, CorruptFile):
            where = storage.quarantine(path.parent, folder)
            notify(f"{record}; set aside in {where}, and its number gets another plan")
        elif record and not record.is_over:
            restart_if_damaged(folder, record, notify)
    try:
        read_clock(folder, search)
    except CorruptFile as error:
        where = storage.quarantine(_clock_path(folder, search), folder)
        notify(f"{error}; set aside in {where}, and the search's hours count from zero")


def set_aside_others(
    folder: Path, models: Mapping[str, str], notify: Callable[[str], None]
) -> None:
    """Move every trial into `damaged/` whose pruned model (its cut) has changed since it ran.

    A cut changes if it is pruned again with another result, for example on another machine, or if
    it is packed in another way. `models` maps cuts to their present digests, which are compared
    with `TrialRecord.model`. Trials of cuts that are not in `models` stay, as do those without a
    digest.
    """
    for record in read_trials(folder):
        if record.model and record.model != models.get(record.cut, record.model):
            where = storage.quarantine(trial_folder(folder, record.index), folder)
            about = f"its cut, {cut_title(record.cut)}, has other weights now"
            notify(f"trial {record.index} is set aside in {where}: {about}")


def restart_if_damaged(folder: Path, record: TrialRecord, notify: Callable[[str], None]) -> bool:
    """Restart a trial from its start if its last checkpoint is damaged.

    The damaged checkpoint is set aside. Returns True if it was damaged.
    """
    if (checkpoint := checkpoint_of(folder, record)) is None:
        return False
    read_trial(folder, record.index)  # waits if the storage is away, where all files seem missing
    found = storage.folder_digests(checkpoint)
    if found == record.checkpoint:
        return False
    where = (
        f"set aside in {storage.quarantine(checkpoint, checkpoint.parent.parent)}"
        if found
        else "missing"
    )
    notify(
        f"{storage.display_name(checkpoint)} is damaged: {where}; trial {record.index} is restarted"
    )
    afresh = {
        "status": "running",
        "rungs": (),
        "saved_between": 0,
        "checkpoint": {},
        "times": record.times[:1],
    }
    write_trial(folder, record.model_copy(update=afresh))
    return True


def _records(trials: Path) -> dict[Path, TrialRecord | CorruptFile | None]:
    """Read the records of all trials, in order of index.

    A damaged record is returned as its error.
    """
    paths = [trials / name / "trial.json" for name in storage.children(trials) if name.isdigit()]
    return dict(zip(paths, storage.for_each(_record_or_error, paths), strict=True))


def _record_or_error(path: Path) -> TrialRecord | CorruptFile | None:
    try:
        return storage.read_json(path, TrialRecord)
    except CorruptFile as error:
        return error


def read_trial(folder: Path, index: int) -> TrialRecord:
    """Read the record of a trial, which must exist."""
    return storage.read_existing(trial_path(folder, index), TrialRecord)


def write_trial(folder: Path, record: TrialRecord, patience_seconds: float | None = None) -> None:
    """Write a trial's record."""
    storage.write_json(trial_path(folder, record.index), record, patience_seconds)


def read_pulse(folder: Path, index: int) -> TrialPulse | None:
    """Read a trial's last pulse.

    Returns None if there is none yet, the storage is away, or a crash damaged the file.
    """
    text = storage.read_progress(trial_folder(folder, index) / "pulse.json")
    with contextlib.suppress(ValidationError):
        return TrialPulse.model_validate_json(text) if text else None
    return None


def write_pulse(folder: Path, index: int, pulse: TrialPulse) -> None:
    """Write a trial's sign of progress; a crash may lose it."""
    storage.write_progress(trial_folder(folder, index) / "pulse.json", pulse.model_dump_json())


def trial_path(trials: Path, index: int) -> Path:
    """Return the path of a trial's record."""
    return trial_folder(trials, index) / "trial.json"


def trial_folder(trials: Path, index: int) -> Path:
    """Return the folder of a trial's record and last checkpoint."""
    return trials / f"{index:04d}"


def checkpoint_of(trials: Path, record: TrialRecord) -> Path | None:
    """Return the path of a trial's last checkpoint; None before the first."""
    return (
        trial_folder(trials, record.index) / f"checkpoint-{record.saved_step}"
        if record.saved_step
        else None
    )


def remove_old_checkpoints(trials: Path, records: Sequence[TrialRecord]) -> None:
    """Remove all checkpoints but the last recorded one of each trial.

    Killed workers may have left others.
    """
    last = {trial_folder(trials, record.index): checkpoint_of(trials, record) for record in records}

    def clean(folder: Path) -> None:
        for name in storage.children(folder):
            is_checkpoint = name.lstrip(".").startswith("checkpoint-") and not name.endswith(
                storage.FILES
            )
            if is_checkpoint and folder / name != last[folder]:
                storage.remove(folder / name)

    storage.for_each(clean, list(last))


def read_clock(trials: Path, search: str) -> SearchClock:
    """Return the seconds and the number of sessions that a search has taken so far."""
    return storage.read_json(_clock_path(trials, search), SearchClock) or SearchClock(seconds=0.0)


def write_seconds(trials: Path, search: str, seconds: float, session: int | None = None) -> bool:
    """Save the time that a search has taken.

    Returns False if another session than `session` has begun since.
    """
    clock = read_clock(trials, search)
    if session is not None and clock.sessions > session:
        return False
    storage.write_json(_clock_path(trials, search), clock.model_copy(update={"seconds": seconds}))
    return True


def begin_session(trials: Path, search: str) -> int:
    """Begin a session of a search and return its number, from 1."""
    clock = read_clock(trials, search)
    storage.write_json(
        _clock_path(trials, search), clock.model_copy(update={"sessions": clock.sessions + 1})
    )
    return clock.sessions + 1


def wait_for_storage(trials: Path, search: str) -> None:
    """Wait until the clock of a search can be read.

    A storage that is away may show an empty folder.
    """
    storage.read_existing(_clock_path(trials, search), SearchClock)


def _clock_path(trials: Path, search: str) -> Path:
    return trials / f"search-{search}.json"
