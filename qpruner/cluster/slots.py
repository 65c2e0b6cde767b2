"""What the machines of a cluster can run at once: those that are there, and those that an autoscaler may start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qpruner.errors import UserError


def worker_resources(trial: Mapping[str, float], num_workers: int) -> dict[str, float]:
    """What a worker of so many on one model reserves: what a trial does, but a whole GPU where they exchange gradients,
    which NCCL refuses to do on a shared one."""
    shared = num_workers > 1 and 0 < trial.get("gpu", 0.0) < 1
    return {**trial, "gpu": 1.0} if shared else dict(trial)


@dataclass(frozen=True)
class Node:
    """One machine's CPU cores and GPUs."""

    cpus: float
    gpus: float

    def fits(self, resources: Mapping[str, float]) -> int:
        """Trials of such resources at once; several GPUs of one trial, or shares of one, lie on this machine."""
        cpu, gpu = resources.get("cpu", 0.0), resources.get("gpu", 0.0)
        by_cpu = int(self.cpus // cpu) if cpu else 10**6
        if not gpu:
            return by_cpu
        by_gpu = int(self.gpus // gpu) if gpu >= 1 else int(self.gpus) * int(1 / gpu)
        return min(by_cpu, by_gpu)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True)
class Growth:
    """A cluster as large as its autoscaler may make it.

    Attributes:
        head: The machine that is always there.
        workers: Those that it may start, each type as often as it may have it.
        max_workers: How many of them there may be at once.
    """

    head: Node
    workers: tuple[Node, ...]
    max_workers: int

    def fits(self, resources: Mapping[str, float]) -> int:
        """Tasks of such resources at once."""
        by_worker = sorted((node.fits(resources) for node in self.workers), reverse=True)
        return self.head.fits(resources) + sum(by_worker[: self.max_workers])


def with_gpus_for(trial: Mapping[str, float | None] | None) -> Slots:
    """A machine that is not here, with the GPUs that a trial asks for, or one, and the cores of all that share it."""
    asked = trial or {}
    gpu = asked.get("gpu") or 1.0
    return Slots((Node((asked.get("cpu") or 1.0) * max(1, int(1 / gpu)), max(1.0, gpu)),))


@dataclass(frozen=True)
class Slots:
    """What the cluster can run at once.

    Attributes:
        nodes: The machines that are there.
        growth: What its autoscaler can make of it; None where there is none.
    """

    nodes: tuple[Node, ...]
    growth: Growth | None = None

    @property
    def gpus(self) -> float:
        """GPUs of the machines that are there."""
        return sum(node.gpus for node in self.nodes)

    @property
    def possible(self) -> tuple[Node, ...]:
        """The machines that are there, and those that may be started."""
        return (*self.nodes, *self.growth.workers) if self.growth else self.nodes

    @property
    def largest(self) -> Node:
        """The possible machine with the most GPUs, and of those the most cores."""
        return max(self.possible, key=lambda node: (node.gpus, node.cpus))

    def fits(self, resources: Mapping[str, float]) -> int:
        """Tasks of such resources at once on what is there."""
        return sum(node.fits(resources) for node in self.nodes)

    def at_most(self, resources: Mapping[str, float]) -> int:
        """Tasks of such resources at once when the autoscaler has started what helps them."""
        there = self.fits(resources)
        return max(there, self.growth.fits(resources)) if self.growth else there

    def resources_per_trial(self, asked: Mapping[str, float | None] | None) -> dict[str, float]:
        """What one trial reserves: what was asked for, else a GPU where there is or may be one, else a core."""
        automatic = {"cpu": 1.0, "gpu": 1.0} if self.largest.gpus >= 1 else {"cpu": 1.0}
        given = {name: amount for name, amount in (asked or {}).items() if amount is not None}
        return {name: amount for name, amount in (automatic | given).items() if amount > 0}

    def cores_each(self, num_tasks: int) -> float:
        """The most cores that so many tasks can have each, at once and every task on one machine."""
        most = max((int(node.cpus) for node in self.possible), default=0)
        each = next((cores for cores in range(most, 1, -1) if self.at_most({"cpu": cores}) >= num_tasks), 1)
        return float(each)

    def concurrent(self, resources: Mapping[str, float], limit: int | None) -> int:
        """Trials that may be in flight, at most `limit`.

        Raises:
            UserError: If not even one will ever fit.
        """
        most = self.at_most(resources)
        if most < 1:
            number, larger = f"{len(self.nodes)}", "a larger machine (`ray status` lists those that have joined)"
            if self.growth:
                number += " and of those that the autoscaler may start"
                larger = "a larger type to the cluster file"
            raise UserError(
                f"`search.resources_per_trial` asks for {dict(resources)} on one machine, but the largest of {number} "
                f"has {self.largest}: ask for less, or add {larger}"
            )
        return min(most, limit) if limit else most
