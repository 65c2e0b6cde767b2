"""When trials would begin, reach their rungs and end if a step took all of them the same time.

Which results are there when a plan is asked for hangs on how fast the machines are, and with it every plan from then
on. A search that is to propose the same plans all the same asks this timetable, as a conservative discrete-event
simulation does (Chandy & Misra 1979): a plan is proposed from what is known when its trial begins here, and waits for
what is not known yet. What is waited for are trials that have begun, so the waits end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Moment = tuple[int, int]
"""Optimizer steps from the beginning of the search, and the trial that got there: at one step the lowest number is
first. A trial begins at the moment at which another ends."""
START: Moment = (0, -1)


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
        self._made_room: dict[int, Moment] = {}
        self._now = START

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
            self._now = self._made_room[first] = self._end(first)
            self._in_flight.remove(first)

    def begin(self, index: int) -> Moment:
        """Have a trial begin at this moment, which is returned."""
        self._entries[index] = _Entry(self._now)
        self._in_flight.add(index)
        return self._now

    def take_up(self, index: int, begun: Moment) -> None:
        """Have a trial have begun when its record says, in any order."""
        self._entries[index] = _Entry(begun)
        self._now = max(self._now, begun)
        before = begun[1]
        self._made_room[before] = max(self._made_room.get(before, START), begun)
        for each in {index, before} & set(self._entries):
            # A number is given again where a trial's folder was deleted.
            has_made_room = self._made_room.get(each, START) > self._entries[each].begun
            (self._in_flight.discard if has_made_room else self._in_flight.add)(each)

    def withdraw(self, index: int) -> None:
        """Have a trial never have begun."""
        del self._entries[index]
        self._in_flight.discard(index)

    def reach(self, index: int, step: int) -> None:
        """Take a rung after which a trial goes on or ends. What did not begin here, another search's, is known from
        the start."""
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
        if index not in self._entries:
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
