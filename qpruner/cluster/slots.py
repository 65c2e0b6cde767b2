"""How many trials or tasks fit on the machines that are there, and on those that an autoscaler may start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qpruner.errors import UserError
from qpruner.runs.events import Emit, Message, SlotsFound

LOOK_SECONDS = 2.0
"""How often a search looks for machines that came or went."""


@dataclass(frozen=True)
class Node:
    """The CPU cores and GPUs of one machine."""

    cpus: float
    gpus: float

    def fits(self, resources: Mapping[str, float]) -> int:
        """Count the trials that fit at once; all GPUs of a trial, or its share of one, are on this machine."""
        cpu, gpu = resources.get("cpu", 0.0), resources.get("gpu", 0.0)
        by_cpu = int(self.cpus // cpu) if cpu else 10**6
        if not gpu:
            return by_cpu
        by_gpu = int(self.gpus // gpu) if gpu >= 1 else int(self.gpus) * int(1 / gpu)
        return min(by_cpu, by_gpu)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def size_of(node: Mapping[str, Any]) -> Node:
    """Return the CPUs and GPUs that Ray counts on one of `ray.nodes()`."""
    resources = node["Resources"]
    return Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


@dataclass(frozen=True)
class Slots:
    """The machines that are there, and what an autoscaler may start."""

    nodes: tuple[Node, ...]
    head: Node = Node(0, 0)  # of an autoscaler's cluster: it stays when workers go
    workers: tuple[Node, ...] = ()  # that the autoscaler may start, each type as often as it is allowed
    max_workers: int = 0  # of them at once

    @property
    def gpus(self) -> float:
        """Count the GPUs that are there."""
        return sum(node.gpus for node in self.nodes)

    @property
    def largest(self) -> Node:
        """Return the machine, there or possible, with the most GPUs, and of those the most cores."""
        return max((*self.nodes, *self.workers), key=lambda node: (node.gpus, node.cpus))

    def fits(self, resources: Mapping[str, float]) -> int:
        """Count the tasks that fit at once on the machines that are there."""
        return sum(node.fits(resources) for node in self.nodes)

    def at_most(self, resources: Mapping[str, float]) -> int:
        """Count the tasks that fit at once when the autoscaler has started what it may."""
        by_worker = sorted((node.fits(resources) for node in self.workers), reverse=True)[: self.max_workers]
        return max(self.fits(resources), self.head.fits(resources) + sum(by_worker) if by_worker else 0)

    def resources_per_trial(self, asked: Mapping[str, float | None] | None) -> dict[str, float]:
        """Return what one trial reserves: what was asked for, else a GPU where there may be one, else a core."""
        automatic = {"cpu": 1.0, "gpu": 1.0} if self.largest.gpus >= 1 else {"cpu": 1.0}
        given = {name: amount for name, amount in (asked or {}).items() if amount is not None}
        return {name: amount for name, amount in (automatic | given).items() if amount > 0}

    def cores_each(self, num_tasks: int) -> float:
        """Return the most cores that this many tasks can have each, all at once, each task on one machine."""
        most = max((int(node.cpus) for node in (*self.nodes, *self.workers)), default=0)
        each = next((cores for cores in range(most, 1, -1) if self.at_most({"cpu": cores}) >= num_tasks), 1)
        return float(each)

    def concurrent(self, resources: Mapping[str, float], limit: int | None) -> int:
        """Return how many trials may be in flight, at most `limit`.

        Raises:
            UserError: If not even one will ever fit.
        """
        most = self.at_most(resources)
        if most < 1:
            number, larger = f"{len(self.nodes)}", "a larger machine (`ray status` lists those that have joined)"
            if self.workers:
                number += " and of those that the autoscaler may start"
                larger = "a larger type to the cluster file"
            raise UserError(
                f"`search.resources_per_trial` asks for {dict(resources)} on one machine, but the largest of {number} "
                f"has {self.largest}: ask for less, or add {larger}"
            )
        return min(most, limit or most)


def num_cores() -> int:
    """Count the cores that this process may use; macOS does not limit them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_slots() -> Slots:
    """Return this machine's slots, without starting Ray."""
    import torch

    return Slots((Node(float(num_cores()), float(torch.cuda.device_count())),))


def with_gpus_for(trial: Mapping[str, float | None] | None) -> Slots:
    """Return a machine with the GPUs that a trial asks for, or one, and the cores of all trials that share it."""
    asked = trial or {}
    gpu = asked.get("gpu") or 1.0
    return Slots((Node((asked.get("cpu") or 1.0) * max(1, int(1 / gpu)), max(1.0, gpu)),))


def worker_resources(trial: Mapping[str, float], num_workers: int) -> dict[str, float]:
    """Return what each of several workers on one model reserves; NCCL needs a whole GPU to exchange gradients."""
    shared = num_workers > 1 and 0 < trial.get("gpu", 0.0) < 1
    return {**trial, "gpu": 1.0} if shared else dict(trial)


class Room:
    """Tells how many trials may be in flight now, at most `limit`, on a cluster whose machines come and go.

    An autoscaler starts machines for trials that wait, so the room includes machines that it may start. Ray's
    `request_resources` is not used: it would outlive a driver that is killed, and keep unused machines.
    """

    def __init__(
        self, look: Callable[[], Slots], resources: Mapping[str, float], limit: int | None, emit: Emit
    ) -> None:
        self._look, self._resources, self._limit, self._emit = look, resources, limit, emit
        self._num_slots: int | None = None
        self._room, self._next_look = 0, 0.0

    def __call__(self) -> int:
        """Return how many trials may be in flight; looks again every `LOOK_SECONDS` and emits what changed."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            slots, limit = self._look(), self._limit or 10**6
            self._room = min(slots.at_most(self._resources), limit)
            num_slots = min(slots.fits(self._resources), limit)
            if num_slots != self._num_slots:
                self._num_slots = num_slots
                self._emit(SlotsFound(num_slots))
                if not self._room:
                    text = "no machine is there that could run a trial, and none may be started: one has to join"
                    self._emit(Message("search", f"warning: {text}"))
        return self._room
