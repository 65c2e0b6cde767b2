"""Decides whether a failed trial is tried on another device, and which devices get no more trials.

A device is a GPU, or a machine if trials use no GPU. A failure may be the plan's fault (it is too
large for any device) or the device's (it is smaller than others, another program uses its memory,
or it is broken). Only other devices can tell, so a device where a trial has failed gets no trials
until that trial has reported a score from another device, or is over.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import ray

from qpruner.cluster.slots import Resources, size_of
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
        self._count = count
        self._emit = emit
        self._suspects: dict[int, list[_Held]] = defaultdict(list)
        """By the number of the trial that failed."""
        self._tried: dict[int, list[str]] = defaultdict(list)
        """The devices on which a trial failed in this command, by its number."""
        self._failures = Counter[str]()  # of trials that ran on another device
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
        num_blaming_plan = len(tried) - len(set(tried) & self._failures.keys())
        if num_blaming_plan >= MAX_TRIES or not self._leaves_another(tried, record.device):
            self.release(record.index)
            return False
        holding = hold()
        if holding:
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
            if held.device != record.device:
                self._failures[held.device] += 1
            if held.device == record.device or self._failures[held.device] < MAX_FAILURES:
                held.let_go()
                continue
            if held.device not in {earlier.device for earlier in self._left_out}:
                text = (
                    f"warning: {self._failures[held.device]} trials failed on {held.device} and "
                    "ran on other devices: it gets no more trials of this search"
                )
                self._emit(Message("search", text))
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
        names = self._names()
        if len(names) >= total:
            cause = (
                f"no other device is left than {', '.join(sorted(names))}, "
                "where trials failed that ran elsewhere"
            )
            remedy = "add a machine, or repair these and repeat the command: it resumes"
            raise StageError("search", cause, remedy)

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
        all_held = itertools.chain(self._left_out, *self._suspects.values())
        return {held.device for held in all_held}

    def _leaves_another(self, tried: Collection[str], device: str) -> bool:
        """Return True if another device may run a trial while this one is held.

        Other suspects are let go of if that is needed.
        """
        total = sum(self._count().values())
        for suspects in self._suspects.values():
            for held in list(suspects):
                if len({*self._names(), device}) >= total and held.device not in tried:
                    suspects.remove(held)
                    held.let_go()
        return len({*self._names(), device}) < total


def _in_cluster(held: list[_Held], count: Mapping[str, int]) -> list[_Held]:
    """Return those whose node is still in the cluster, and let go of the others.

    For a node that has left, Ray would hold another device.
    """
    present = []
    for device in held:
        if device.node in count:
            present.append(device)
        else:
            device.let_go()
    return present


def count_devices(resources: Resources, room: Callable[[int], int]) -> dict[str, int]:
    """Count the devices that have room for a trial.

    They are those of each node in the cluster, by its id, and those `TO_COME`.

    `room` returns for how many trials there is room if so many slots are held, also on machines
    that may be started.
    """
    count = {}
    num_slots = 0
    for node in ray.nodes():
        size = size_of(node)
        slots = size.fits(resources) if node["Alive"] else 0
        if slots:
            num_slots += slots
            num_devices = int(size.gpus) if resources.get("gpu") else 1
            count[node["NodeID"]] = min(slots, num_devices)
    return count | {TO_COME: max(0, room(0) - num_slots)}
