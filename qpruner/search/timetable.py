"""When trials would begin, reach their rungs and end if a step took all of them the same time.

Which results are there when a plan is asked for hangs on machines, and with it every plan from then on. A search that
is to propose the same plans on any machines asks this timetable instead, as a conservative discrete-event simulation
does (Chandy & Misra 1979): a plan is proposed from what is known at its trial's own beginning here, and waits for what
is not known yet. The waits are for trials that have begun, so they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Moment = tuple[int, int]
"""Optimizer steps from the beginning of the search, and whose: at one step the earlier trial comes first."""


@dataclass
class _Entry:
    begun: Moment
    reached: int = 0
    is_over: bool = False
    has_failed: bool = False


class Timetable:
    """The trials of one search, on as many slots as it may have in flight.

    Args:
        slots: Trials at a time.
        rungs: Steps at which a trial reports, ascending.
    """

    def __init__(self, slots: int, rungs: Sequence[int]) -> None:
        self._slots, self._rungs = slots, tuple(rungs)
        self._entries: dict[int, _Entry] = {}
        self._in_flight: set[int] = set()
        self._now: Moment = (0, -1)

    @property
    def waits(self) -> bool:
        """Whether the next trial begins at a moment of which not everything is known yet."""
        return len(self._in_flight) >= self._slots and not self._entries[self._next_to_end()].is_over

    @property
    def in_flight(self) -> frozenset[int]:
        """Trials that have begun and are not over at this moment."""
        return frozenset(self._in_flight)

    def advance(self) -> None:
        """Go to the moment at which the next trial begins."""
        if len(self._in_flight) >= self._slots:
            first = self._next_to_end()
            self._now = self._end(first)
            self._in_flight.remove(first)

    def begin(self, index: int) -> None:
        """Have a trial begin at this moment."""
        self._entries[index] = _Entry(self._now)
        self._in_flight.add(index)

    def withdraw(self, index: int) -> None:
        """Have a trial never have begun."""
        del self._entries[index]
        self._in_flight.discard(index)

    def reach(self, index: int, step: int) -> None:
        """Take a rung that a trial has reported. What did not begin here, another search's, is known from the start."""
        if index in self._entries:
            self._entries[index].reached = max(step, self._entries[index].reached)

    def end(self, index: int, has_failed: bool) -> None:
        """Take the end of a trial: at its last rung, or, if it failed, when it would have reached the next."""
        if index in self._entries:
            self._entries[index].is_over, self._entries[index].has_failed = True, has_failed

    def is_known(self, index: int, step: int, to: int | None = None) -> bool:
        """Whether a trial's rung is known at this moment.

        Args:
            index: The trial.
            step: The rung.
            to: A trial at whose beginning it is to be known, instead.
        """
        if index not in self._entries or (to is not None and to not in self._entries):
            return True
        moment = self._now if to is None else self._entries[to].begun
        return (self._entries[index].begun[0] + step, index) <= moment

    def _next_to_end(self) -> int:
        return min(self._in_flight, key=self._end)

    def _end(self, index: int) -> Moment:
        """When a trial ends; while it runs, the earliest that it may."""
        entry = self._entries[index]
        if entry.is_over and entry.reached and not entry.has_failed:
            return entry.begun[0] + entry.reached, index
        following = next((rung for rung in self._rungs if rung > entry.reached), self._rungs[-1])
        return entry.begun[0] + following, index
