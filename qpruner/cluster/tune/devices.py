"""Decides whether a failed trial is tried on another device, and which devices get no more trials.

A device is a GPU, or a machine if trials use no GPU. A failure may be the plan's fault (it is too
large for any device) or the device's (it is smaller than others, another program uses its memory,
or it is broken). Only other devices can tell, so a device where a trial has failed gets no trials
until that trial has reported a score from another device, or is over.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import ray

from qpruner.cluster.slots import size_of
from qpruner.cluster.tune.callbacks import Hold
from qpruner.errors import StageError
from qpruner.runs.events import Emit, Message
from qpruner.runs.records import TrialRecord

MAX_FAILURES = 2
"""A device gets no more trials once so many have failed on it and have run on another one."""
MAX_TRIES = 3
"""Failures of one trial after which its plan is blamed. Those on a device count that has failed no
other trial which then ran elsewhere, and every further one on the same device."""

TO_COME = "to come"
"""Stands for the node of devices that an autoscaler may start."""


@dataclass
class _Held:
    """A device that gets no trials, its node, and the function that ends this (see `Holding`)."""

    device: str
    node: str
    let_go: Callable[[], None]


class Devices:
    """Counts failures by device, and holds devices that fail where others succeed.

    `count` returns the number of devices of each node that is in the cluster now, by the id of the
    node, and that of devices that an autoscaler may start, by `TO_COME`.
    """

    def __init__(self, count: Callable[[], Mapping[str, int]], emit: Emit) -> None:
        self._count, self._emit = count, emit
        # By the number of the trial that failed.
        self._suspects: defaultdict[int, list[_Held]] = defaultdict(list)
        # The devices on which a trial failed in this command, by its number.
        self._tried: defaultdict[int, list[str]] = defaultdict(list)
        self._failures: Counter[str] = Counter()  # of trials that ran on another device
        self._left_out: list[_Held] = []  # several of one device, if trials share it

    @property
    def num_held(self) -> int:
        """The number of workers that keep a device from trials."""
        return len(self._left_out) + sum(map(len, self._suspects.values()))

    def should_move(self, record: TrialRecord, hold: Hold) -> bool:
        """Return True if a trial that failed is to be tried on another device.

        If so, its own device is held, unless the device's node leaves.
        """
        if record.device is None:
            return False
        tried = self._tried[record.index]
        tried.append(record.device)
        num_bad = sum(1 for device in {*tried} if self._failures[device])
        if len(tried) - num_bad >= MAX_TRIES or not self._leaves_another({*tried}, record.device):
            self.release(record.index)
            return False
        if holding := hold():
            self._suspects[record.index].append(_Held(record.device, *holding))
        return True

    def release(self, index: int) -> None:
        """Let go of the devices on which a trial has failed that is over.

        It has told nothing about them.
        """
        for held in self._suspects.pop(index, []):
            held.let_go()

    def has_scored(self, record: TrialRecord) -> None:
        """Decide on the devices, if any, on which a trial had failed before it reported a score."""
        for held in self._suspects.pop(record.index, []):
            if held.device == record.device:
                held.let_go()
                continue
            self._failures[held.device] += 1
            if self._failures[held.device] < MAX_FAILURES:
                held.let_go()
                continue
            if held.device not in {each.device for each in self._left_out}:
                text = (
                    f"{self._failures[held.device]} trials failed on {held.device} "
                    "and ran on other devices"
                )
                self._emit(
                    Message("search", f"warning: {text}: it gets no more trials of this search")
                )
            self._left_out.append(held)

    def look(self) -> None:
        """Let go of the devices of nodes that have left, and of suspects if no other is left.

        Raises:
            StageError: If all devices that are left were left out.
        """
        count = self._count()
        for index, suspects in list(self._suspects.items()):
            self._suspects[index] = _in_cluster(suspects, count)
        self._left_out = _in_cluster(self._left_out, count)
        total = sum(count.values())
        if not total or len(self._names()) < total:
            return
        self._release_all()
        if len(names := self._names()) >= total:
            cause = (
                f"no other device is left than {', '.join(sorted(names))}, "
                "where trials failed that ran elsewhere"
            )
            raise StageError(
                "search", cause, "add a machine, or repair these and repeat the command: it resumes"
            )

    def end_session(self) -> None:
        """Forget all devices, which Tune lets go of at the end of its session.

        Failures stay counted.
        """
        self._release_all()
        self._left_out.clear()

    def _release_all(self) -> None:
        for index in list(self._suspects):
            self.release(index)

    def _names(self) -> set[str]:
        """Return the devices that are held."""
        return {each.device for held in (self._left_out, *self._suspects.values()) for each in held}

    def _leaves_another(self, tried: Collection[str], device: str) -> bool:
        """Return True if another device may run a trial while this one is held.

        Other suspects are let go of if that is needed.
        """
        total = sum(self._count().values())
        while len({*self._names(), device}) >= total:
            suspects = [(index, held) for index, each in self._suspects.items() for held in each]
            other = next(
                ((index, held) for index, held in suspects if held.device not in tried), None
            )
            if other is None:
                return False
            index, held = other
            self._suspects[index].remove(held)
            held.let_go()
        return True


def _in_cluster(held: list[_Held], count: Mapping[str, int]) -> list[_Held]:
    """Return those whose node is still in the cluster, and let go of the others.

    For a node that has left, Ray would hold another device.
    """
    for each in held:
        if each.node not in count:
            each.let_go()
    return [each for each in held if each.node in count]


def count_devices(resources: Mapping[str, float], room: Callable[[int], int]) -> dict[str, int]:
    """Count the devices that have room for a trial.

    They are those of each node in the cluster, by its id, and those `TO_COME`.

    `room` returns for how many trials there is room if so many slots are held, also on machines
    that may be started.
    """
    nodes = {node["NodeID"]: size_of(node) for node in ray.nodes() if node["Alive"]}
    slots = {name: node.fits(resources) for name, node in nodes.items()}
    count = {
        name: min(slots[name], int(node.gpus) if resources.get("gpu") else 1)
        for name, node in nodes.items()
        if slots[name]
    }
    return count | {TO_COME: max(0, room(0) - sum(slots.values()))}
