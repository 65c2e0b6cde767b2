"""A run without an address has a Ray of its own, whatever other clusters there are on the machine."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from raylets import raylets

from qpruner.cluster.connect import connect, disconnect
from qpruner.errors import UserError

LOCAL = """
import sys
import ray
from qpruner.cluster.connect import connect, disconnect
cluster = connect(None)
print(ray.get_runtime_context().gcs_address, len(ray.nodes()), cluster.slots().largest.cpus > 0, flush=True)
sys.stdin.readline()
print(ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
disconnect()
"""
"""Says which cluster it is in, waits for a line, and says what a task there returned."""


@contextmanager
def local_run(**environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LOCAL]
    pipe = subprocess.PIPE
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=known | environment) as process:
        try:
            yield process
        finally:
            process.terminate()  # Ray's own handler ends what it has started


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    return process.stdout.readline().split()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_run_without_an_address_joins_no_cluster() -> None:
    """Also where everything in the environment speaks of one, as on its head."""
    with raylets(1) as cluster:
        port = cluster.address.rpartition(":")[2]
        with local_run(RAY_ADDRESS=cluster.address, RAY_GCS_SERVER_PORT=port) as process:
            address, nodes, has_cores = said(process)
            assert address != cluster.address and (nodes, has_cores) == ("1", "True")
            go_on(process)
            assert said(process) == ["42"]


@pytest.mark.slow
def test_runs_that_start_together_have_a_ray_each(tmp_path: Path) -> None:
    """Until the first run there is no token; each of them needs one that its own processes have, too."""
    with ExitStack() as stack:
        both = [stack.enter_context(local_run(HOME=str(tmp_path))) for _ in range(2)]
        addresses = {said(process)[0] for process in both}
        assert len(addresses) == 2
        for process in both:
            go_on(process)
        assert [said(process) for process in both] == [["42"], ["42"]]
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and list(token.parent.iterdir()) == [token]


def test_a_process_that_has_joined_a_cluster_runs_in_no_other() -> None:
    """As in a notebook, where somebody else works with Ray, too."""
    import ray

    with raylets(0) as cluster:
        assert not connect(cluster.address).was_joined
        try:
            assert connect(cluster.address).was_joined and connect("auto").was_joined
            with pytest.raises(UserError, match=rf"joined the Ray cluster at {cluster.address} already.*`ray.shutdown"):
                connect(None)
            with pytest.raises(UserError, match=r"not the one at 127\.0\.0\.1:1; call"):
                connect("127.0.0.1:1")
            assert ray.is_initialized()
        finally:
            disconnect()


LISTENS = """
import json, psutil
from qpruner.cluster.connect import connect, disconnect
connect(None)
us = [psutil.Process(), *psutil.Process().children(recursive=True)]
sockets = [each for one in us for each in one.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
print(json.dumps(sorted({each.laddr.ip for each in sockets})))
disconnect()
"""


@pytest.mark.slow
def test_a_ray_of_our_own_listens_on_this_machine_alone() -> None:
    """Not on the address on the way to the internet, which Ray takes by itself, and on which whoever gets through may
    run code."""
    # The other tests' word for loopback (conftest.py).
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    done = subprocess.run([sys.executable, "-c", LISTENS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    listens = json.loads(done.stdout.splitlines()[-1])
    assert listens and all(ip_address(address.removeprefix("::ffff:")).is_loopback for address in listens), listens
