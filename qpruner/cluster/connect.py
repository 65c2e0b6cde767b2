"""Starts Ray on this machine, or joins a cluster."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from qpruner.cluster import ray_private
from qpruner.cluster.slots import Node, Slots, size_of
from qpruner.errors import RayNotStarted, UserError, first_line
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import CACHE, cache_root

# Set before Ray is imported: no usage report leaves the machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

OBJECT_STORE_BYTES = 200 * 1024**2
"""Weights travel through the run folder, so Ray's shared memory stays small on a single machine."""
CLUSTER_VARIABLES = ("RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT")
"""Set where a cluster's head runs: a Ray started beside it would load that cluster's state, or want its port."""
ANSWER_SECONDS = 15.0
"""A head node answers within this time; asked itself, Ray tries for 80 to 200 seconds (measured, Ray 2.60)."""
CLUSTER_FILE = "--autoscaling-config="


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process has joined."""

    growth: Slots  # what its autoscaler may start
    was_joined: bool = False  # before

    def slots(self) -> Slots:
        """Return what it can run now, on machines that stay, and what its autoscaler may add."""
        import ray

        draining = ray_private.state.get_draining_nodes()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        return replace(self.growth, nodes=tuple(map(size_of, nodes)))


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
    options = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": variables}}
    was_joined = ray.is_initialized()
    if was_joined:
        present = ray.get_runtime_context().gcs_address
        if address not in ("auto", present):
            other = f"the one at {address}" if address else "one of its own, as a run without an address is"
            raise UserError(
                f"this process has joined the Ray cluster at {present} already, not {other}; call `ray.shutdown()` "
                f"first, or pass address={present!r}"
            )
    elif address:
        _join(address, options)
    else:
        _start(options)
    return Cluster(_growth() if address else Slots(()), was_joined)


def disconnect() -> None:
    """Leave the cluster; a local one ends."""
    import ray

    ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    """Start Ray, on loopback alone.

    Given the address 127.0.0.1 it takes the one on the way to the internet instead, and listens on all. What prevents
    both is a switch for systems on which it forms no clusters, read when Ray is imported (Ray 2.60).
    """
    import ray

    constants = ray_private.constants
    name, clusters = constants.ENABLE_RAY_CLUSTERS_ENV_VAR, constants.ENABLE_RAY_CLUSTER
    before = {each: os.environ.pop(each) for each in (name, *CLUSTER_VARIABLES) if each in os.environ}
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        _ensure_token()
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)
    except Exception as error:
        if "timed out" not in str(error).lower():
            raise
        raise RayNotStarted(
            f"Ray did not come up on this machine in time ({first_line(error)}); it has {os.cpu_count()} cores and a "
            f"load of {os.getloadavg()[0]:.0f}\n  remedy: end what else runs or wait for it, then repeat the command: "
            "it resumes from what is recorded; Ray's own words are in the newest folder of `/tmp/ray`"
        ) from error
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        os.environ.pop(name)
        os.environ.update(before)


def _ensure_token() -> None:
    """Write Ray's token file once; Ray (2.60) itself would let everybody on the machine read it."""
    path = Path.home() / ".ray" / "auth_token"
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError), open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))


def _join(address: str, options: dict[str, Any]) -> None:
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"--address {address}: a search is driven from inside the cluster, not through a Ray client; run it on the "
            "head node with `--address auto`, or submit it with `ray job submit`"
        )
    try:
        # A port where nobody listens says so at once; Ray's client would try again and again, and log it.
        host, _, port = ray_private.canonicalize_address_or_die(address).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there that this process can join ({first_line(error)}); "
            "start one with `ray start --head` or `ray up`, of the same Ray and Python, or leave --address out"
        ) from error


def _growth() -> Slots:
    """Return what the cluster's autoscaler may start; nothing where there is none.

    Ray has no API for it (2.60): `get_cluster_config` is None and nodes do not say their type. The head's monitor
    process has the cluster file's path on its command line. A driver that is not on the head, or on Kubernetes, sees
    only the machines that have joined.
    """
    import ray

    session = ray.get_runtime_context().get_session_name()
    heads = [size_of(node) for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        file = next((each for each in command if each.startswith(CLUSTER_FILE)), None)
        if heads and file and any(f"/{session}/" in argument for argument in command):
            return read_growth(Path(file.removeprefix(CLUSTER_FILE)).expanduser(), heads[0])
    return Slots(())


def read_growth(file: Path, head: Node) -> Slots:
    """Return what a cluster file lets the autoscaler start; types without a size count once they have joined.

    Raises:
        UserError: If it cannot be read.
    """
    # Ray's own reader (`FileConfigReader`) prints warnings and wants the ssh key that the file names.
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}, the cluster file of Ray's autoscaler, cannot be read ({error}): correct it, and run as the user "
            "who started Ray there"
        ) from error
    max_workers = int(config.get("max_workers", 0))
    workers: list[Node] = []
    for name, kind in (config.get("available_node_types") or {}).items():
        node = size_of({"Resources": kind.get("resources") or {}})
        number = kind.get("max_workers", 0 if name == config.get("head_node_type") else max_workers)
        workers += [node] * number if node.cpus or node.gpus else []
    return Slots((), head, tuple(workers), max_workers)
