"""Runs functions on one model: in this process, or on a node of the cluster.

The function is a module-level one with plain data bound to it (`functools.partial`).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from qpruner.cluster.slots import Resources
from qpruner.models.memory import limit_threads, release
from qpruner.runs.events import Emit, Event

Result = TypeVar("Result")


@dataclass
class GpuTime:
    """Adds up GPU seconds: those of all reserved GPUs, whether they were busy or idle."""

    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Add GPU seconds."""
        self.seconds += seconds


Work = Callable[[Emit], Result]
"""A function to run; it takes a function that receives events."""


@dataclass(frozen=True)
class LocalExecutor:
    """Runs work in this process, which holds `gpus` GPUs."""

    gpus: float
    gpu_time: GpuTime

    def run(self, work: Work[Result], emit: Emit) -> Result:
        """Run the work in this process, return its result and free its memory."""
        started = time.monotonic()
        try:
            return work(emit)
        finally:
            self.gpu_time.add(self.gpus * (time.monotonic() - started))
            release()


@dataclass(frozen=True)
class ClusterExecutor:
    """Runs each piece of work in a new process on a node of the cluster (see `run_tasks`).

    This process, the driver, holds no model.
    """

    resources: Resources
    gpu_time: GpuTime
    check_node: bytes  # from `packed_check`

    def run(self, work: Work[Result], emit: Emit) -> Result:
        """Run the work on a node and return its result.

        If the process dies, the work runs again in a new one.
        """
        from qpruner.cluster.tasks import run_tasks

        finished_jobs = run_tasks(
            partial(run_streamed, int(self.resources.get("cpu", 1.0))),
            jobs=[work],
            resources=self.resources,
            max_concurrent=1,
            own_process=True,
            check_node=self.check_node,
            on_held=self.gpu_time.add,
            on_event=emit,
        )
        result: Result
        [(_, result)] = finished_jobs
        return result


ModelExecutor = LocalExecutor | ClusterExecutor
"""Runs work on one model, and passes on its events and errors unchanged."""


def run_streamed(torch_threads: int, work: Work[Result]) -> Any:
    """Run work in another thread, as a job for `run_tasks`.

    Each event is yielded as soon as it is emitted; the generator returns the result. Without a GPU
    torch may use so many threads.
    """
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, initializer=limit_threads, initargs=(torch_threads,)) as thread:
        outcome = thread.submit(work, events.put)
        outcome.add_done_callback(lambda _: events.put(None))
        while (event := events.get()) is not None:
            yield event
    return outcome.result()
