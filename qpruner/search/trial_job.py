"""What a trial is given and whom it tells, without the libraries that run it.

A trial is a function `(job, start, report, progress)`: `start` is nothing or the trial's own last checkpoint; `report`
takes the rung's result and its checkpoint folder, and may raise to stop; `progress` hears of every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qpruner.config.schema import RunConfig
from qpruner.runs.records import RungResult

Report = Callable[[RungResult, Path], None]
Progress = Callable[[int], None]
"""Told the last optimizer step, before every forward pass and when something is loaded."""


@dataclass(frozen=True)
class Materials:
    """Where a trial finds what it needs; paths of the run, which mean the same on every node.

    Attributes:
        checkpoint: Folder of the dense (pruned) model and its tokenizer.
        bank: Folder of the bank.
        data: Folder of the encoded rows.
    """

    checkpoint: Path
    bank: Path
    data: Path


@dataclass(frozen=True)
class TrialJob:
    """What a trial is: a plan on the run's materials."""

    config: RunConfig
    materials: Materials
    plan: Mapping[str, int]


Trial = Callable[[TrialJob, Path | None, Report, Progress], None]
"""`run_trial`, or what stands in for it where only the search is looked at."""
