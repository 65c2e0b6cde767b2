"""The trials of a search as their records tell it; knows nothing of Ray.

Searches with different budgets, searchers or sensitivities share a folder of trials as long as a trial would give the
same result in each (`TrialRecord.digest`); `TrialRecord.search` says whose a trial is.
"""

from __future__ import annotations

from pathlib import Path

from qpruner.config import RunConfig
from qpruner.records import FreshScore, RungResult, SearchClock, TrialRecord
from qpruner.rundir import read_json, write_json


def read_trials(folder: Path) -> list[TrialRecord]:
    """Every recorded trial, in order of suggestion."""
    records = [read_json(path, TrialRecord) for path in sorted(folder.glob("*/trial.json"))]
    return [record for record in records if record is not None]


def write_trial(folder: Path, record: TrialRecord) -> None:
    write_json(trial_path(folder, record.index), record)


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


def read_seconds(trials: Path, search: str) -> float:
    """Seconds that a search has taken so far, all sessions together."""
    clock = read_json(_clock_path(trials, search), SearchClock)
    return clock.seconds if clock else 0.0


def write_seconds(trials: Path, search: str, seconds: float) -> None:
    write_json(_clock_path(trials, search), SearchClock(seconds=seconds))


def objective(result: RungResult | FreshScore, config: RunConfig) -> float:
    """What is minimized: the loss, or one minus the accuracy."""
    if config.search.metric == "loss":
        return result.loss
    assert result.accuracy is not None
    return 1.0 - result.accuracy


def _clock_path(trials: Path, search: str) -> Path:
    return trials / f"search-{search}.json"
