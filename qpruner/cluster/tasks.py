"""Runs functions as Ray tasks, and runs a task again if its worker or node dies."""

import logging
import math
import socket
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
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
from qpruner.cluster.slots import Resources
from qpruner.errors import NodeDiffers, WorkerDied, first_line
from qpruner.runs.events import Emit, Event, Message

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError, RayActorError)
"""Errors that mean that a worker died.

The task of a process group ends with the RayActorError of a dead process.
"""
MAX_DEATHS = 3
"""Deaths of workers in a row, on machines that stay and without progress, that fail a job."""
QUIET_SECONDS = 20.0  # tell the user after so long that no worker has started
PROCESS = "QPRUNER_PROCESS"
"""Environment variable with an id of its own for each process that serves one job."""
ANSWER_SECONDS = 2.0  # a machine that accepts no connection within this time counts as gone


def checked(check_node: bytes, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that a worker unpickles it only after `check_node` has passed.

    The wrapper is nested, so that its code is pickled with it: a node with another qpruner could
    not import it. See `node_check.packed_check`.
    """
    packed = cloudpickle.dumps(function)

    def check_and_run(*args: Any) -> Any:
        from ray import cloudpickle  # pickled code must not use the imports of this module

        cloudpickle.loads(check_node)()
        return cloudpickle.loads(packed)(*args)

    return check_and_run


def run_tasks(
    function: Callable[[Any], Result],
    jobs: Sequence[Any],
    resources: Resources,
    max_concurrent: int,
    own_process: bool,
    check_node: bytes,
    on_tick: Callable[[], None] = lambda: None,
    on_held: Callable[[float], None] = lambda seconds: None,
    progress: Callable[[int], object] = lambda position: None,
    on_event: Emit | None = None,
) -> Iterator[tuple[int, Result]]:
    """Run `function(job)` for every job in worker processes.

    Each job with a GPU has a new process, in which its memory can be measured. Errors of `function`
    are raised here with their own type.

    Args:
        function: A function of one job; with `on_event`, a generator that yields events.
        jobs: The jobs.
        resources: CPUs and GPUs of one job.
        max_concurrent: How many jobs may run at once.
        own_process: Whether jobs without a GPU have new processes, too.
        check_node: The pickled check that raises on an unusable node (see `packed_check`).
        on_tick: Called about every second.
        on_held: Called with the GPU seconds of each finished job.
        progress: Returns what the job at a position has saved; after a change, the deaths of its
            workers are counted from 0 again.
        on_event: Called with the events of the jobs.

    Yields:
        The position and the result of each finished job.

    Raises:
        WorkerDied: If the workers of one job die again and again.
        NodeDiffers: If a job was sent to an unusable node.
    """
    assert ray.is_initialized(), "without `connect`, Ray would choose a cluster itself"
    emit = on_event or (lambda event: None)
    work = partial(_timed, function, on_event is not None)
    start = _starter(getattr(function, "__name__", "task"), resources, own_process)
    deaths = DeathCounter(progress)
    waiting = deque(range(len(jobs)))
    running: dict[Any, int] = {}  # position of the job, by the answers of its task
    nodes: dict[int, str] = {}  # id of the node, by the position of a job that has begun
    quiet_until = time.monotonic() + QUIET_SECONDS

    while waiting or running:
        while waiting and len(running) < max_concurrent:
            position = waiting.popleft()
            checked_work = checked(check_node, partial(work, jobs[position]))
            running[start(cloudpickle.dumps(checked_work))] = position

        ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        on_tick()
        if not ready and not nodes and time.monotonic() > quiet_until:
            emit(Message("cluster", f"waiting for a machine with room for {dict(resources)}"))
            quiet_until = math.inf

        for answers in ready:
            position = running[answers]
            try:
                answer = ray.get(next(answers))
            except DEATHS as error:
                line = deaths.count(position, nodes.pop(position, None), error)
                logger.warning("a worker died, its job is run again: %s", line)
                emit(Message("cluster", f"a worker died, its work starts again: {line}"))
                waiting.append(running.pop(answers))
                continue
            except RayTaskError as error:
                raise original_error(error) from error

            if isinstance(answer, str):
                nodes[position] = answer
            elif isinstance(answer, Event):
                emit(answer)
            else:
                result, seconds = answer
                del running[answers]
                on_held(resources.get("gpu", 0.0) * seconds)
                yield position, result


def _timed(function: Callable[[Any], Any], is_generator: bool, job: Any) -> Iterator[Any]:
    """Yield the events of a generator, then the pair of the function's result and its seconds.

    The memory of the job is freed before that.
    """
    from qpruner.models.memory import release

    started = time.monotonic()
    result = function(job)
    if is_generator:
        result = yield from result
    release()  # an idle process would keep it until its next job
    yield result, time.monotonic() - started


def _starter(name: str, resources: Resources, own_process: bool) -> Callable[[bytes], Any]:
    """Return a function that starts a Ray task for pickled work.

    The task yields the id of its node, and then what the work yields.

    A process keeps the first GPU that it has used, whatever Ray writes into CUDA_VISIBLE_DEVICES
    later, so a process with a GPU serves only one job. Ray (2.60) may run even that job in a
    process that has served tasks without a GPU; an environment of its own gives the job a new
    process.
    """

    # This function runs before the node is checked; as it is nested, it is pickled by value.
    def located(work: bytes) -> Iterator[Any]:
        from ray import cloudpickle

        yield ray.get_runtime_context().get_node_id()
        yield from cloudpickle.loads(work)()

    gpus = resources.get("gpu", 0.0)
    options = {
        "num_cpus": resources.get("cpu", 1.0),
        "num_gpus": gpus,
        "num_returns": "streaming",
        "max_retries": 0,
    }
    if not (gpus or own_process):
        return ray.remote(max_calls=0, **options)(located).options(name=name).remote  # type: ignore[no-any-return]
    task = ray.remote(max_calls=1, **options)(located)

    def start(work: bytes) -> Any:
        environment = {"env_vars": {PROCESS: uuid.uuid4().hex}}
        return task.options(name=name, runtime_env=environment).remote(work)

    return start


class DeathCounter:
    """Counts the deaths of each job's workers since the job last made progress.

    Machines that leave the cluster do not count.
    """

    def __init__(self, progress: Callable[[int], object] = lambda position: None) -> None:
        self._progress = progress
        self._in_a_row: Counter[int] = Counter()
        self._saved: dict[int, object] = {}

    def count(self, position: int, node: str | None, error: Exception) -> str:
        """Count the death of a worker and return its error in one line.

        Args:
            position: The position of the job.
            node: Ray's id of the worker's node; None if the worker never began.
            error: The error with which the worker died.

        Raises:
            WorkerDied: After `MAX_DEATHS` deaths in a row.
        """
        death = error.cause if isinstance(error, RayTaskError) else error
        saved = self._progress(position)
        if saved != self._saved.get(position):
            self._saved[position] = saved
            self._in_a_row[position] = 0
        if not isinstance(death, NodeDiedError) and (node is None or is_staying(node)):
            self._in_a_row[position] += 1

        line = first_line(death)
        if self._in_a_row[position] == MAX_DEATHS:
            raise WorkerDied(
                f"{MAX_DEATHS} workers died in a row in the same task, the last one: {line}\n"
                "  remedy: free memory on the node, the usual cause (see Ray's log there), "
                "then repeat the command"
            ) from error
        return line


def is_staying(node_id: str) -> bool:
    """Return True if a node accepts connections and is not about to leave.

    Ray (2.60) lists a killed node as alive for up to 15 s.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if node_id not in nodes or node_id in ray_private.state.get_draining_nodes():
        return False
    node = nodes[node_id]
    address = (node["NodeManagerAddress"], node["NodeManagerPort"])
    try:
        socket.create_connection(address, ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def original_error(error: Any) -> Exception:
    """Return the error of the worker that a `RayTaskError` wraps.

    The error of a failed `check_node` becomes NodeDiffers.
    """
    cause: Exception = error.cause
    text = str(cause)
    if text.startswith(REFUSAL):
        return NodeDiffers(text.removeprefix(REFUSAL))
    return cause
