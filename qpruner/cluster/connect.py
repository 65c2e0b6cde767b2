"""Starts Ray on this machine, or joins a Ray cluster."""

import atexit
import os
import secrets
import shutil
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from qpruner.cluster import ray_private
from qpruner.cluster.slots import Node, Slots, num_cores, size_of
from qpruner.errors import RayNotStarted, UserError, first_line
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import CACHE, cache_root

# Send no usage report. Ray reads this when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

OBJECT_STORE_BYTES = 200 * 1024**2
"""Shared memory of Ray on a single machine.

It is small, because workers read weights from the run folder.
"""
ANSWER_SECONDS = 15.0
"""Time for a head node to answer.

Ray itself would try for 80 to 200 seconds (measured, Ray 2.60).
"""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process has joined."""

    growth: Slots  # the machines that its autoscaler may start
    was_joined: bool = False  # before `connect` was called

    def slots(self) -> Slots:
        """Return the sizes of the present machines, and of the machines that may be started.

        Machines that are about to leave are left out.
        """
        import ray

        draining = ray_private.state.get_draining_nodes()
        sizes = [
            size_of(node)
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in draining
        ]
        return replace(self.growth, nodes=tuple(sizes))


def connect(address: str | None) -> Cluster:
    """Join the Ray cluster at `address`, or start a separate Ray on this machine.

    Args:
        address: `HOST:PORT` of the cluster, or `auto` for the one on this machine. Without an
            address, Ray starts here and listens on loopback only.

    Raises:
        UserError: If no cluster can be joined there, or this process has joined another one.
        RayNotStarted: If Ray does not start on this machine in time.
    """
    import ray

    variables = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if address:
        # Each machine fetches a file of the bank once for all its workers, because the run's
        # storage is remote.
        own_cache = f"{tempfile.gettempdir()}/qpruner-bank-{os.getuid()}"
        variables[BANK_CACHE] = os.environ.get(BANK_CACHE, own_cache)
        # Every path of a run at a URI begins with this folder.
        variables[CACHE] = str(cache_root())
    options = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": variables},
    }
    was_joined = ray.is_initialized()
    if was_joined:
        present = ray.get_runtime_context().gcs_address
        if address not in ("auto", present):
            remedy = f"call `ray.shutdown()` first, or pass address={present!r}"
            raise UserError(
                f"`address` is {address!r}, but this process has joined the Ray cluster at "
                f"{present}; {remedy}"
            )
    elif address:
        _join(address, options)
    else:
        _start(options)
    return Cluster(_growth() if address else Slots(()), was_joined)


def disconnect() -> None:
    """Leave the cluster. A Ray that this process started ends."""
    import ray

    ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    """Start Ray so that it listens on loopback only.

    On Linux, Ray (2.60) replaces 127.0.0.1 by the address on the route to the internet, and listens
    on all interfaces. On macOS, where it supports no clusters, it keeps 127.0.0.1: an environment
    variable and a constant ask for that.
    """
    import ray

    constants = ray_private.constants
    switch = constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    forms_clusters = constants.ENABLE_RAY_CLUSTER
    # With the last two, which a cluster's head node sets, Ray would load the cluster's state or use
    # its port.
    variables = (switch, "RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT")
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    os.environ[switch] = "0"
    constants.ENABLE_RAY_CLUSTER = False
    try:
        ensure_token()
        ray.init(
            address="local",
            include_dashboard=False,
            # Ray (2.60) would count all cores of the machine, even those outside this process's CPU
            # affinity.
            num_cpus=num_cores(),
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    except Exception as error:
        if "timed out" not in str(error).lower():
            raise
        raise RayNotStarted(
            f"Ray did not come up on this machine in time ({first_line(error)}); "
            f"the load is {os.getloadavg()[0]:.0f}\n"
            "  remedy: end other programs, then repeat the command; "
            "Ray's logs are in the newest folder of `/tmp/ray`"
        ) from error
    finally:
        constants.ENABLE_RAY_CLUSTER = forms_clusters
        os.environ.pop(switch)
        os.environ.update(before)


def ensure_token() -> None:
    """Write Ray's token file so that only its owner can read it.

    Ray (2.60) would let every user of the machine read it. If the home folder cannot be written,
    the file goes to a private temporary folder.
    """
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_token(path)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="qpruner-ray-")) / path.name
        atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
        _write_token(path)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _write_token(path: Path) -> None:
    """Write a new token, unless there is one."""
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))


def _join(address: str, options: dict[str, Any]) -> None:
    """Join the cluster at an address.

    Addresses of the Ray client are refused, and so are clusters with another version of Ray or
    Python.
    """
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"--address {address}: qpruner does not work through a Ray client; repeat the command "
            "on the head node with `--address auto`, or submit it with `ray job submit`"
        )
    try:
        # Connect first: this fails at once where nothing listens, while Ray would log many
        # attempts.
        host, _, port = ray_private.canonicalize_address_or_die(address).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--address {address}: this process cannot join a Ray cluster there ({reason}); "
            "start one with the same Ray and Python (`ray start --head`, `ray up`), "
            "or leave --address out"
        ) from error


def _growth() -> Slots:
    """Return the machines that the cluster's autoscaler may start; none if there is no autoscaler.

    Ray (2.60) has no API for this, so the path of the cluster file is read from the command line of
    the monitor process on the head node. A driver on another machine or on Kubernetes does not see
    this process: it gets none.
    """
    import ray

    heads = [node for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    if not heads:
        return Slots(())

    session = ray.get_runtime_context().get_session_name()
    option = "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        files = [text.removeprefix(option) for text in command if text.startswith(option)]
        if files and f"/{session}/" in " ".join(command):
            return read_growth(Path(files[0]).expanduser(), size_of(heads[0]))
    return Slots(())


def read_growth(file: Path, head: Node) -> Slots:
    """Return the workers that a cluster file allows beside `head`.

    Node types that state neither CPUs nor GPUs are skipped.
    """
    # Ray's own reader (`FileConfigReader`) prints warnings and needs the ssh key that the file
    # names.
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}, the cluster file of Ray's autoscaler, cannot be read ({error}): "
            "run qpruner as the user who started Ray"
        ) from error

    max_workers = int(config.get("max_workers", 0))
    node_types = config.get("available_node_types") or {}
    workers = []
    for name, node_type in node_types.items():
        node = size_of({"Resources": node_type.get("resources") or {}})
        default = 0 if name == config.get("head_node_type") else max_workers
        if node.cpus or node.gpus:
            workers += [node] * node_type.get("max_workers", default)
    return Slots(nodes=(), head=head, workers=tuple(workers), max_workers=max_workers)
