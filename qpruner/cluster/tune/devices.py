"""Decides which failed trials are tried on another device, and which devices get no more trials.

A device is a GPU, or a machine if trials use no GPU. A failure may be the plan's fault (it is too
large for any device) or the device's (it is smaller than others, another program uses its memory,
or it is broken). Only other devices can tell, so a device where a trial has failed gets no trials
until that trial has reported a score from another device, or the plan is blamed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain

import ray

from qpruner.cluster.slots import size_of
from qpruner.cluster.tune.callbacks import Hold, Holding
from qpruner.errors import StageError
from qpruner.runs.events import Emit, Message
from qpruner.runs.records import TrialRecord

MAX_FAILURES = 2
"""After so many trials that failed on a device and ran on another one, it gets no more trials."""
MAX_TRIES = 3
"""Failures of one trial after which its plan is blamed.

A failure counts if it was on a device on which no other trial has failed that then ran elsewhere,
or if the trial had failed on that device before.
"""


@dataclass
class _Held:
    """A device that gets no trials, its node, and the functions that end this (see `Holding`)."""

    device: str
    holding: Holding


class Devices:
    """Counts failures by device, and holds devices that fail where others succeed.

    `count` returns the number of devices of each node that is in the cluster now, by the id of the
    node.
    """

    def __init__(self, count: Callable[[], Mapping[str, int]], emit: Emit) -> None:
        self._count = count
        self._emit = emit
        # By the number of the trial that failed.
        self._suspects: defaultdict[int, list[_Held]] = defaultdict(list)
        self._failures: Counter[str] = Counter()  # of trials that ran on another device
        self._left_out: list[_Held] = []  # several of one device, if trials share it

    @property
    def num_held(self) -> int:
        """The number of workers that keep a device from trials."""
        return len(self._left_out) + sum(map(len, self._suspects.values()))

    def should_move(self, record: TrialRecord, hold: Hold) -> bool:
        """Return True if a failed trial is to be tried on another device; its own is then held."""
        tried = [device for device in (*record.failed_on, record.device) if device is not None]
        num_bad = sum(1 for device in {*tried} if self._failures[device])
        is_plan_to_blame = len(tried) - num_bad >= MAX_TRIES
        if record.device is None or is_plan_to_blame or not self._leaves_another(record):
            self._release(record.index)
            return False

        holding = hold()
        if holding is None:
            return False
        self._suspects[record.index].append(_Held(record.device, holding))
        return True

    def has_scored(self, record: TrialRecord) -> None:
        """Decide on the devices on which a trial had failed before it reported this score."""
        for suspect in self._suspects.pop(record.index, []):
            device = suspect.device
            if device == record.device:
                suspect.holding.let_go()
                continue
            self._failures[device] += 1
            num_failures = self._failures[device]
            if num_failures < MAX_FAILURES:
                suspect.holding.let_go()
                continue

            if all(held.device != device for held in self._left_out):
                text = (
                    f"warning: {num_failures} trials failed on {device} and ran on other devices: "
                    "it gets no more trials of this command"
                )
                self._emit(Message("search", text))
            suspect.holding.keep()
            self._left_out.append(suspect)

    def look(self) -> None:
        """Let go of the devices of nodes that have left.

        Let go of suspects, too, if no other device is left.

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
        self.end_session()  # lets go of all suspects
        left_out = self._names()
        if len(left_out) == total:
            raise StageError(
                "search",
                f"no other device is left than {', '.join(sorted(left_out))}, "
                "where trials failed that ran elsewhere",
                "add a machine, or repair these and repeat the command: it resumes",
            )

    def end_session(self) -> None:
        """Let go of all suspects, because no trial is left that could tell."""
        for index in list(self._suspects):
            self._release(index)

    def end_search(self) -> None:
        """Let go of all devices."""
        self.end_session()
        while self._left_out:
            self._left_out.pop().holding.let_go()

    def _names(self) -> set[str]:
        """Return the devices that are held."""
        all_held = [*self._left_out, *chain.from_iterable(self._suspects.values())]
        return {held.device for held in all_held}

    def _release(self, index: int) -> None:
        """Let go of the devices on which a trial has failed."""
        for held in self._suspects.pop(index, []):
            held.holding.let_go()

    def _leaves_another(self, record: TrialRecord) -> bool:
        """Return True if another device may run a trial while the trial's own device is held.

        If needed, let go of other suspects for that.
        """
        total = sum(self._count().values())
        tried = {*record.failed_on, record.device}
        while len({*self._names(), record.device}) >= total:
            if not self._free_untried(tried):
                return False
        return True

    def _free_untried(self, tried: Collection[str | None]) -> bool:
        """Let go of one suspect that is none of the `tried` devices; return False without one."""
        for suspects in self._suspects.values():
            for suspect in suspects:
                if suspect.device not in tried:
                    suspects.remove(suspect)
                    suspect.holding.let_go()
                    return True
        return False


def _in_cluster(held: list[_Held], count: Mapping[str, int]) -> list[_Held]:
    """Return the held devices whose node is still in the cluster, and let go of the others.

    Ray would hold another device for those.
    """
    present = []
    for device in held:
        if device.holding.node in count:
            present.append(device)
        else:
            device.holding.let_go()
    return present


def count_devices(resources: Mapping[str, float]) -> dict[str, int]:
    """Count the devices of each node, by the id of the node.

    Only nodes count that are in the cluster now and have room for a trial.
    """
    num_devices = {}
    for node in ray.nodes():
        size = size_of(node)
        room = size.fits(resources)
        if node["Alive"] and room:
            most = int(size.gpus) if resources.get("gpu") else 1
            num_devices[node["NodeID"]] = min(room, most)
    return num_devices
