"""A real `ray up` of launch/cluster_onprem.yaml on four machines made of namespaces, and a real search on it, in two parts.

Everything goes through the launch scripts, as in docs/cluster.md: up, submit attached and as a job, watch, fetch, down.
What stands in for the real thing: /shared is another folder, the packages are installed already, and the head has no
cores for trials, so that what runs has run on the workers.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from machines import ROOT, Machines, link_environment, skip_where_impossible, small_config, trials_of, wait_for

pytestmark = pytest.mark.cluster

MINUTES = 60.0


@dataclass
class Cluster:
    """The machines, a cluster file for them, and the folder that they share."""

    machines: Machines
    file: Path
    shared: Path

    def laptop(
        self, *command: str, seconds: float = 5 * MINUTES, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop, in the repository."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        base = {"PATH": path, "HOME": "/root", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        return self.machines.laptop.run(list(command), base | environment, ROOT, seconds)

    def script(self, name: str, *arguments: str, seconds: float = 5 * MINUTES) -> str:
        """Run a launch script on the laptop; returns what it printed."""
        done = self.laptop("bash", f"launch/{name}", *arguments, seconds=seconds)
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Machines that nothing has been started on."""
    skip_where_impossible()
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("needs Ray's job server: pip install 'qpruner[cluster]'")
    folder = tmp_path_factory.mktemp("cluster")
    shared = folder / "shared"
    shared.mkdir()
    visible = [tmp_path_factory.getbasetemp(), ROOT, Path(sys.prefix), Path(sys.base_prefix)]
    machines = Machines(folder / "machines", visible, num_hosts=3)
    try:
        for host in machines.hosts:
            link_environment(host.home / "qpruner")
            (host.home / ".profile").write_text(
                f"export PATH={sys.prefix}/bin:$PATH PYTHONPATH=/root/qpruner HF_HUB_OFFLINE=1\n"
            )
        text = (ROOT / "launch" / "cluster_onprem.yaml").read_text()
        head, *workers = machines.addresses
        for placeholder, value in {
            "HEAD-REPLACE": head,
            "WORKER-REPLACE": ", ".join(workers),
            "USER-REPLACE": "root",
            "/shared": str(shared),
            "--head": "--head --num-cpus=0",
        }.items():
            assert placeholder in text
            text = text.replace(placeholder, value)
        file = folder / "cluster.yaml"
        file.write_text(text)
        yield Cluster(machines, file, shared)
    finally:
        machines.end()


def test_up_submit_watch_fetch_down(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    before = kept_by_ray_up()
    file, head = str(cluster.file), cluster.machines.addresses[0]
    told = cluster.script("up.sh", file, seconds=5 * MINUTES)
    assert "what it names answers" in told
    wait_for(lambda: watched(cluster).count("ALIVE") == 3, "three nodes", seconds=10 * MINUTES)
    refuses_callers_without_the_token(cluster, head)

    run = cluster.shared / "small"
    config = small_config(tmp_path / "small.yaml", tiny_model, run)
    told = cluster.script("submit.sh", "--attached", file, str(config), seconds=20 * MINUTES)
    assert "== qpruner run tune_configs/small.yaml --address auto" in told
    assert len(trials_of(run)) == 3

    # A job that goes on from there with one more trial; the space is one that three shells have to leave alone.
    told = cluster.script("submit.sh", file, str(config), "--set", "search.max_trials= 4")
    job = told.split("follow: bash launch/watch.sh CLUSTER.yaml ")[1].split()[0]
    told = cluster.script("watch.sh", file, job, seconds=20 * MINUTES)
    assert "already recorded" in told
    assert len(trials_of(run)) == 4
    assert "SUCCEEDED" in watched(cluster)

    cluster.script("fetch.sh", file, str(run), str(tmp_path / "fetched"))
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == {"report.md", "results.json", "records", "final"}

    cluster.script("down.sh", file)
    hosts = cluster.machines.hosts
    wait_for(lambda: not any(host.processes() for host in hosts), "the end of all Ray processes", seconds=MINUTES)
    cluster.machines.end()
    assert not any(psutil.pid_exists(machine.first.pid) for machine in [*hosts, cluster.machines.laptop])
    assert kept_by_ray_up() == before, "what Ray's launcher keeps in /tmp was the laptop's own"


def kept_by_ray_up() -> set[Path]:
    """What the launcher leaves on the machine that calls it."""
    return {path for pattern in ("ray-config-*", "ray_ssh_*", "ray/cluster-*") for path in Path("/tmp").glob(pattern)}


def watched(cluster: Cluster) -> str:
    return cluster.script("watch.sh", str(cluster.file))


def refuses_callers_without_the_token(cluster: Cluster, head: str) -> None:
    """The laptop reaches the head's ports, but has no token."""
    nodes = ("timeout", "60", "ray", "status", "--address", f"{head}:6379")
    refused = cluster.laptop(*nodes, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode != 0
    assert "nvalid" in refused.stdout, refused.stdout
    refused = cluster.laptop(*nodes, RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0
    token = cluster.machines.hosts[0].home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0, "the token is its owner's alone"
    allowed = cluster.laptop(*nodes, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token.read_text())
    assert allowed.returncode == 0, allowed.stdout
    # The job server listens on the head's loopback only, and asks for the token there, too.
    jobs = ("timeout", "60", "ray", "job", "list", "--address")
    away = cluster.laptop(*jobs, f"http://{head}:8265", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token.read_text())
    assert away.returncode != 0
    there = cluster.laptop(
        "ray", "exec", str(cluster.file), "RAY_AUTH_MODE=disabled timeout 60 ray job list", seconds=2 * MINUTES
    )
    assert "401" in there.stdout or "Unauthorized" in there.stdout, there.stdout
