"""Decides whether a trial that failed is tried on another device, and which devices get no more trials.

A device is a GPU, or a machine if trials use no GPU. A failure may be the plan's fault (it is too large for any device)
or the device's (it is smaller than others, another program uses its memory, or it is broken). Only a second device can
tell, so the first one gets no trials until the trial has reported a score from another one, or has failed there too.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import ray

from qpruner.cluster.slots import Node, size_of
from qpruner.cluster.tune.callbacks import Hold
from qpruner.runs.events import Emit, Message
from qpruner.runs.records import TrialRecord

MAX_FAILURES = 2
"""Trials that failed on a device and ran on another one, after which the device gets no more trials."""
MAX_DEVICES = 3
"""Failures of one trial that are its plan's fault, even if all were on the same device."""


class _Suspect(NamedTuple):
    """A device that is held, by the worker of a trial that failed there, and the function that lets it go."""

    device: str
    let_go: Callable[[], None]


class Devices:
    """Counts failures by device, and holds devices that fail where others succeed."""

    def __init__(self, count: Callable[[], int], emit: Emit) -> None:
        self._count, self._emit = count, emit
        self._suspects: dict[int, _Suspect] = {}  # by the number of the trial that failed there
        self._failures: Counter[str] = Counter()  # of trials that ran on another device
        self._left_out: list[str] = []  # a device is listed once for each worker that holds it

    @property
    def num_held(self) -> int:
        """The number of workers that keep a device from trials."""
        return len(self._suspects) + len(self._left_out)

    def should_move(self, record: TrialRecord, hold: Hold | None) -> bool:
        """Return True if a trial that failed is to be tried on another device; its own is then held.

        `hold` holds the worker of the trial; None if its process has ended.
        """
        if suspect := self._suspects.pop(record.index, None):
            suspect.let_go()
        device = record.device
        is_plans_fault = len({*record.failed_on, device}) > 1 or len(record.failed_on) + 1 >= MAX_DEVICES
        if device is None or hold is None or is_plans_fault or not self._leaves_another(device):
            return False
        self._suspects[record.index] = _Suspect(device, hold())
        return True

    def has_scored(self, record: TrialRecord) -> None:
        """Decide on the device on which a trial had failed before it reported a score, if there is one."""
        suspect = self._suspects.pop(record.index, None)
        if suspect is None or suspect.device == record.device:
            if suspect:
                suspect.let_go()
            return
        self._failures[suspect.device] += 1
        if self._failures[suspect.device] < MAX_FAILURES:
            suspect.let_go()
            return
        if suspect.device not in self._left_out:
            text = f"{self._failures[suspect.device]} trials failed on {suspect.device} and ran on other devices"
            self._emit(Message("search", f"warning: {text}: it gets no more trials of this command"))
        self._left_out.append(suspect.device)

    def _leaves_another(self, device: str) -> bool:
        """Return True if another device may run trials while this one is held; let go of a suspect if needed."""
        while len({*self._left_out, *(each.device for each in self._suspects.values()), device}) >= self._count():
            others = [index for index, suspect in self._suspects.items() if suspect.device != device]
            if not others:
                return False
            self._suspects.pop(others[0]).let_go()
        return True


def count_devices(resources: dict[str, float]) -> int:
    """Count the devices of the machines that are now in the cluster and have room for a trial."""
    nodes: list[Node] = [size_of(node) for node in ray.nodes() if node["Alive"]]
    if not resources.get("gpu"):
        return sum(1 for node in nodes if node.fits(resources))
    return sum(min(node.fits(resources), int(node.gpus)) for node in nodes)
