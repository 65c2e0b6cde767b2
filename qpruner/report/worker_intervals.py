"""When workers had a search's trials, as the trials' records tell: without the pauses of interrupted ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from qpruner.runs.records import TrialRecord


class WorkerInterval(NamedTuple):
    """A worker's time on a trial."""

    session: int
    """Of the search, from 1."""
    start: float
    """Seconds; Unix ones as recorded."""
    end: float
    trial: int


def worker_intervals(trials: Iterable[TrialRecord], search: str) -> list[WorkerInterval]:
    """Every stretch of work for one search, by session and start.

    Args:
        trials: Those in its folder, also other searches'; one may have had a trial before another took it over.
        search: The search's digest.
    """
    found = (stretch for trial in trials for stretch in _of_trial(trial, search))
    return sorted(stretch for stretch in found if stretch.end > stretch.start)


def without_pauses(worked: Iterable[WorkerInterval]) -> list[WorkerInterval]:
    """The same in seconds from the first start, each session beginning where the one before ended.

    Args:
        worked: By session and start.
    """
    moved: list[WorkerInterval] = []
    until = 0.0
    for _, session in groupby(worked, key=lambda stretch: stretch.session):
        of_session = list(session)
        begin = of_session[0].start
        moved += [
            stretch._replace(start=stretch.start - begin + until, end=stretch.end - begin + until)
            for stretch in of_session
        ]
        until = max(stretch.end for stretch in moved)
    return moved


def _of_trial(trial: TrialRecord, search: str) -> Iterator[WorkerInterval]:
    """Each start, for as long as it added to the trial's seconds: nobody sees the end of a worker that is cut off."""
    if not trial.begun:  # of an older version: all of it before its end
        if trial.times and trial.search == search:
            yield WorkerInterval(1, trial.times[-1] - trial.seconds, trial.times[-1], trial.index)
        return
    taken = [*(begun.seconds for begun in trial.begun[1:]), trial.seconds]
    for begun, until in zip(trial.begun, taken, strict=True):
        if begun.search == search:
            yield WorkerInterval(begun.session, begun.time, begun.time + until - begun.seconds, trial.index)
