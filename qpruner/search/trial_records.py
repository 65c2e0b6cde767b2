"""The trials of a search as their records tell it; knows nothing of Ray."""

from __future__ import annotations

from pathlib import Path

from qpruner.config import RunConfig
from qpruner.records import RungResult, TrialRecord
from qpruner.rundir import read_json


def read_trials(folder: Path) -> list[TrialRecord]:
    """Every recorded trial, in order of suggestion."""
    records = [read_json(path, TrialRecord) for path in sorted(folder.glob("*/trial.json"))]
    return [record for record in records if record is not None]


def trial_folder(trials: Path, index: int) -> Path:
    """Where a trial keeps its record and its last checkpoint."""
    return trials / f"{index:04d}"


def checkpoint_of(trials: Path, record: TrialRecord) -> Path | None:
    """The checkpoint of a trial's last rung."""
    if not record.rungs:
        return None
    return trial_folder(trials, record.index) / f"checkpoint-{record.rungs[-1].step}"


def objective(result: RungResult, config: RunConfig) -> float:
    """What is minimized: the loss, or one minus the accuracy."""
    if config.search.metric == "loss":
        return result.loss
    assert result.accuracy is not None
    return 1.0 - result.accuracy
