"""Runs work on one model: in this process, or in an actor on a node of the cluster.

A stage passes a module-level function with plain data bound to it (`functools.partial`). What one piece of work leaves
in the `ModelCache` is there for the next: the model that prune cut is not loaded again to be scored.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qpruner.models.loading import OnWork, ignore_progress, load_dense
from qpruner.models.memory import release
from qpruner.runs.events import Emit, Event, Message
from qpruner.runs.storage import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUIET_SECONDS = 20.0
"""A worker process takes a few seconds to start; one that takes longer waits for a machine, and the user is told."""

Result = TypeVar("Result")


@dataclass
class GpuTime:
    """Adds up the GPU seconds that work has reserved, whether it kept the GPUs busy or not."""

    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Add what was held."""
        self.seconds += seconds

    @contextmanager
    def held(self, gpus: float) -> Iterator[None]:
        """Count this many GPUs while the block runs, however it ends."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(gpus * (time.monotonic() - started))


class ModelCache:
    """Keeps the pruned model of this process, once it was cut or loaded here."""

    _pruned: PreTrainedModel | None = None

    def keep(self, pruned: PreTrainedModel) -> None:
        """Keep the pruned model for the next piece of work."""
        self._pruned = pruned

    def clear(self) -> None:
        """Drop the model, to free its memory."""
        self._pruned = None
        release()

    def pruned_model(self, checkpoint: Path, dtype: str, on_progress: OnWork = ignore_progress) -> PreTrainedModel:
        """Return the pruned model on this process's device; load it if it is not kept."""
        if self._pruned is None:
            self._pruned = load_dense(str(fetch(checkpoint)), dtype, on_progress=on_progress)
        return self._pruned


Work = Callable[[ModelCache, Emit], Result]
"""A partial module-level function of plain data, the cache, and a function that takes events."""


class LocalExecutor:
    """Runs work in this process, on this many GPUs."""

    def __init__(self, gpus: float, gpu_time: GpuTime) -> None:
        self._gpus, self._gpu_time, self._cache = gpus, gpu_time, ModelCache()

    def run(self, work: Work[Result], emit: Emit) -> Result:
        """Run `work` here."""
        with self._gpu_time.held(self._gpus):
            return work(self._cache, emit)

    def close(self) -> None:
        """Free the model's memory."""
        self._cache.clear()


class ClusterExecutor:
    """Runs work in an actor on a node that has the resources; the driver holds no model.

    `gpu_time` gets no seconds that the work waited for a machine; `check_node` is that of `run_tasks`.
    """

    def __init__(self, resources: Mapping[str, float], gpu_time: GpuTime, check_node: bytes) -> None:
        self._resources, self._gpu_time, self._check_node = resources, gpu_time, check_node
        self._actor: Any = None
        self._node: str | None = None

    def run(self, work: Work[Result], emit: Emit) -> Result:
        """Run `work` in the actor, and again in another one when it dies."""
        from ray.exceptions import OutOfMemoryError, RayActorError

        from qpruner.cluster.tasks import DeathCounter

        deaths = DeathCounter()
        while True:
            try:
                self._start_actor(emit)
                with self._gpu_time.held(self._resources.get("gpu", 0.0)):
                    return self._result(work, emit)
            except (OutOfMemoryError, RayActorError) as error:
                self.close()
                line = deaths.count(0, self._node, error)
                emit(Message("cluster", f"a worker died, its work is run again: {line}"))

    def _start_actor(self, emit: Emit) -> None:
        import ray

        if self._actor is not None:
            return

        class Worker:  # nested, so that it is pickled whole, as in `checked`
            def place(self) -> Any:
                return ray.get_runtime_context().get_node_id()

            def run(self, work: bytes) -> Iterator[Any]:
                yield from ray.cloudpickle.loads(work)()

        options = {"num_cpus": self._resources.get("cpu", 0.0), "num_gpus": self._resources.get("gpu", 0.0)}
        self._actor, self._node = ray.remote(Worker).options(**options).remote(), None
        place = self._actor.place.remote()
        if not ray.wait([place], timeout=QUIET_SECONDS)[0]:
            emit(Message("cluster", f"waiting for a machine with room for {dict(self._resources)}"))
        self._node = ray.get(place)

    def _result(self, work: Work[Result], emit: Emit) -> Result:
        """Emit the worker's events; return its result."""
        import ray
        from ray.exceptions import RayTaskError

        from qpruner.cluster.tasks import checked, original_error

        running = checked(self._check_node, partial(_stream, work, int(self._resources.get("cpu", 1.0))))
        for reference in self._actor.run.options(num_returns="streaming").remote(ray.cloudpickle.dumps(running)):
            try:
                answer = ray.get(reference)
            except RayTaskError as error:
                raise original_error(error) from error
            if not isinstance(answer, tuple):
                emit(answer)
        result: Result = answer[0]  # its last answer
        return result

    def close(self) -> None:
        """End the actor."""
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None


ModelExecutor = LocalExecutor | ClusterExecutor
"""Runs work on one model; events and errors arrive as they are."""

_cache = ModelCache()
"""That of an actor's process."""


def _stream(work: Work[Any], threads: int) -> Iterator[Event | tuple[Any]]:
    """Run work in a thread, so that its events leave as they happen; yield them, then its result as a tuple of one."""
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, initializer=limit_threads, initargs=(threads,)) as thread:
        outcome = thread.submit(work, _cache, events.put)
        outcome.add_done_callback(lambda _: events.put(None))
        while (event := events.get()) is not None:
            yield event
    yield (outcome.result(),)


def limit_threads(threads: int) -> None:
    """Give torch this many threads on a CPU."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
