"""Reads and writes the records of a search's trials; knows nothing of Ray.

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
from qpruner.runs.records import FreshScore, RungResult, SearchClock, TrialPulse, TrialRecord
from qpruner.runs.storage import (
    FILES,
    children,
    display_name,
    folder_digests,
    for_each,
    quarantine,
    read_existing,
    read_json,
    read_progress,
    remove,
    write_json,
    write_progress,
)

SETTING_REMEDIES = {
    "diverged": "lower `training.learning_rate`",
    "infeasible": "lower `data.max_length`, or set `training.gradient_checkpointing`",
    "hung": "raise `search.trial_timeout_seconds`",
}
"""Remedies of failures that a setting can prevent."""
OTHER_REMEDIES = {
    "lost": "the usual cause is too little memory: lower `data.max_length`, or `search.max_concurrent`",
    "storage": "make room or bring the storage back, then repeat the command: the trial resumes from its last rung",
    "damaged": "repeat the command: it builds damaged files again",
    "machine": "repair that machine or remove it from the cluster (`ray stop` on it), then repeat the command: its "
    "trials are retried",
    "error": "the search continues without this plan; to retry it, fix the cause, delete the trial's folder and the "
    "run's `records/search.json`, then repeat the command",
}
"""Remedies of the others."""

SUGGESTED = "suggested.json"
"""A copy of a trial's first record."""


def remedy_of(failure: str) -> str:
    """Return what to do about a kind of failure."""
    return (SETTING_REMEDIES | OTHER_REMEDIES)[failure]


def read_trials(folder: Path) -> list[TrialRecord]:
    """Read every recorded trial, in order of suggestion."""
    found = for_each(lambda path: read_json(path, TrialRecord), _paths(folder))
    return [record for record in found if record is not None]


def readable_trials(folder: Path) -> list[TrialRecord]:
    """Read every trial whose record is not damaged; the search repairs the others when it begins."""
    return [record for record in for_each(_record_or_error, _paths(folder)) if isinstance(record, TrialRecord)]


def set_aside_damaged(folder: Path, search: str, notify: Callable[[str], None]) -> None:
    """Move damaged records, and damaged checkpoints to resume from, into `damaged/`.

    Those trials are run again from their start, with their own plans. A damaged clock is rebuilt from the trials.

    Args:
        folder: Of the trials.
        search: The one that begins.
        notify: Gets one line about each.
    """
    paths = _paths(folder)
    for path, record in zip(paths, for_each(_record_or_error, paths), strict=True):
        if isinstance(record, CorruptFile):
            notify(f"{record}; {_rebuild(folder, path, search)}")
        elif record and not record.is_over:
            restart_if_damaged(folder, record, notify)
    try:
        _read_clock(folder, search)
    except CorruptFile as error:
        where = quarantine(_clock_path(folder, search), folder)
        notify(f"{error}; set aside in {where}, and the search's time is taken from its trials")
        write_seconds(folder, search, _seconds_at_work(folder, search))


def restart_if_damaged(folder: Path, record: TrialRecord, notify: Callable[[str], None]) -> bool:
    """Set a trial's last checkpoint aside if it is damaged, and record that the trial is to run from its start.

    Returns:
        Whether it was damaged.
    """
    checkpoint = checkpoint_of(folder, record)
    if checkpoint is None:
        return False
    found = _digests_found(checkpoint, folder, record)
    if found == record.checkpoint:
        return False
    where = f"set aside in {quarantine(checkpoint, checkpoint.parent.parent)}" if found else "missing"
    notify(f"{display_name(checkpoint)} is damaged: {where}; trial {record.index} is restarted")
    afresh = {"status": "running", "rungs": (), "checkpoint": {}, "times": record.times[:1]}
    write_trial(folder, record.model_copy(update=afresh))
    return True


def _digests_found(checkpoint: Path, folder: Path, record: TrialRecord) -> dict[str, str]:
    """Hash a checkpoint's files; if some are missing, again once the trial's record shows that the storage is there."""
    with contextlib.suppress(FileNotFoundError):
        found = folder_digests(checkpoint)
        if found.keys() >= record.checkpoint.keys():
            return found
    read_trial(folder, record.index)
    return folder_digests(checkpoint)


def _rebuild(folder: Path, path: Path, search: str) -> str:
    """Set a trial with a damaged record aside and record that its plan is to be run again; describe both."""
    suggested = _record_or_error(path.with_name(SUGGESTED))
    where = f"set aside in {quarantine(path.parent, folder)}"
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
    """Read the record of a trial that has one."""
    return read_existing(trial_path(folder, index), TrialRecord)


def begin_trial(folder: Path, record: TrialRecord) -> None:
    """Write the first record of a trial, and a copy that keeps its plan in case the record is damaged later."""
    write_json(trial_folder(folder, record.index) / SUGGESTED, record)
    write_trial(folder, record)


def write_trial(folder: Path, record: TrialRecord, patience_seconds: float | None = None) -> None:
    """Write a trial's record."""
    write_json(trial_path(folder, record.index), record, patience_seconds)


def read_pulse(folder: Path, index: int) -> TrialPulse | None:
    """Read a trial's last pulse; None before the first, and while the storage is away."""
    return read_pulses(folder, [index])[0]


def read_pulses(folder: Path, indices: Sequence[int]) -> list[TrialPulse | None]:
    """Read the last pulses of several trials."""
    return [_pulse_in(text) for text in for_each(read_progress, [_pulse_path(folder, index) for index in indices])]


def write_pulse(folder: Path, index: int, pulse: TrialPulse) -> None:
    """Write a sign of progress."""
    write_progress(_pulse_path(folder, index), pulse.model_dump_json())


def can_write_pulses(folder: Path) -> bool:
    """Return whether pulses can be written now, which they cannot while the storage is full or away."""
    return write_progress(folder / "watch", "the driver looks for pulses")


def trial_path(trials: Path, index: int) -> Path:
    """Return the path of a trial's record."""
    return trial_folder(trials, index) / "trial.json"


def trial_folder(trials: Path, index: int) -> Path:
    """Return the folder of a trial's record and last checkpoint."""
    return trials / f"{index:04d}"


def checkpoint_of(trials: Path, record: TrialRecord) -> Path | None:
    """Return the path of the checkpoint of a trial's last rung."""
    if not record.rungs:
        return None
    return trial_folder(trials, record.index) / f"checkpoint-{record.rungs[-1].step}"


def remove_old_checkpoints(trials: Path, records: Sequence[TrialRecord]) -> None:
    """Remove all but the last recorded checkpoint of trials that are over; a killed worker may have left others."""
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
    """Return the path of a finalist's score on fresh rows, which does not depend on the search."""
    return trial_folder(trials, index) / "fresh.json"


def read_seconds(trials: Path, search: str) -> float:
    """Return the seconds that a search has taken, all sessions together."""
    return _read_clock(trials, search).seconds


def write_seconds(trials: Path, search: str, seconds: float, session: int | None = None) -> bool:
    """Save a search's time; return False if another session has begun since."""
    clock = _read_clock(trials, search)
    if session is not None and clock.sessions > session:
        return False
    write_json(_clock_path(trials, search), clock.model_copy(update={"seconds": seconds}))
    return True


def begin_session(trials: Path, search: str) -> int:
    """Count a session of the search; return its number, from 1."""
    clock = _read_clock(trials, search)
    write_json(_clock_path(trials, search), clock.model_copy(update={"sessions": clock.sessions + 1}))
    return clock.sessions + 1


def wait_for_storage(trials: Path, search: str) -> None:
    """Wait until what `begin_session` wrote is there; a storage that is away may show an empty folder."""
    read_existing(_clock_path(trials, search), SearchClock)


def objective(result: RungResult | FreshScore, config: RunConfig) -> float:
    """Return what is minimized: the loss, or one minus the accuracy."""
    if config.search.metric == "loss":
        return result.loss
    assert result.accuracy is not None
    return 1.0 - result.accuracy


def _pulse_in(text: str | None) -> TrialPulse | None:
    """Parse a pulse; it is not written durably, so it may be damaged after a crash."""
    with contextlib.suppress(ValidationError):
        return TrialPulse.model_validate_json(text) if text else None
    return None


def _seconds_at_work(folder: Path, search: str) -> float:
    """Add up the seconds in which a trial of a search was running, from the trials' own times."""
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
    """Return the paths of all trials' records, in order."""
    return [trials / name / "trial.json" for name in children(trials) if name.isdigit()]


def _pulse_path(trials: Path, index: int) -> Path:
    return trial_folder(trials, index) / "pulse.json"


def _clock_path(trials: Path, search: str) -> Path:
    return trials / f"search-{search}.json"
