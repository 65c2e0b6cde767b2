"""The interface of a trial, without the libraries that run it.

A trial is a function `(job, start, report, progress)`: `start` is None or the trial's own last checkpoint; `report`
takes a rung's result and its checkpoint folder, and may raise to stop; `progress` is called at every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qpruner.config.schema import RunConfig
from qpruner.runs.records import RungResult

Report = Callable[[RungResult, Path], None]
Progress = Callable[[int], None]
"""Takes the last optimizer step, before every forward pass and when something is loaded."""


@dataclass(frozen=True)
class Materials:
    """Folders of the run that a trial reads, by paths that are the same on every node."""

    checkpoint: Path  # of the pruned model and its tokenizer
    bank: Path
    data: Path  # the encoded rows


@dataclass(frozen=True)
class TrialJob:
    """A plan on the run's materials."""

    config: RunConfig
    materials: Materials
    plan: Mapping[str, int]


Trial = Callable[[TrialJob, Path | None, Report, Progress], None]
"""`run_trial`, or a stand-in in tests and benchmarks."""
