"""Where the work on one model is done: in this process, or in an actor on a node of the cluster.

A stage names a function and plain data for it. The function runs where the model may lie, and what one piece of work
leaves there is at hand for the next: the model that prune cut is not loaded again to be measured.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qpruner.cluster.cluster import Deaths, told_by
from qpruner.cluster.gpu_time import GpuTime
from qpruner.models.loading import OnLoading, ignore_progress, load_dense
from qpruner.models.memory import release
from qpruner.runs.events import Emit, Event, Message
from qpruner.runs.mirror import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS_UNTOLD = 20.0
"""A worker process takes a few seconds to start; what takes longer waits for an autoscaler, or for somebody's work."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Bench:
    """What work finds at hand: the pruned model, once it was cut or loaded here."""

    def __init__(self) -> None:
        self._pruned: PreTrainedModel | None = None

    def keep(self, pruned: PreTrainedModel) -> None:
        """Leave the pruned model to what comes next."""
        self._pruned = pruned

    def clear(self) -> None:
        """Drop the model, so that another finds room."""
        self._pruned = None
        release()

    def pruned_model(self, checkpoint: Path, dtype: str, told: OnLoading = ignore_progress) -> PreTrainedModel:
        """The pruned model on this process's device; loaded if an earlier session cut it."""
        if self._pruned is None:
            self._pruned = load_dense(str(fetch(checkpoint)), dtype, on_progress=told)
        return self._pruned


Work = Callable[[Job, Bench, Emit], Result]
"""A module-level function of plain data, the bench, and whom to tell of events."""


class Workshop(Protocol):
    """The place where work is done."""

    def do(self, work: Work[Job, Result], job: Job, emit: Emit) -> Result:
        """Run `work` there; its events and errors arrive as they are."""

    def close(self) -> None:
        """Give back memory and resources; the next work opens it again."""


class Here:
    """This process.

    Args:
        gpus: GPUs that its work may use.
        gpu_time: Told of what work holds of them.
    """

    def __init__(self, gpus: float, gpu_time: GpuTime) -> None:
        self._gpus, self._gpu_time = gpus, gpu_time
        self._bench = Bench()

    def do(self, work: Work[Job, Result], job: Job, emit: Emit) -> Result:
        with self._gpu_time.held(self._gpus):
            return work(job, self._bench, emit)

    def close(self) -> None:
        self._bench = Bench()
        release()


class OnCluster:
    """An actor on a node that has the resources; the driver holds no model.

    Args:
        resources: Ray resources of the actor.
        gpu_time: Told of what work holds of GPUs; waiting for a machine holds none.
        check_node: As of `run_tasks`.
    """

    def __init__(self, resources: Mapping[str, float], gpu_time: GpuTime, check_node: bytes) -> None:
        self._resources, self._gpu_time, self._check_node = resources, gpu_time, check_node
        self._actor: Any = None
        self._node: str | None = None

    def do(self, work: Work[Job, Result], job: Job, emit: Emit) -> Result:
        from ray.exceptions import OutOfMemoryError, RayActorError

        deaths = Deaths()
        while True:
            try:
                return self._try(work, job, emit)
            except (OutOfMemoryError, RayActorError) as error:
                self.close()
                line = deaths.count(0, self._node, error)
                emit(Message("cluster", f"a worker died, its work is begun again: {line}"))

    def _try(self, work: Work[Job, Result], job: Job, emit: Emit) -> Result:
        import ray

        if self._actor is None:
            options = {"num_cpus": self._resources.get("cpu", 0.0), "num_gpus": self._resources.get("gpu", 0.0)}
            actor = ray.remote(_checked_worker(self._check_node)).options(**options)
            self._actor = actor.remote(int(self._resources.get("cpu", 1.0)))
            self._node, place = None, self._actor.place.remote()
            if not ray.wait([place], timeout=SECONDS_UNTOLD)[0]:
                emit(Message("cluster", f"waiting for a machine with room for {dict(self._resources)}"))
            self._node = ray.get(place)
        with self._gpu_time.held(self._resources.get("gpu", 0.0)):
            return self._told(work, job, emit)

    def _told(self, work: Work[Job, Result], job: Job, emit: Emit) -> Result:
        """Passes the worker's events on; returns what it ends with."""
        import ray
        from ray import cloudpickle
        from ray.exceptions import RayTaskError

        for reference in self._actor.do.options(num_returns="streaming").remote(cloudpickle.dumps((work, job))):
            try:
                told = ray.get(reference)
            except RayTaskError as error:
                raise told_by(error) from error
            if isinstance(told, _Done):
                result: Result = told.result
                return result
            emit(told)
        raise AssertionError("the last that a worker tells is its result")

    def close(self) -> None:
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None


@dataclass(frozen=True)
class _Done:
    result: Any


def _checked_worker(check_node: bytes) -> type:
    """The actor: a `_Worker` that is unpickled where the machine has been found to be like the driver's.

    A nested class brings itself along; another qpruner there could not even read the job.
    """
    from ray import cloudpickle

    worker = cloudpickle.dumps(_Worker)

    class Worker:
        def __init__(self, threads: int) -> None:
            self._threads = threads
            self._worker: Any = None

        def place(self) -> str:
            """Ray's id of its machine."""
            import ray

            node: str = ray.get_runtime_context().get_node_id()
            return node

        def do(self, packed: bytes) -> Iterator[Any]:
            from ray import cloudpickle

            if self._worker is None:
                cloudpickle.loads(check_node)()
                self._worker = cloudpickle.loads(worker)(self._threads)
            yield from self._worker.do(*cloudpickle.loads(packed))

    return Worker


class _Worker:
    """Work runs in one thread, so that its events leave as they happen."""

    def __init__(self, threads: int) -> None:
        self._bench = Bench()
        self._thread = ThreadPoolExecutor(1, initializer=_limit_threads, initargs=(threads,))

    def do(self, work: Work[Any, Any], job: Any) -> Iterator[Event | _Done]:
        told: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        outcome = self._thread.submit(work, job, self._bench, told.put)
        outcome.add_done_callback(lambda _: told.put(None))
        while (event := told.get()) is not None:
            yield event
        yield _Done(outcome.result())


def _limit_threads(threads: int) -> None:
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
