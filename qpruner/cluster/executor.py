"""Runs functions on one model: in this process, or in an actor on a node of the cluster.

The function is a module-level one with plain data bound to it (`functools.partial`). A `ModelCache` keeps the last
model from one function to the next, so that stage sensitivity need not load the model that stage prune has just cut.
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
"""Time for a worker process to start; after it the user is told that the work waits for a machine."""

Result = TypeVar("Result")


@dataclass
class GpuTime:
    """Adds up the seconds for which GPUs were reserved, busy or idle."""

    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Add GPU seconds."""
        self.seconds += seconds

    @contextmanager
    def held(self, gpus: float) -> Iterator[None]:
        """Add the seconds of the `with` block times the number of GPUs, also if the block raises an error."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(gpus * (time.monotonic() - started))


class ModelCache:
    """Keeps one model in the memory of this process: the base model or a cut of it."""

    _model: PreTrainedModel | None = None
    _folder: Path | None = None

    def keep(self, folder: Path, model: PreTrainedModel) -> None:
        """Keep a model that was saved in this folder for the next function."""
        self._folder, self._model = folder, model

    def clear(self) -> None:
        """Drop the model and free its memory."""
        self._folder = self._model = None
        release()

    def model(self, folder: Path, dtype: str, on_progress: OnWork = ignore_progress) -> PreTrainedModel:
        """Return the model that was saved in this folder: the kept one, or loaded to the device of this process."""
        if self._model is None or self._folder != folder:
            self.clear()
            self.keep(folder, load_dense(str(fetch(folder)), dtype, on_progress=on_progress))
        return self._model


Work = Callable[[ModelCache, Emit], Result]
"""A function to run: it takes the cache of its process, and a function that receives events."""


class LocalExecutor:
    """Runs work in this process, which holds `gpus` GPUs."""

    def __init__(self, gpus: float, gpu_time: GpuTime) -> None:
        self._gpus, self._gpu_time, self._cache = gpus, gpu_time, ModelCache()

    def run(self, work: Work[Result], emit: Emit) -> Result:
        """Run the work in this process and return its result."""
        with self._gpu_time.held(self._gpus):
            return work(self._cache, emit)

    def close(self) -> None:
        """Free the memory of the model."""
        self._cache.clear()


class ClusterExecutor:
    """Runs work in an actor that reserves `resources` on a node; this process, the driver, holds no model.

    `gpu_time` does not count the time of waiting for a machine. For `check_node` see `run_tasks`.
    """

    def __init__(self, resources: Mapping[str, float], gpu_time: GpuTime, check_node: bytes) -> None:
        self._resources, self._gpu_time, self._check_node = resources, gpu_time, check_node
        self._actor: Any = None
        self._node: str | None = None

    def run(self, work: Work[Result], emit: Emit) -> Result:
        """Run the work in the actor and return its result; run it again in a new actor if the actor dies."""
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
                emit(Message("cluster", f"a worker died, its work starts again: {line}"))

    def _start_actor(self, emit: Emit) -> None:
        """Start the actor if there is none, and wait until it runs on a node."""
        import ray

        if self._actor is not None:
            return

        class Worker:  # nested, so that its code is pickled with it, as in `checked`
            def node_id(self) -> Any:
                return ray.get_runtime_context().get_node_id()

            def run(self, work: bytes) -> Iterator[Any]:
                yield from ray.cloudpickle.loads(work)()

        options = {"num_cpus": self._resources.get("cpu", 0.0), "num_gpus": self._resources.get("gpu", 0.0)}
        self._actor, self._node = ray.remote(Worker).options(**options).remote(), None
        node_id = self._actor.node_id.remote()
        if not ray.wait([node_id], timeout=QUIET_SECONDS)[0]:
            emit(Message("cluster", f"waiting for a machine with room for {dict(self._resources)}"))
        self._node = ray.get(node_id)

    def _result(self, work: Work[Result], emit: Emit) -> Result:
        """Run the work in the actor: emit its events, return its result."""
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
        result: Result = answer[0]  # the last answer
        return result

    def close(self) -> None:
        """End the actor."""
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None


ModelExecutor = LocalExecutor | ClusterExecutor
"""Runs work on one model, and passes on its events and errors unchanged."""

_cache = ModelCache()
"""The cache of an actor's process."""


def _stream(work: Work[Any], torch_threads: int) -> Iterator[Event | tuple[Any]]:
    """Run the work in another thread; yield each event at once, and at the end the result as a tuple of one item."""
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, initializer=limit_threads, initargs=(torch_threads,)) as thread:
        outcome = thread.submit(work, _cache, events.put)
        outcome.add_done_callback(lambda _: events.put(None))
        while (event := events.get()) is not None:
            yield event
    yield (outcome.result(),)


def limit_threads(threads: int) -> None:
    """Limit torch to this many threads if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
