"""Ray outside Tune: starting or joining a cluster, and running stage work as tasks on its nodes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qpruner.errors import UserError

# Set before Ray is imported: no usage report leaves the machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

Result = TypeVar("Result")

OBJECT_STORE_BYTES = 200 * 1024**2
"""Weights travel through the run folder, so Ray's shared memory stays small on a single machine."""


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


@dataclass(frozen=True)
class Slots:
    """What the cluster can run at once."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPU cores of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def resources_per_trial(self, asked: Mapping[str, float | None] | None) -> dict[str, float]:
        """What one trial reserves: what was asked for, else a GPU where there is one, else a core."""
        automatic = {"cpu": 1.0, "gpu": 1.0} if self.gpus >= 1 else {"cpu": 1.0}
        given = {name: amount for name, amount in (asked or {}).items() if amount is not None}
        return {name: amount for name, amount in (automatic | given).items() if amount > 0}

    def concurrent(self, resources: dict[str, float], limit: int | None) -> int:
        """Trials that fit at once, at most `limit`.

        Raises:
            UserError: If not even one fits.
        """
        fits = sum(node.fits(resources) for node in self.nodes)
        if fits < 1:
            has = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in self.nodes)
            raise UserError(
                f"`search.resources_per_trial` asks for {resources} on one machine, but the cluster's have {has}: ask "
                "for less"
            )
        return min(fits, limit) if limit else fits


def local_slots() -> Slots:
    """This machine's slots, without starting Ray."""
    import torch

    return Slots((Node(float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())),))


def connect(address: str | None) -> Slots:
    """Join the cluster at `address`, or start Ray on this machine, on loopback; returns its slots."""
    import ray

    environment = {"env_vars": {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}}
    if not ray.is_initialized():
        if address:
            _check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=OBJECT_STORE_BYTES,
                runtime_env=environment,
                _node_ip_address="127.0.0.1",
            )
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Slots(tuple(Node(float(has.get("CPU", 0.0)), float(has.get("GPU", 0.0))) for has in alive))


def _check_reachable(address: str, seconds: float = 5.0) -> None:
    """Refuse an address that nothing listens at; Ray itself would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:  # `auto` and `local` are Ray's own words
        return
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({error}); start one with `ray start --head` or "
            "`ray up`, or leave --address out"
        ) from error


def disconnect() -> None:
    """Leave the cluster; a local one ends."""
    import ray

    ray.shutdown()


def run_tasks(
    function: Callable[[Any], Result],
    jobs: Sequence[Any],
    resources: dict[str, float],
    max_concurrent: int,
    fresh: bool,
    on_tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Result]]:
    """Run `function(job)` for every job in worker processes.

    Args:
        function: A module-level function.
        jobs: Its arguments.
        resources: Ray resources of one job.
        max_concurrent: Jobs in flight.
        fresh: Give every job a process that ends with it, so that its memory can be measured.
        on_tick: Called about once a second while jobs run.

    Yields:
        Position of the job and its result, as they finish. An error of a job is raised as it was.
    """
    import ray
    from ray.exceptions import RayTaskError

    remote = ray.remote(
        num_cpus=resources.get("cpu", 1.0),
        num_gpus=resources.get("gpu", 0.0),
        max_calls=1 if fresh else 0,
        max_retries=0,
    )(function)
    waiting = list(enumerate(jobs))
    running: dict[Any, int] = {}
    while waiting or running:
        while waiting and len(running) < max_concurrent:
            position, job = waiting.pop(0)
            running[remote.remote(job)] = position
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        on_tick()
        for reference in done:
            position = running.pop(reference)
            try:
                yield position, ray.get(reference)
            except RayTaskError as error:
                raise error.cause from error
