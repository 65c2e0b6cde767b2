"""Events that stages report while they work, as plain data for terminal, log and tests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qpruner.runs.records import SearchState, TrialRecord


class Event:
    """Base class of events."""


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins; `detail` says what it does."""

    stage: str
    detail: str


@dataclass(frozen=True)
class StageFinished(Event):
    """A stage has written its record; `figures` are its main results as text."""

    stage: str
    seconds: float
    figures: str


@dataclass(frozen=True)
class StageSkipped(Event):
    """A stage is skipped, because its record was made from the same inputs.

    `seconds` is how long the recorded run of the stage took.
    """

    stage: str
    figures: str
    seconds: float


@dataclass(frozen=True)
class Progress(Event):
    """A stage has finished `done` of its `total` steps."""

    stage: str
    done: int
    total: int
    detail: str = ""


COMMAND = "run"
"""Value of `Message.stage` in messages of the command itself, which belong to no stage."""


@dataclass(frozen=True)
class Message(Event):
    """A line of text for people, such as the result of a trial or a warning."""

    stage: str
    text: str


@dataclass(frozen=True)
class TableMade(Event):
    """A stage has a table to show."""

    headings: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SearchPlanned(Event):
    """A search starts.

    `trials` are all recorded trials, including those of searches with other budgets or searchers.
    """

    search: SearchState
    trials: tuple[TrialRecord, ...]


@dataclass(frozen=True)
class SlotsFound(Event):
    """The number of trials that can run at once on the machines now in the cluster."""

    slots: int


@dataclass(frozen=True)
class TrialChanged(Event):
    """A trial was submitted, reached a rung, ended, or was withdrawn while it waited.

    `trial` is its record at that moment.
    """

    trial: TrialRecord
    is_withdrawn: bool = False


@dataclass(frozen=True)
class GroupPacked(Event):
    """All missing entries of a group are in the bank."""

    group: str


@dataclass(frozen=True)
class StepsSeen(Event):
    """The latest step that each running trial reported, by trial index."""

    steps: Mapping[int, int]


Emit = Callable[[Event], None]
