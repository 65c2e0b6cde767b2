"""Starts Ray on this machine, or joins a cluster."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qpruner.cluster import ray_private
from qpruner.cluster.autoscaler import growth_of
from qpruner.cluster.slots import Growth, Node, Slots
from qpruner.cluster.tasks import first_line
from qpruner.errors import RayNotStarted, UserError
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import CACHE, cache_root

# Set before Ray is imported: no usage report leaves the machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200 * 1024**2
"""Weights travel through the run folder, so Ray's shared memory stays small on a single machine."""
MAX_STARTS = 3
"""Attempts to start Ray on a busy machine; the next one finds files in the page cache."""
CLUSTER_VARIABLES = ("RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT")
"""Set where a cluster's head runs: a Ray started beside it would load that cluster's state, or want its port."""
ANSWER_SECONDS = 15.0
"""A head node answers within this time; asked itself, Ray tries for 80 to 200 seconds (measured, Ray 2.60)."""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process has joined."""

    growth: Growth | None
    was_joined: bool = False  # before

    def slots(self) -> Slots:
        """Return what it can run now, on machines that stay, and what its autoscaler may add."""
        import ray

        draining = ray_private.state.get_draining_nodes()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        return Slots(tuple(map(size_of, nodes)), self.growth)


def connect(address: str | None) -> Cluster:
    """Join the cluster at `address`, or start Ray on this machine, on loopback, whatever other clusters there are.

    Raises:
        RayNotStarted: If this machine is too busy for Ray to come up.
        UserError: If no cluster answers there, or this process cannot join it.
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


def disconnect() -> None:
    """Leave the cluster; a local one ends."""
    import ray

    ray.shutdown()


def size_of(node: dict[str, Any]) -> Node:
    """Return the CPUs and GPUs that Ray counts on one of `ray.nodes()`."""
    resources = node["Resources"]
    return Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def _start(environment: dict[str, Any]) -> None:
    """Start Ray, which gives each of its processes 30 seconds to come up, however busy the machine is (Ray 2.60).

    Raises:
        RayNotStarted: If one of them did not in that time, `MAX_STARTS` times.
    """
    import ray

    with _without(CLUSTER_VARIABLES), _on_loopback():
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
                        "or wait for it, then repeat the command: it resumes from what is recorded; Ray's own words "
                        "are in the newest folder of `/tmp/ray`"
                    ) from error
                logger.warning("Ray did not come up in time (%s); it is started again", first_line(error))
            else:
                return


def _ray_processes() -> list[psutil.Process]:
    """Find the processes of Ray that this process has started, and their children."""
    import ray

    package, found = os.path.dirname(ray.__file__), []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if package in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process]) -> None:
    """Kill what a failed start of Ray left behind; it would live as long as this process."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=ANSWER_SECONDS)


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    """Unset environment variables inside."""
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make Ray listen on loopback alone.

    Given the address 127.0.0.1 it takes the one on the way to the internet instead, and listens on all. What prevents
    both is a switch for systems on which it forms no clusters, read when Ray is imported (Ray 2.60).
    """
    constants = ray_private.constants
    name, clusters = constants.ENABLE_RAY_CLUSTERS_ENV_VAR, constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(name)
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        os.environ.pop(name)
        os.environ.update({name: before} if before is not None else {})


def _ensure_token() -> None:
    """Write Ray's token file, readable by its owner only, once.

    Of two runs that start together each would write its own, and then use one that its processes do not have (2.60).
    """
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
    """Check that the cluster this process has joined already is the one asked for.

    Raises:
        UserError: If it is another one.
    """
    import ray

    present = ray.get_runtime_context().gcs_address
    if address is None:
        raise UserError(
            f"this process has joined the Ray cluster at {present} already, and a run without an address starts its "
            f"own; call `ray.shutdown()` first, or pass address={present!r}"
        )
    places = [ray_private.canonicalize_address(place) for place in (address, present)]
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
    """Connect to the cluster's control store.

    Raises:
        ConnectionError: If nothing answers in time, or no Ray head node.
    """
    place = ray_private.canonicalize_address_or_die(address)
    host, _, port = place.rpartition(":")
    try:
        # A port where nobody listens says so at once; Ray's client would try again and again, and log it.
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(first_line(error)) from error
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(ray_private.GcsClient(address=place))
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
