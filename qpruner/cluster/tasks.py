"""Runs functions as Ray tasks; a task whose worker or node dies is run again."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from qpruner.cluster import ray_private
from qpruner.cluster.node_check import REFUSAL
from qpruner.errors import NodeDiffers, WorkerDied, first_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError, RayActorError)
"""Errors of a worker that died; a group's task ends with the RayActorError of the process that it lost."""
MAX_DEATHS = 3
"""Workers that may die under one job, on machines that stay and without progress, before that is an error."""
ANSWER_SECONDS = 2.0
"""A machine that takes no connection for this long counts as gone."""


def checked(check_node: bytes, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that a worker unpickles it only after its node has passed `node_check.packed_check`.

    A nested function is pickled whole; another qpruner on the node could not even read the one inside.
    """
    packed = cloudpickle.dumps(function)

    def run_where_alike(*args: Any) -> Any:
        from ray import cloudpickle  # the module's names may differ there

        cloudpickle.loads(check_node)()
        return cloudpickle.loads(packed)(*args)

    return run_where_alike


def run_tasks(
    function: Callable[[Any], Result],
    jobs: Sequence[Any],
    resources: Mapping[str, float],
    max_concurrent: int,
    fresh: bool,
    check_node: bytes,
    on_tick: Callable[[], None] = lambda: None,
    on_held: Callable[[float], None] = lambda seconds: None,
    progress: Callable[[int], object] = lambda position: None,
) -> Iterator[tuple[int, Result]]:
    """Run `function(job)` for every job in worker processes; yield position and result of each that ends.

    Args:
        function: A module-level function; its errors are raised as they were.
        jobs: Its arguments.
        resources: Ray resources of one job.
        max_concurrent: Jobs in flight.
        fresh: Give every job a process that ends with it, so that its memory can be measured.
        check_node: A pickled function that raises on a machine that cannot be used (`node_check.packed_check`).
        on_tick: Called about once a second.
        on_held: Gets the GPU seconds of each job that ends, without those that it waited for a slot.
        progress: Returns what a job has saved, by its position; earlier deaths do not count once it changes.

    Raises:
        NodeDiffers: If a job met a machine that cannot be used.
        WorkerDied: If workers die under one job again and again, on machines that stay and without progress.
    """
    assert ray.is_initialized(), "Ray would choose a cluster itself"

    def timed(job: Any) -> tuple[float, Any]:
        started = time.monotonic()
        result = function(job)
        return time.monotonic() - started, result

    def start(position: int) -> None:
        answers = task.remote(cloudpickle.dumps(checked(check_node, partial(timed, jobs[position]))))
        running[answers] = position

    task = _remote_task(getattr(function, "__name__", "task"), resources, fresh)
    waiting, running, nodes = deque(range(len(jobs))), dict[Any, int](), dict[int, str]()
    deaths = DeathCounter(progress)
    while waiting or running:
        while waiting and len(running) < max_concurrent:
            start(waiting.popleft())
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        on_tick()
        for answers in done:
            position = running[answers]
            try:
                answer = ray.get(next(answers))
            except DEATHS as error:
                line = deaths.count(position, nodes.pop(position, None), error)
                logger.warning("a worker died, its job is run again: %s", line)
                waiting.append(running.pop(answers))
            except RayTaskError as error:
                raise original_error(error) from error
            else:
                if isinstance(answer, str):
                    nodes[position] = answer
                    continue
                del running[answers]
                seconds, result = answer
                on_held(resources.get("gpu", 0.0) * seconds)
                yield position, result


def _remote_task(name: str, resources: Mapping[str, float], fresh: bool) -> Any:
    """Return a remote generator: the id of its node, then what the pickled work returns."""

    def located(work: bytes) -> Iterator[Any]:
        from ray import cloudpickle

        yield ray.get_runtime_context().get_node_id()
        yield cloudpickle.loads(work)()

    options = {"num_cpus": resources.get("cpu", 1.0), "num_gpus": resources.get("gpu", 0.0), "num_returns": "streaming"}
    return ray.remote(max_calls=1 if fresh else 0, max_retries=0, **options)(located).options(name=name)


class DeathCounter:
    """Counts the workers that died under each job since its last progress, on machines that stay."""

    def __init__(self, progress: Callable[[int], object] = lambda position: None) -> None:
        self._progress = progress
        self._in_a_row: Counter[int] = Counter()
        self._seen: dict[int, object] = {}

    def count(self, position: int, node: str | None, error: Exception) -> str:
        """Count a job's death on a node, if its worker ever came up there; return the error in one line.

        Raises:
            WorkerDied: If there were too many.
        """
        death = error.cause if isinstance(error, RayTaskError) else error
        saved = self._progress(position)
        if saved != self._seen.get(position):
            self._seen[position], self._in_a_row[position] = saved, 0
        if not isinstance(death, NodeDiedError) and (node is None or is_staying(node)):
            self._in_a_row[position] += 1
        if self._in_a_row[position] == MAX_DEATHS:
            raise WorkerDied(
                f"{MAX_DEATHS} workers died under the same piece of work, the last one: {first_line(death)}\n  remedy: "
                "the usual cause is too little memory on the node; see Ray's log there, then repeat the command"
            ) from error
        return first_line(death)


def is_staying(node_id: str) -> bool:
    """Return whether a node is alive and not about to go (a spot notice, `ray drain-node`).

    It is also asked for a connection: workers of a raylet that was killed end up to 5 s after it, and Ray takes it for
    dead up to 10 s later still (measured, Ray 2.60).
    """
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    if node is None or not node["Alive"] or node_id in ray_private.state.get_draining_nodes():
        return False
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def original_error(error: Any) -> Exception:
    """Return what a worker raised, from Ray's `RayTaskError`; the check of a node can only raise a built-in type."""
    cause: Exception = error.cause
    text = str(cause)
    return NodeDiffers(text.removeprefix(REFUSAL)) if text.startswith(REFUSAL) else cause
