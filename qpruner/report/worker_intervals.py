"""Finds when workers had a search's trials, from the trials' records: without the pauses of interrupted ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from qpruner.runs.records import TrialRecord


class WorkerInterval(NamedTuple):
    """A worker's time on a trial, in the search's session (from 1); start and end in seconds."""

    session: int
    start: float
    end: float
    trial: int


def worker_intervals(trials: Iterable[TrialRecord], search: str) -> list[WorkerInterval]:
    """List every interval of work for one search, by session and start.

    Args:
        trials: Those in its folder, also of other searches, which may have reused a trial.
        search: The search's digest.
    """
    found = (interval for trial in trials for interval in _of_trial(trial, search))
    return sorted(interval for interval in found if interval.end > interval.start)


def without_pauses(intervals: Iterable[WorkerInterval]) -> list[WorkerInterval]:
    """Shift intervals to seconds from the first start, each session beginning where the one before ended.

    Args:
        intervals: By session and start.
    """
    moved: list[WorkerInterval] = []
    until = 0.0
    for _, session in groupby(intervals, key=lambda each: each.session):
        of_session = list(session)
        shift = until - of_session[0].start
        moved += [each._replace(start=each.start + shift, end=each.end + shift) for each in of_session]
        until = max(each.end for each in moved)
    return moved


def _of_trial(trial: TrialRecord, search: str) -> Iterator[WorkerInterval]:
    """Yield each start, for as long as it added to the trial's seconds: the end of a killed worker is not recorded."""
    if not trial.begun:  # of an older version: all of it before its end
        if trial.times and trial.search == search:
            yield WorkerInterval(1, trial.times[-1] - trial.seconds, trial.times[-1], trial.index)
        return
    ends = [*(begun.seconds for begun in trial.begun[1:]), trial.seconds]
    for begun, until in zip(trial.begun, ends, strict=True):
        if begun.search == search:
            yield WorkerInterval(begun.session, begun.time, begun.time + until - begun.seconds, trial.index)
