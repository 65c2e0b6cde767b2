"""How many trials run at once on a cluster, and which cluster a run joins."""

import json
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path

import pytest
from conftest import ROOT
from raylets import Raylets, joined_raylets

from qpruner.cluster import ray_private
from qpruner.cluster.connect import connect, disconnect, ensure_token, read_growth
from qpruner.cluster.slots import LOOK_SECONDS, Node, Room, Slots, worker_resources
from qpruner.errors import UserError
from qpruner.runs.events import SlotsFound

TWO_NODES = Slots((Node(8, 2), Node(8, 1)))
HEAD = Node(2, 0)
CLOUD = Slots((HEAD,), HEAD, (Node(8, 1), Node(8, 1), Node(64, 8)), max_workers=2)
"""A head without GPUs, and an autoscaler that may start two of three workers."""


@pytest.mark.parametrize(
    ("slots", "resources", "expected"),
    [
        pytest.param(TWO_NODES, {"cpu": 1, "gpu": 1}, 3, id="one-gpu"),
        pytest.param(TWO_NODES, {"cpu": 1, "gpu": 0.4}, 6, id="two-fit-on-each-gpu"),
        pytest.param(TWO_NODES, {"cpu": 1, "gpu": 2}, 1, id="two-gpus-of-one-machine"),
        pytest.param(TWO_NODES, {"cpu": 4, "gpu": 0.25}, 4, id="too-few-cores-for-the-gpus"),
        pytest.param(
            CLOUD, {"cpu": 1, "gpu": 1}, 8 + 1, id="the-largest-two-of-three-that-may-start"
        ),
        pytest.param(
            replace(CLOUD, nodes=(HEAD, Node(8, 1))), {"cpu": 2}, 1 + 32 + 4, id="the-head-too"
        ),
    ],
)
def test_a_trial_gets_its_resources_from_one_machine(
    slots: Slots, resources: dict[str, float], expected: int
) -> None:
    assert slots.concurrent(resources, None) == expected
    assert slots.concurrent(resources, 2) == min(2, expected)


def test_a_trial_that_fits_on_no_machine_is_refused() -> None:
    """Ray would wait forever."""
    largest = (
        "the largest of 1 machine and of those that the autoscaler may start has 64 CPUs and 8 GPUs"
    )
    with pytest.raises(UserError, match=rf"'gpu': 9.* on one machine.* {largest}: ask for less"):
        CLOUD.concurrent({"cpu": 1, "gpu": 9}, None)


def test_a_trial_gets_a_gpu_if_any_machine_has_one() -> None:
    for slots in (TWO_NODES, CLOUD):
        assert slots.resources_per_trial(None) == {"cpu": 1.0, "gpu": 1.0}
    assert TWO_NODES.resources_per_trial({"cpu": 2.0, "gpu": 0}) == {"cpu": 2.0}
    assert Slots((Node(4, 0),)).resources_per_trial(None) == {"cpu": 1.0}
    assert CLOUD.fits({"gpu": 1}) == 0
    # This is how Ray counts.
    assert [Node(1, 0).fits({"cpu": share}) for share in (0.1, 0.2, 0.3)] == [10, 5, 3]
    for num_workers, gpu in ((1, 0.5), (2, 1)):
        # A process of a group gets whole GPUs.
        assert worker_resources({"cpu": 2, "gpu": 0.5}, num_workers) == {"cpu": 2, "gpu": gpu}
    assert worker_resources({"cpu": 2}, 2) == {"cpu": 2}


def test_workers_are_read_from_the_cluster_file() -> None:
    assert read_growth(ROOT / "cluster.yaml", HEAD) == Slots(
        (), HEAD, (Node(8, 1),) * 5, max_workers=4
    )
    # Its machines do not say their size.
    assert not read_growth(ROOT / "launch" / "cluster_onprem.yaml", HEAD).workers
    with pytest.raises(
        UserError, match=r"nowhere.yaml, the cluster file of Ray's autoscaler, cannot be read"
    ):
        read_growth(ROOT / "nowhere.yaml", HEAD)


def test_private_names_of_ray_are_in_one_file_and_exist() -> None:
    import qpruner.cluster.group  # chooses the second API of Ray Train

    private = re.compile(
        r"\bray(\.\w+)*\._(?!_)|from ray[\w.]* import [^\n]*\b_\w|import_module\(.ray"
    )
    files = Path(qpruner.__file__).parent.rglob("*.py")
    assert {path.name for path in files if private.search(path.read_text(encoding="utf-8"))} == {
        "ray_private.py"
    }
    assert all(getattr(ray_private, name) is not None for name in ray_private.NAMES)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """A cluster that this process has joined; its only node runs no work."""
    with joined_raylets(0) as found:
        yield found


def test_a_process_in_one_cluster_cannot_join_another(cluster: Raylets) -> None:
    """As in a notebook that has called `ray.init` itself."""
    present = cluster.address
    assert not cluster.joined.was_joined
    assert connect(present).was_joined
    assert connect("auto").was_joined
    with pytest.raises(UserError, match=rf"joined the Ray cluster at {present}.*`ray.shutdown"):
        connect(None)
    with pytest.raises(UserError, match=r"`address` is '127\.0\.0\.1:1', but this process"):
        connect("127.0.0.1:1")


def test_a_cluster_with_another_ray_is_refused_with_both(
    cluster: Raylets, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = metadata.version("ray")
    python = platform.python_version()
    disconnect()
    try:
        with monkeypatch.context() as patch:
            patch.setattr("ray.__version__", "0.0.1")
            started = f"started with: Ray: {{}} Python: {python}"
            both = f"{started.format(theirs)} .*{started.format('0.0.1')}"
            with pytest.raises(UserError, match=both):
                connect(cluster.address)
    finally:
        connect(cluster.address)


def test_workers_are_counted_as_they_come_and_go(cluster: Raylets) -> None:
    trial = {"cpu": 1.0, "gpu": 1.0}
    slots = cluster.joined.slots
    with pytest.raises(
        UserError, match="the largest of 1 machine has 0 CPUs and 0 GPUs: ask for less, or add"
    ):
        slots().concurrent(trial, 2)
    events = []
    room = Room(slots, trial, 2, events.append)
    assert room(0) == 0
    node = cluster.add(num_gpus=1)
    assert slots().concurrent(trial, 2) == 1
    cluster.add(num_cpus=3, num_gpus=3)
    time.sleep(LOOK_SECONDS)
    # No more than `search.max_concurrent`.
    assert room(0) == room(1) == 2
    cluster.cluster.remove_node(node)
    cluster.nodes.remove(node)
    assert slots().fits(trial) == 3
    first, waiting, second = events
    assert [first, second] == [SlotsFound(0), SlotsFound(2)]
    assert "no machine of the cluster can run a trial" in waiting.text


LOCAL = """
import json, sys
import psutil, ray
from qpruner.cluster.connect import connect, disconnect
cluster = connect(None)
us = [psutil.Process(), *psutil.Process().children(recursive=True)]
sockets = [socket for process in us for socket in process.net_connections("tcp")]
listens = sorted({each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN})
address = ray.get_runtime_context().gcs_address
print(json.dumps([address, len(ray.nodes()), cluster.slots().largest.cpus, listens]), flush=True)
sys.stdin.readline()
print(ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
disconnect()
"""
"""Prints its cluster and the addresses on which it listens; after a line of input prints the result
of a task."""


@contextmanager
def local_run(**environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start `LOCAL` on one core, without the variables that keep Ray on loopback in tests."""
    ours = ("RAY_AUTH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    core = str(min(os.sched_getaffinity(0)))
    with subprocess.Popen(
        ["taskset", "-c", core, sys.executable, "-c", LOCAL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=kept | environment,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # the handler of Ray ends its other processes


@pytest.mark.slow
def test_a_run_without_an_address_starts_its_own_ray(cluster: Raylets, tmp_path: Path) -> None:
    """This holds on the head of a cluster, whose variables name the cluster, and for two such runs
    at once. Ray listens on loopback only, and the first run makes a token that only its owner can
    read."""
    address = cluster.address
    head = {
        "RAY_ADDRESS": address,
        "RAY_GCS_SERVER_PORT": address.rpartition(":")[2],
        "HOME": str(tmp_path),
    }
    with ExitStack() as stack:
        both = [stack.enter_context(local_run(**head)) for _ in range(2)]
        said = [json.loads(process.stdout.readline()) for process in both]
        assert len({address, *(address for address, *_ in said)}) == 3
        for _, nodes, cores, listens in said:
            # The cores that the process may use, not all of the machine.
            assert nodes == 1
            assert cores == 1
            assert listens and all(
                ip_address(each.removeprefix("::ffff:")).is_loopback for each in listens
            ), listens
        assert [process.communicate("\n")[0] for process in both] == ["42\n", "42\n"]
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert list(token.parent.iterdir()) == [token]


def test_without_a_home_folder_the_token_is_in_a_private_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In /proc not even root can create folders; Ray would fail after hours of pruning."""
    monkeypatch.setenv("HOME", "/proc/nohome")
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")  # so that the end of the test restores what is set below
        monkeypatch.delenv(name)
    ensure_token()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    first = token.read_text()
    ensure_token()
    assert len(first) == 64
    assert token.read_text() == first
    assert token.parent.parent == Path(tempfile.gettempdir())
