"""What the stages say while they work: plain data, read by the terminal, the log and the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageStarted:
    """A stage begins."""

    stage: str
    detail: str


@dataclass(frozen=True)
class StageFinished:
    """A stage has written its record."""

    stage: str
    seconds: float
    figures: str


@dataclass(frozen=True)
class StageSkipped:
    """A record with the same input digest exists, so the stage is not run again."""

    stage: str
    figures: str


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a stage are finished."""

    stage: str
    done: int
    total: int
    detail: str = ""


@dataclass(frozen=True)
class Message:
    """One line worth telling: a trial's result, a warning, a figure."""

    stage: str
    text: str


Event = StageStarted | StageFinished | StageSkipped | Progress | Message
Emit = Callable[[Event], None]
