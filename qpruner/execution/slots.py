"""What the machines of a cluster can run at once."""

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

    def less(self, resources: Mapping[str, float]) -> Node:
        """What is left of it."""
        return Node(self.cpus - resources.get("cpu", 0.0), self.gpus - resources.get("gpu", 0.0))

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True)
class Slots:
    """What the cluster can run at once."""

    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def largest(self) -> Node:
        """The machine with the most GPUs, and of those the most cores."""
        return max(self.nodes, key=lambda node: (node.gpus, node.cpus))

    def fits(self, resources: Mapping[str, float]) -> int:
        """Tasks of such resources at once."""
        return sum(node.fits(resources) for node in self.nodes)

    def less(self, resources: Mapping[str, float]) -> Slots:
        """What is left where something holds such resources."""
        index = next(index for index, node in enumerate(self.nodes) if node.fits(resources))
        return Slots((*self.nodes[:index], self.nodes[index].less(resources), *self.nodes[index + 1 :]))

    def resources_per_trial(self, asked: Mapping[str, float | None] | None) -> dict[str, float]:
        """What one trial reserves: what was asked for, else a GPU where there is one, else a core."""
        automatic = {"cpu": 1.0, "gpu": 1.0} if self.gpus >= 1 else {"cpu": 1.0}
        given = {name: amount for name, amount in (asked or {}).items() if amount is not None}
        return {name: amount for name, amount in (automatic | given).items() if amount > 0}

    def cores_each(self, num_tasks: int) -> float:
        """The most cores that so many tasks can have each, at once and every task on one machine."""
        most = max((int(node.cpus) for node in self.nodes), default=0)
        each = next((cores for cores in range(most, 1, -1) if self.fits({"cpu": cores}) >= num_tasks), 1)
        return float(each)

    def concurrent(self, resources: Mapping[str, float], limit: int | None) -> int:
        """Trials that fit at once, at most `limit`.

        Raises:
            UserError: If not even one fits.
        """
        fits = self.fits(resources)
        if fits < 1:
            raise UserError(
                f"`search.resources_per_trial` asks for {dict(resources)} on one machine, but the largest of "
                f"{len(self.nodes)} has {self.largest}: ask for less"
            )
        return min(fits, limit) if limit else fits
