"""The machines on which a run works, and what its tasks reserve on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from qpruner.cluster.connect import Cluster, connect, disconnect
from qpruner.cluster.executor import ClusterExecutor, GpuTime, LocalExecutor, ModelExecutor
from qpruner.cluster.node_check import packed_check, versions
from qpruner.cluster.slots import Slots, local_slots, worker_resources
from qpruner.config.schema import RunConfig
from qpruner.runs.run_dir import RunDir

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass
class Machines:
    """This machine, or the nodes of a Ray cluster; Ray is connected when it is first needed."""

    config: RunConfig
    run_dir: RunDir
    address: str | None = None  # of the Ray cluster to join
    assumed: Slots | None = None  # planned for instead of this machine
    gpu_time: GpuTime = field(default_factory=GpuTime)  # GPU seconds used outside the trials

    @cached_property
    def cluster(self) -> Cluster:
        """The Ray cluster at `address`, or a new one on this machine; connects on first use."""
        return connect(self.address)

    @property
    def slots(self) -> Slots:
        """The room for trials (slots) on the machines that the cluster has now."""
        return self.cluster.slots()

    @property
    def known_slots(self) -> Slots:
        """The room for trials at `address`, on the machine that `check --gpu` assumes, or here.

        Reading it does not start Ray.
        """
        return self.slots if self.address else self.assumed or local_slots()

    @cached_property
    def trial_resources(self) -> dict[str, float]:
        """The resources that Ray reserves for one trial."""
        requested = self.config.search.resources_per_trial
        slots = self.known_slots
        resources = slots.resources_per_trial(requested.model_dump() if requested else None)
        slots.concurrent(resources, None)  # raises an error if no machine has them
        return resources

    @property
    def on_gpu(self) -> bool:
        """Whether trials run on GPUs."""
        return bool(self.trial_resources.get("gpu"))

    def gpus_held(self, num_workers: int = 1) -> float:
        """Return how many GPUs a task with this many workers reserves."""
        return num_workers * worker_resources(self.trial_resources, num_workers).get("gpu", 0.0)

    def task_resources(self, num_tasks: int, num_workers: int = 1) -> tuple[dict[str, float], int]:
        """Return a worker's resources, and how many of `num_tasks` run at once.

        Without GPUs tasks share the cores.
        """
        resources = worker_resources(self.trial_resources, num_workers)
        slots = self.slots
        room = slots.at_most(resources)
        limit = self.config.search.max_concurrent
        if limit:
            room = min(room, limit)
        # While every machine is away, the tasks run one after the other.
        concurrent = min(max(room // num_workers, 1), num_tasks)
        if concurrent and not resources.get("gpu"):
            resources = {"cpu": slots.cores_each(concurrent * num_workers)}
        return resources, concurrent

    @cached_property
    def executor(self) -> ModelExecutor:
        """The executor of work on a single model.

        It is an actor on the cluster at `address`, otherwise this process.

        The actor reserves one GPU, or all GPUs of a machine if `model.device_map` is auto. Without
        GPUs it reserves all cores of a machine.
        """
        is_spread = self.config.model.device_map == "auto"
        if not self.address:
            present = local_slots().gpus
            return LocalExecutor(present if is_spread else min(present, 1.0), self.gpu_time)

        resources = dict(self.trial_resources)
        largest = self.slots.largest
        if not self.on_gpu:
            resources = {"cpu": float(int(largest.cpus))}
        elif is_spread:
            resources["gpu"] = largest.gpus
        else:
            resources["gpu"] = max(1.0, resources["gpu"])
        return ClusterExecutor(resources, self.gpu_time, self.check_node)

    @cached_property
    def check_node(self) -> bytes:
        """A pickled function that checks a node.

        Every process on the cluster calls this function first.
        """
        if not self.address:
            return packed_check({}, None)
        return packed_check(versions(), self.run_dir)

    def run_tasks(
        self,
        function: Callable[[Job], Result],
        jobs: Sequence[Job],
        resources: dict[str, float],
        concurrent: int,
        own_process: bool = False,
        **more: Any,
    ) -> Iterator[tuple[int, Result]]:
        """Run `function(job)` for all jobs on nodes that pass `check_node`.

        Yield position and result of each job.
        """
        from qpruner.cluster.tasks import run_tasks

        return run_tasks(
            function, jobs, resources, concurrent, own_process, self.check_node, **more
        )

    def close(self) -> None:
        """Disconnect from the cluster, unless the caller had connected before."""
        if "cluster" in self.__dict__ and not self.cluster.was_joined:
            disconnect()
