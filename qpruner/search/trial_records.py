"""The trials of a search as their records tell it; knows nothing of Ray.

Searches with different budgets, searchers or sensitivities share a folder of trials as long as a trial would give the
same result in each (`TrialRecord.digest`); `TrialRecord.search` says whose a trial is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile
from qpruner.runs.mirror import FILES
from qpruner.runs.object_store import name_of
from qpruner.runs.paths import (
    children,
    folder_digests,
    for_each,
    read_json,
    read_sign,
    read_written,
    remove,
    set_aside,
    write_json,
    write_sign,
)
from qpruner.runs.records import FreshScore, RungResult, SearchClock, TrialPulse, TrialRecord

MENDED_BY = {
    "diverged": "lower `training.learning_rate`",
    "infeasible": "lower `data.max_length`, or set `training.gradient_checkpointing`",
    "hung": "raise `search.trial_timeout_seconds`",
}
"""What to do about a trial that failed, where its kind of failure says so."""
ELSEWHERE = {
    "lost": "most often want of memory: lower `data.max_length`, or run fewer trials at once (`search.max_concurrent`)",
    "storage": "make room or bring the storage back, then repeat the command: it goes on from its last rung",
    "damaged": "repeat the command: what is damaged is built again",
    "machine": "mend that machine or take it out of the cluster (`ray stop` on it), then repeat the command: it goes "
    "on from its last rung",
    "error": "one plan less is no harm to a search; for another try mend it, delete the trial's folder and the run's "
    "`records/search.json`, then repeat the command",
}
"""What to do about the others, whose cause is no setting."""

SUGGESTED = "suggested.json"
"""A trial's record as it was when its plan was handed out."""


def remedy_of(failure: str) -> str:
    """What to do about trials that failed in one way."""
    return (MENDED_BY | ELSEWHERE)[failure]


def read_trials(folder: Path) -> list[TrialRecord]:
    """Every recorded trial, in order of suggestion."""
    found = for_each(lambda path: read_json(path, TrialRecord), _paths(folder))
    return [record for record in found if record is not None]


def readable_trials(folder: Path) -> list[TrialRecord]:
    """As `read_trials`, without those whose record is damaged, which the search sees to when it begins."""
    return [record for record in for_each(_record_or_error, _paths(folder)) if isinstance(record, TrialRecord)]


def set_aside_damaged(folder: Path, search: str, tell: Callable[[str], None]) -> None:
    """Move records that cannot be read, and checkpoints to go on from that are not as they were written, into
    `damaged/`; those trials are run again from their start, with the plans that they had, and no other. The search's
    own time is made up again.

    Args:
        folder: Of the trials.
        search: Which one begins.
        tell: Told in one line what was set aside.
    """
    paths = _paths(folder)
    for path, record in zip(paths, for_each(_record_or_error, paths), strict=True):
        if isinstance(record, CorruptFile):
            tell(f"{record}; {_rebuild(folder, path, search)}")
        elif record and not record.is_over:
            begin_anew_if_damaged(folder, record, tell)
    try:
        _read_clock(folder, search)
    except CorruptFile as error:
        where = set_aside(_clock_path(folder, search), folder)
        tell(f"{error}; set aside in {where}, and the search's time is taken from its trials")
        write_seconds(folder, search, _seconds_at_work(folder, search))


def begin_anew_if_damaged(folder: Path, record: TrialRecord, tell: Callable[[str], None]) -> bool:
    """Set the last checkpoint of a trial aside if it is not as it was written, and record that the trial is to run
    again from its start; returns whether that was so.

    Args:
        folder: Of the trials.
        record: The trial's.
        tell: Told in one line what was set aside.
    """
    checkpoint = checkpoint_of(folder, record)
    if checkpoint is None:
        return False
    found = _digests_found(checkpoint, folder, record)
    if found == record.checkpoint:
        return False
    where = f"set aside in {set_aside(checkpoint, checkpoint.parent.parent)}" if found else "missing"
    tell(f"{name_of(checkpoint)} is damaged: {where}; trial {record.index} starts anew")
    afresh = {"status": "running", "rungs": (), "checkpoint": {}, "times": record.times[:1]}
    write_trial(folder, record.model_copy(update=afresh))
    return True


def _digests_found(checkpoint: Path, folder: Path, record: TrialRecord) -> dict[str, str]:
    """sha256 of a checkpoint's files. A storage that is away shows none, or not all: what is missing is looked for
    again when the trial's record is there."""
    with contextlib.suppress(FileNotFoundError):
        found = folder_digests(checkpoint)
        if found.keys() >= record.checkpoint.keys():
            return found
    read_trial(folder, record.index)
    return folder_digests(checkpoint)


def _rebuild(folder: Path, path: Path, search: str) -> str:
    """Set a trial aside whose record cannot be read, and record that its plan is to be run again; tells of both."""
    suggested = _record_or_error(path.with_name(SUGGESTED))
    where = f"set aside in {set_aside(path.parent, folder)}"
    if not isinstance(suggested, TrialRecord):
        return f"{where}, and its number gets another plan"
    begin_trial(folder, suggested)
    again = "is run again" if suggested.search == search else "of another search is run again where its plan is wanted"
    return f"{where}, and that trial {again}"


def _record_or_error(path: Path) -> TrialRecord | CorruptFile | None:
    try:
        return read_json(path, TrialRecord)
    except CorruptFile as error:
        return error


def read_trial(folder: Path, index: int) -> TrialRecord:
    """The record of a trial that has one."""
    return read_written(trial_path(folder, index), TrialRecord)


def begin_trial(folder: Path, record: TrialRecord) -> None:
    """Write the first record of a trial, and a copy of it that stays as it is: were the record damaged, a searcher that
    knows more by then would propose another plan."""
    write_json(trial_folder(folder, record.index) / SUGGESTED, record)
    write_trial(folder, record)


def write_trial(folder: Path, record: TrialRecord, patience_seconds: float | None = None) -> None:
    write_json(trial_path(folder, record.index), record, patience_seconds)


def read_pulse(folder: Path, index: int) -> TrialPulse | None:
    """The last sign of progress of a trial; None before the first, and while the storage is away."""
    return read_pulses(folder, [index])[0]


def read_pulses(folder: Path, indices: Sequence[int]) -> list[TrialPulse | None]:
    """The same of several trials."""
    return [_pulse_in(text) for text in for_each(read_sign, [_pulse_path(folder, index) for index in indices])]


def write_pulse(folder: Path, index: int, pulse: TrialPulse) -> None:
    """Tell of progress."""
    write_sign(_pulse_path(folder, index), pulse.model_dump_json())


def can_write_pulses(folder: Path) -> bool:
    """Whether a trial could tell of progress now, which none can while the storage is full or away."""
    return write_sign(folder / "watch", "the driver looks for signs of life")


def trial_path(trials: Path, index: int) -> Path:
    """A trial's record."""
    return trial_folder(trials, index) / "trial.json"


def trial_folder(trials: Path, index: int) -> Path:
    """Where a trial keeps its record and its last checkpoint."""
    return trials / f"{index:04d}"


def checkpoint_of(trials: Path, record: TrialRecord) -> Path | None:
    """The checkpoint of a trial's last rung."""
    if not record.rungs:
        return None
    return trial_folder(trials, record.index) / f"checkpoint-{record.rungs[-1].step}"


def remove_old_checkpoints(trials: Path, records: Sequence[TrialRecord]) -> None:
    """Remove checkpoints but the last recorded one, and unfinished copies, of trials that are over: a worker that was
    killed after it recorded a rung left the one before."""
    last = {trial_folder(trials, record.index): checkpoint_of(trials, record) for record in records}

    def clean(folder: Path) -> None:
        for name in children(folder):
            if (
                name.lstrip(".").startswith("checkpoint-")
                and not name.endswith(FILES)
                and folder / name != last[folder]
            ):
                remove(folder / name)

    for_each(clean, list(last))


def fresh_path(trials: Path, index: int) -> Path:
    """A finalist's score on fresh rows: it is the same for every search and given plan that it is beside."""
    return trial_folder(trials, index) / "fresh.json"


def read_seconds(trials: Path, search: str) -> float:
    """Seconds that a search has taken so far, all sessions together."""
    return _read_clock(trials, search).seconds


def write_seconds(trials: Path, search: str, seconds: float, session: int | None = None) -> bool:
    """Keep a search's time; returns whether that was the session's to do, which it is until another one begins."""
    clock = _read_clock(trials, search)
    if session is not None and clock.sessions > session:
        return False
    write_json(_clock_path(trials, search), clock.model_copy(update={"seconds": seconds}))
    return True


def begin_session(trials: Path, search: str) -> int:
    """Count a start of the search; returns how many there were with this one."""
    clock = _read_clock(trials, search)
    write_json(_clock_path(trials, search), clock.model_copy(update={"sessions": clock.sessions + 1}))
    return clock.sessions + 1


def wait_for_storage(trials: Path, search: str) -> None:
    """Wait until what `begin_session` wrote is there: a storage that is away may show a folder without trials."""
    read_written(_clock_path(trials, search), SearchClock)


def objective(result: RungResult | FreshScore, config: RunConfig) -> float:
    """What is minimized: the loss, or one minus the accuracy."""
    if config.search.metric == "loss":
        return result.loss
    assert result.accuracy is not None
    return 1.0 - result.accuracy


def _pulse_in(text: str | None) -> TrialPulse | None:
    """A sign of life is not made durable: after a crash of the machine it may be there and say nothing."""
    with contextlib.suppress(ValidationError):
        return TrialPulse.model_validate_json(text) if text else None
    return None


def _seconds_at_work(folder: Path, search: str) -> float:
    """Seconds in which a trial of a search was under way, as the trials' own times tell."""
    own = [record.times for record in read_trials(folder) if record.search == search and record.times]
    spans = sorted((times[0], times[-1]) for times in own)
    seconds, until = 0.0, 0.0
    for begin, end in spans:
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds


def _read_clock(trials: Path, search: str) -> SearchClock:
    return read_json(_clock_path(trials, search), SearchClock) or SearchClock(seconds=0.0)


def _paths(trials: Path) -> list[Path]:
    """Where the records of all trials are, in order."""
    return [trials / name / "trial.json" for name in children(trials) if name.isdigit()]


def _pulse_path(trials: Path, index: int) -> Path:
    return trial_folder(trials, index) / "pulse.json"


def _clock_path(trials: Path, search: str) -> Path:
    return trials / f"search-{search}.json"
