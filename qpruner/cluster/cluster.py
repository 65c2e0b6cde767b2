"""Ray outside Tune: starting or joining a cluster, and running stage work as tasks on its nodes."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

from qpruner.cluster import testimony
from qpruner.cluster.autoscaler import growth_of
from qpruner.cluster.nodes import stays
from qpruner.cluster.slots import Growth, Node, Slots
from qpruner.errors import NodeDiffers, RayNotStarted, UserError, WorkerDied
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import CACHE, cache_root

# Set before Ray is imported: no usage report leaves the machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

OBJECT_STORE_BYTES = 200 * 1024**2
"""Weights travel through the run folder, so Ray's shared memory stays small on a single machine."""
MAX_DEATHS = 3
"""Workers that may die under one piece of work, on machines that live on and without progress, before that is an
error."""
MAX_STARTS = 3
"""Of Ray on a machine that is too busy for it; what the first has read comes faster in the next."""
OF_A_CLUSTER = ("RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT")
"""What is set where a cluster's head runs: a Ray that starts beside it would take up that cluster's state (KubeRay's
fault tolerance), or want its control store's port. `RAY_ADDRESS` is not heard where an address is given, as here."""
ANSWER_SECONDS = 15.0
"""A head node answers within this time; asked itself, Ray tries for 80 to 200 seconds (measured, Ray 2.60)."""


def local_slots() -> Slots:
    """This machine's slots, without starting Ray."""
    import torch

    return Slots((Node(float(num_cores()), float(torch.cuda.device_count())),))


def num_cores() -> int:
    """Cores that this process may use; macOS keeps none from a process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process has joined.

    Attributes:
        growth: What its autoscaler may make of it; None where it has none.
        was_joined: Whether the process had joined it before, so that others may still want it.
    """

    growth: Growth | None
    was_joined: bool = False

    def slots(self) -> Slots:
        """What it can run now, on machines that are not about to go, and at the most."""
        import ray
        from ray._private.state import state

        nodes = [node for node in ray.nodes() if node["Alive"]]
        going = state.get_draining_nodes()
        return Slots(tuple(size_of(node) for node in nodes if node["NodeID"] not in going), self.growth)


def connect(address: str | None) -> Cluster:
    """Join the cluster at `address`, or start Ray on this machine, on loopback, whatever other clusters there are.

    Raises:
        RayNotStarted: If this machine is too busy for Ray to come up on it.
        UserError: If no cluster answers there, or it is not one that this process can join.
    """
    import ray

    variables = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if address:
        # The run's storage is far away: a machine fetches each of the bank's files once for all its workers.
        variables[BANK_CACHE] = os.environ.get(BANK_CACHE, f"{tempfile.gettempdir()}/qpruner-bank-{os.getuid()}")
        # The paths of a run at a URI begin with it.
        variables[CACHE] = str(cache_root())
    was_joined = ray.is_initialized()
    if was_joined:
        _check_joined(address)
    elif address:
        _join(address, {"env_vars": variables})
    else:
        _start({"env_vars": variables})
    head = next((size_of(node) for node in ray.nodes() if "node:__internal_head__" in node["Resources"]), None)
    growth = growth_of(ray.get_runtime_context().get_session_name(), head) if address and head else None
    return Cluster(growth, was_joined)


def size_of(node: dict[str, Any]) -> Node:
    """What Ray counts on one of `ray.nodes()`."""
    resources = node["Resources"]
    return Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def _start(environment: dict[str, Any]) -> None:
    """Start Ray, which gives each of its processes 30 seconds to come up, whatever else the machine does (Ray 2.60).

    Raises:
        RayNotStarted: If one of them did not in that time, again and again.
    """
    import ray

    with _without(OF_A_CLUSTER), _on_loopback():
        _ensure_token()
        for attempt in range(1, MAX_STARTS + 1):
            others = set(_ray_processes())
            try:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=OBJECT_STORE_BYTES,
                    runtime_env=environment,
                )
            except Exception as error:
                if "timed out" not in str(error).lower():
                    raise
                _end([process for process in _ray_processes() if process not in others])
                if attempt == MAX_STARTS:
                    raise RayNotStarted(
                        f"Ray did not come up on this machine in time, {attempt} times ({first_line(error)}); it has "
                        f"{os.cpu_count()} cores and a load of {os.getloadavg()[0]:.0f}\n  remedy: end what else runs "
                        "or wait for it, then repeat the command: it goes on from what is recorded; Ray's own words "
                        "are in the newest folder of `/tmp/ray`"
                    ) from error
                logger.warning("Ray did not come up in time (%s); it is started again", first_line(error))
            else:
                return


def _ray_processes() -> list[psutil.Process]:
    """Those of Ray that this process has started, and what they have."""
    import ray

    package, found = os.path.dirname(ray.__file__), []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if package in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process]) -> None:
    """End what a start of Ray left behind, which would live as long as this process."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=ANSWER_SECONDS)


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    """Have these unset meanwhile, and in what is started meanwhile."""
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray, and what is started meanwhile, listen on loopback alone. Told the address 127.0.0.1 it takes that on
    the way to the internet instead, and its processes then listen on all; what keeps it from either is what it has for
    systems on which it forms no clusters, read when it is imported (Ray 2.60)."""
    from ray._private import ray_constants

    name, clusters = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        os.environ.pop(name)
        os.environ.update({name: before} if before is not None else {})


def _ensure_token() -> None:
    """Make the token file that Ray would make here, readable by its owner only, and once: each of two runs that start
    together would write its own, and then believe in one that its processes do not have (Ray 2.60)."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.touch(mode=0o600)
    aside.write_text(secrets.token_hex(32))
    with suppress(FileExistsError):
        path.hardlink_to(aside)
    aside.unlink()


def _check_joined(address: str | None) -> None:
    """A process has one cluster at a time.

    Raises:
        UserError: If the one that it has joined already is not the one that is asked for.
    """
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    present = ray.get_runtime_context().gcs_address
    if address is None:
        raise UserError(
            f"this process has joined the Ray cluster at {present} already, and a run without an address starts its "
            f"own; call `ray.shutdown()` first, or pass address={present!r}"
        )
    places = [canonicalize_bootstrap_address(place) for place in (address, present)]
    if address != "auto" and places[0] != places[1]:
        raise UserError(
            f"this process has joined the Ray cluster at {present} already, not the one at {address}; call "
            "`ray.shutdown()` first"
        )


def _join(address: str, environment: dict[str, Any]) -> None:
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"--address {address}: a search is driven from inside the cluster, not through a Ray client; run it on the "
            "head node with `--address auto`, or submit it with `ray job submit`"
        )
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({first_line(error)}); start one with `ray start "
            "--head` or `ray up`, or leave --address out"
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise UserError(
            f"--address {address}: this is another Ray or Python than the cluster's: {error}; install the same on both"
        ) from error


def _check_answers(address: str) -> None:
    """Ask the cluster's control store who it is.

    Raises:
        ConnectionError: If nothing answers in time, or no Ray head node.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    place = canonicalize_bootstrap_address_or_die(address)
    host, _, port = place.rpartition(":")
    try:
        # A port where nobody listens says so at once; Ray's client would try again and again, and log it.
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(first_line(error)) from error
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(GcsClient(address=place))
        except Exception as error:
            found.append(error)

    # Ray's own client has no time limit; a thread that still waits for it does not keep the process.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if not found:
        raise ConnectionError(f"no answer in {ANSWER_SECONDS:g} s")
    if isinstance(found[0], Exception):
        raise ConnectionError(first_line(found[0])) from found[0]


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
    check_node: bytes,
    on_tick: Callable[[], None] = lambda: None,
    on_held: Callable[[float], None] = lambda seconds: None,
    progress: Callable[[int], object] = lambda position: None,
) -> Iterator[tuple[int, Result]]:
    """Run `function(job)` for every job in worker processes.

    A job whose worker or node dies is run again elsewhere. What dies with its machine, or leaves one that is about to
    go, says nothing of the job.

    Args:
        function: A module-level function.
        jobs: Its arguments.
        resources: Ray resources of one job.
        max_concurrent: Jobs in flight.
        fresh: Give every job a process that ends with it, so that its memory can be measured.
        check_node: A pickled function that raises where a job would begin on a machine that cannot be used; it needs
            nothing of qpruner (`probe.packed_check`).
        on_tick: Called about once a second while jobs run.
        on_held: Told what each job has held of GPUs as it ends: its seconds, without those that it waited for a slot,
            times how many.
        progress: What a job has left by now to go on from, by its position; deaths before it changed are forgiven.

    Yields:
        Position of the job and its result, as they finish. An error of a job is raised as it was.

    Raises:
        NodeDiffers: If a job met a machine that cannot be used.
        WorkerDied: If a job's workers die again and again, on machines that live on and without progress.
    """
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

    assert ray.is_initialized(), "Ray would choose a cluster itself"
    gpus = resources.get("gpu", 0.0)

    def located(work: bytes) -> Iterator[str | tuple[float, Result]]:
        # A nested function brings itself along; another qpruner there could not even read the job.
        from ray import cloudpickle

        # First where it is, while it can still tell.
        yield ray.get_runtime_context().get_node_id()
        cloudpickle.loads(check_node)()
        run = cloudpickle.loads(work)
        started = time.monotonic()
        result = run()
        yield time.monotonic() - started, result

    remote = ray.remote(
        num_cpus=resources.get("cpu", 1.0),
        num_gpus=gpus,
        max_calls=1 if fresh else 0,
        max_retries=0,
        num_returns="streaming",
    )(located).options(name=getattr(function, "__name__", "task"))
    waiting = deque(enumerate(jobs))
    running: dict[Any, int] = {}
    nodes: dict[int, str] = {}
    deaths = Deaths(progress)
    while waiting or running:
        while waiting and len(running) < max_concurrent:
            position, job = waiting.popleft()
            running[remote.remote(cloudpickle.dumps(partial(function, job)))] = position
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        on_tick()
        for answers in done:
            position = running[answers]
            try:
                said = ray.get(next(answers))
            # A group's task ends with the RayActorError of the process that it lost.
            except (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError, RayActorError) as error:
                line = deaths.count(position, nodes.pop(position, None), error)
                logger.warning("a worker died, its job is run again: %s", line)
                del running[answers]
                waiting.append((position, jobs[position]))
            except RayTaskError as error:
                raise told_by(error) from error
            else:
                if isinstance(said, str):
                    nodes[position] = said
                    continue
                del running[answers]
                seconds, result = said
                on_held(gpus * seconds)
                yield position, result


class Deaths:
    """Workers that died under pieces of work, by the position of each.

    Args:
        progress: What a piece has left by now to go on from.
    """

    def __init__(self, progress: Callable[[int], object] = lambda position: None) -> None:
        self._progress = progress
        self._in_a_row: Counter[int] = Counter()
        self._seen: dict[int, object] = {}

    def count(self, position: int, node: str | None, error: Exception) -> str:
        """Take a death; returns it in a line.

        Args:
            position: Of the piece.
            node: Ray's id of the worker's machine, if it ever came up.
            error: Ray's.

        Raises:
            WorkerDied: If it was one too many.
        """
        from ray.exceptions import NodeDiedError, RayTaskError

        death = error.cause if isinstance(error, RayTaskError) else error
        left = self._progress(position)
        if left != self._seen.get(position):
            self._seen[position], self._in_a_row[position] = left, 0
        if not isinstance(death, NodeDiedError) and (node is None or stays(node)):
            self._in_a_row[position] += 1
        if self._in_a_row[position] == MAX_DEATHS:
            raise WorkerDied(
                f"{MAX_DEATHS} workers died under the same piece of work, the last one: {first_line(death)}\n  remedy: "
                "the usual cause is too little memory on the node; see Ray's log there, then repeat the command"
            ) from error
        return first_line(death)


def told_by(error: Any) -> Exception:
    """What a worker raised, of one of Ray's `RayTaskError`s; a check of its machine has no type of qpruner's there."""
    cause: Exception = error.cause
    text = str(cause)
    return NodeDiffers(text.removeprefix(testimony.REFUSAL)) if text.startswith(testimony.REFUSAL) else cause


def first_line(error: Exception) -> str:
    """The first line of an error's text; Ray's go on for a screen."""
    return str(error).strip().partition("\n")[0]
