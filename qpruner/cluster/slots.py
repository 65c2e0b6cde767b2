"""Counts the tasks that fit on the present machines, and on those that an autoscaler may start."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from joblib import cpu_count

from qpruner.errors import UserError
from qpruner.runs.events import Emit, Message, SlotsFound
from qpruner.wording import counted

Resources = Mapping[str, float]
"""Numbers of `cpu` cores and of `gpu`s; one that is missing is 0."""
LOOK_SECONDS = 2.0  # time between two counts of the machines during a search


@dataclass(frozen=True)
class Node:
    """The CPU cores and GPUs of one machine."""

    cpus: float
    gpus: float

    def fits(self, resources: Resources) -> int:
        """Count the trials with these resources that fit on this machine at once."""
        cpu = resources.get("cpu", 0.0)
        gpu = resources.get("gpu", 0.0)
        by_cpu = int(self.cpus / cpu + 1e-6) if cpu else 10**6
        if not gpu:
            return by_cpu
        by_gpu = int(self.gpus // gpu) if gpu >= 1 else int(self.gpus) * int(1 / gpu)
        return min(by_cpu, by_gpu)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def size_of(node: Mapping[str, Any]) -> Node:
    """Return the CPUs and GPUs of an entry of `ray.nodes()`."""
    resources = node["Resources"]
    return Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


@dataclass(frozen=True)
class Slots:
    """The present machines of a cluster, and the machines that its autoscaler may start.

    A slot is room for one trial or task.
    """

    nodes: tuple[Node, ...]
    head: Node = Node(0, 0)  # of a cluster with an autoscaler; it is also one of `nodes`
    workers: tuple[Node, ...] = ()
    """All machines that the autoscaler may start; each type is repeated up to its own limit."""
    max_workers: int = 0  # how many of `workers` may run at once

    @property
    def gpus(self) -> float:
        """Count the GPUs of the present machines."""
        return sum(node.gpus for node in self.nodes)

    @property
    def largest(self) -> Node:
        """Return the machine with the most GPUs and, among those, the most cores.

        Machines that may be started count, too.
        """
        return max((*self.nodes, *self.workers), key=lambda node: (node.gpus, node.cpus))

    def fits(self, resources: Resources) -> int:
        """Count the tasks that fit at once on the present machines."""
        return sum(node.fits(resources) for node in self.nodes)

    def at_most(self, resources: Resources) -> int:
        """Count the tasks that fit at once on as many machines as the autoscaler may start."""
        by_worker = sorted((node.fits(resources) for node in self.workers), reverse=True)
        started = by_worker[: self.max_workers]
        grown = self.head.fits(resources) + sum(started)
        return max(self.fits(resources), grown)

    def resources_per_trial(self, requested: Mapping[str, float | None] | None) -> dict[str, float]:
        """Return the resources of one trial, with defaults for those that were not requested.

        The default is one core, and one GPU if any machine has one.
        """
        resources = {"cpu": 1.0}
        if self.largest.gpus >= 1:
            resources["gpu"] = 1.0
        for name, amount in (requested or {}).items():
            if amount is not None:
                resources[name] = amount
        return {name: amount for name, amount in resources.items() if amount > 0}

    def cores_each(self, num_tasks: int) -> float:
        """Return the largest number of cores per task at which `num_tasks` tasks fit at once.

        It is at least 1.
        """
        most = max((int(node.cpus) for node in (*self.nodes, *self.workers)), default=0)
        for cores in range(most, 1, -1):
            if self.at_most({"cpu": cores}) >= num_tasks:
                return float(cores)
        return 1.0

    def concurrent(self, resources: Resources, limit: int | None) -> int:
        """Return how many trials may be in flight (see `Room`), at most `limit`.

        Raises:
            UserError: If no machine can ever run a trial.
        """
        most = self.at_most(resources)
        if most < 1:
            machines = counted(len(self.nodes), "machine")
            if self.workers:
                machines += " and of those that the autoscaler may start"
            raise UserError(
                f"`search.resources_per_trial` asks for {dict(resources)} on one machine, but the "
                f"largest of {machines} has {self.largest}: ask for less, or add a larger machine"
            )
        return min(most, limit or most)


def num_cores() -> int:
    """Count the cores that this process may use.

    Both its CPU affinity and the quota of its container limit them.
    """
    return int(cpu_count())


def local_slots() -> Slots:
    """Return the slots of this machine, without starting Ray."""
    import torch

    machine = Node(cpus=float(num_cores()), gpus=float(torch.cuda.device_count()))
    return Slots((machine,))


def assumed_slots(trial: Mapping[str, float | None] | None) -> Slots:
    """Return an assumed machine for planning a run.

    It has room for one trial or, if trials share a GPU, for as many as share one.
    """
    requested = trial or {}
    cpu = requested.get("cpu") or 1.0
    gpu = requested.get("gpu") or 1.0
    num_trials = max(1, int(1 / gpu))
    machine = Node(cpus=cpu * num_trials, gpus=max(1.0, gpu))
    return Slots((machine,))


def worker_resources(trial: Resources, num_workers: int) -> dict[str, float]:
    """Return the resources of each of the workers that train one model.

    Several workers need a whole GPU each, because NCCL does.
    """
    resources = dict(trial)
    if num_workers > 1 and 0 < trial.get("gpu", 0.0) < 1:
        resources["gpu"] = 1.0
    return resources


@dataclass
class Room:
    """Counts the trials that may be in flight while machines join and leave.

    A trial in flight runs, or waits for a machine. Waiting trials make the autoscaler start
    machines. Ray's `request_resources` would do so, too, but outlive a killed driver.
    """

    count_slots: Callable[[], Slots]
    resources: Resources  # of one trial
    limit: int | None
    emit: Emit
    num_slots: int | None = None  # at the last look
    room: int = 0  # at the last look
    next_look: float = 0.0

    def __call__(self, num_held: int) -> int:
        """Return how many trials may be in flight while `num_held` slots are held.

        The machines are counted again after `LOOK_SECONDS`, and a change of slots is emitted.
        """
        now = time.monotonic()
        limit = self.limit or 10**6
        if now >= self.next_look:
            self.next_look = now + LOOK_SECONDS
            slots = self.count_slots()
            self.room = slots.at_most(self.resources)
            num_slots = min(slots.fits(self.resources), limit)
            if num_slots != self.num_slots:
                self.num_slots = num_slots
                self.emit(SlotsFound(num_slots))
                if not self.room:
                    text = "warning: no machine of the cluster can run a trial: add a machine"
                    self.emit(Message("search", text))
        return max(0, min(self.room - num_held, limit))
