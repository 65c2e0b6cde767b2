"""How many trials a search may have in flight, on a cluster whose machines come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from qpruner.cluster.slots import Slots
from qpruner.runs.events import Emit, Message, SlotsFound

LOOK_SECONDS = 2.0
"""How often a search looks for machines that came or went."""


class Room:
    """How many trials may be in flight now; tells of slots that come and go.

    A trial that waits for a machine is what has the autoscaler start one, so that there is room for as many as it may
    start. They are asked for by waiting trials alone: a request of Ray's `request_resources` would outlive a driver
    that is killed, and keep machines that nobody uses.

    Args:
        look: Finds out what the cluster can run.
        resources: What one trial takes.
        limit: Trials in flight at most.
        emit: Told of the slots that are there.
    """

    def __init__(
        self, look: Callable[[], Slots], resources: Mapping[str, float], limit: int | None, emit: Emit
    ) -> None:
        self._look, self._resources, self._limit, self._emit = look, resources, limit, emit
        self._there: int | None = None
        self._room, self._next_look = 0, 0.0

    def __call__(self) -> int:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            slots = self._look()
            self._room = self._limited(slots.at_most(self._resources))
            there = self._limited(slots.fits(self._resources))
            if there != self._there:
                self._there = there
                self._emit(SlotsFound(there))
                if not self._room:
                    text = "no machine is there that could run a trial, and none may be started: one has to join"
                    self._emit(Message("search", f"warning: {text}"))
        return self._room

    def _limited(self, number: int) -> int:
        return min(number, self._limit) if self._limit else number
