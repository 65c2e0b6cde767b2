"""What the stages say while they work: plain data, read by the terminal, the log and the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qpruner.runs.records import SearchState, SensitivityRecord, TrialRecord


class Event:
    """Base of what is said."""


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins."""

    stage: str
    detail: str


@dataclass(frozen=True)
class StageFinished(Event):
    """A stage has written its record."""

    stage: str
    seconds: float
    figures: str


@dataclass(frozen=True)
class StageSkipped(Event):
    """A record with the same input digest exists, so the stage is not run again; `seconds` are those it took."""

    stage: str
    figures: str
    seconds: float


@dataclass(frozen=True)
class Progress(Event):
    """`done` of `total` steps of a stage are finished."""

    stage: str
    done: int
    total: int
    detail: str = ""


COMMAND = "run"
"""As the stage of a message: it is of the command itself, before its first stage."""


@dataclass(frozen=True)
class Message(Event):
    """A line for people: a trial's result, a warning, a figure."""

    stage: str
    text: str


@dataclass(frozen=True)
class TableMade(Event):
    """A table worth showing."""

    headings: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SearchPlanned(Event):
    """What the search is about, and every recorded trial, also those of searches with another budget or searcher."""

    search: SearchState
    trials: tuple[TrialRecord, ...]
    measured: SensitivityRecord


@dataclass(frozen=True)
class SlotsFound(Event):
    """So many trials can run at once on the machines that are there now."""

    slots: int


@dataclass(frozen=True)
class TrialChanged(Event):
    """A trial was handed out, reached a rung, or ended: its record as it is now."""

    trial: TrialRecord


@dataclass(frozen=True)
class StepsSeen(Event):
    """Where the trials under way are now, between two rungs, too: the last step that each told of, by number."""

    steps: Mapping[int, int]


@dataclass(frozen=True)
class TrialWithdrawn(Event):
    """A trial that waited for a machine when the search's hours were spent is not begun any more, and not recorded."""

    index: int


Emit = Callable[[Event], None]
