"""A real `ray up` of launch/cluster_onprem.yaml on simulated machines, and a real search there in
two parts.

All commands are the launch scripts, as in docs/cluster.md: up, submit (attached and as a job),
watch, fetch, down. Different from a real cluster, /shared is another folder, the packages are
already installed, and the head has no cores for trials, so that all trials run on workers.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pytest
from machines import ROOT, Machines, link_environment, machines, num_trials, small_config, wait_for

pytestmark = pytest.mark.cluster

NUM_WORKERS = 2
PATIENCE_SECONDS = 30 * 60.0
"""The limit for each step; only a busy machine comes near it."""
BUSY = (
    "RAY_agent_register_timeout_ms=600000 RAY_gcs_server_port_wait_time_s=300 "
    "RAY_raylet_start_wait_time_s=90 AUTOSCALER_HEARTBEAT_TIMEOUT_S=600 "
    "RAY_health_check_timeout_ms=60000 RAY_health_check_failure_threshold=20"
)
"""Longer limits of Ray for a busy machine.

The 15 s for the agents of a raylet cannot be changed.
"""
CLIENT = "import sys, ray; ray.init(sys.argv[1]); print('let in')"


@dataclass
class Cluster:
    """The machines, their cluster file, and the folder that they share."""

    machines: Machines
    file: Path
    shared: Path
    modes: Iterator[str] = field(default_factory=lambda: itertools.cycle(("token", "disabled")))
    """Of Ray's authentication on the laptop, for one script after the other: Ray 2.61 turns it on
    everywhere."""

    def laptop(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository on the laptop, which has no token of its own."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        base = {"PATH": path, "HOME": "/root", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        return self.machines.laptop.run(list(command), base | environment, ROOT, PATIENCE_SECONDS)

    def script(self, name: str, *arguments: str) -> str:
        """Run a launch script for this cluster on the laptop; return its output."""
        mode = next(self.modes)
        done = self.laptop(
            "bash", *f"launch/{name}".split(), str(self.file), *arguments, RAY_AUTH_MODE=mode
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    def submit(self, config: Path, *options: str) -> str:
        """Submit a search as a job; return the name of the job."""
        printed = self.script("submit.sh", str(config), *options)
        return printed.split(f"follow: bash launch/watch.sh {self.file} ")[1].split()[0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Machines on which nothing has been started."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("needs Ray's job server: pip install 'qpruner[cluster]'")
    folder = tmp_path_factory.mktemp("cluster")
    shared = folder / "shared"
    file = folder / "cluster.yaml"
    shared.mkdir()
    # The same command writes `versions.txt` on a head.
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    versions = subprocess.run(freeze, check=True, capture_output=True).stdout
    with machines(
        folder / "machines", [tmp_path_factory.getbasetemp(), ROOT], 1 + NUM_WORKERS
    ) as made:
        for host in made.hosts:
            link_environment(host.home / "qpruner", b"" if host is made.hosts[0] else versions)
            profile = (
                f"export PATH={sys.prefix}/bin:$PATH PYTHONPATH=/root/qpruner "
                f"HF_HUB_OFFLINE=1 {BUSY}\n"
            )
            (host.home / ".profile").write_text(profile)
        text = (ROOT / "launch" / "cluster_onprem.yaml").read_text()
        head, *workers = made.addresses
        for placeholder, value in {
            "HEAD-REPLACE": head,
            "WORKER-REPLACE": ", ".join(workers),
            "USER-REPLACE": "root",
            "/shared": str(shared),
            "--head": "--head --num-cpus=0",
        }.items():
            assert placeholder in text
            text = text.replace(placeholder, value)
        file.write_text(text)
        yield Cluster(made, file, shared)


def test_up(cluster: Cluster) -> None:
    assert "what it names answers" in cluster.script("up.sh")
    nodes = 1 + NUM_WORKERS
    wait_for(
        lambda: cluster.script("watch.sh").count("ALIVE") == nodes, "all nodes", PATIENCE_SECONDS
    )


def test_callers_without_the_token_are_refused(cluster: Cluster) -> None:
    """The laptop reaches the head's ports, Ray's client server among them, but has no token."""
    head = cluster.machines.addresses[0]
    token = cluster.machines.hosts[0].home / ".ray" / "auth_token"
    # The token is its owner's alone.
    assert token.stat().st_mode & 0o077 == 0
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token.read_text()}
    wrong = right | {"RAY_AUTH_TOKEN": "0" * 64}
    none = {"RAY_AUTH_MODE": "disabled"}

    def is_accepted(*command: str, **given: str) -> bool:
        return cluster.laptop(*command, **given).returncode == 0

    for command in (
        ("ray", "status", "--address", f"{head}:6379"),
        ("python", "-c", CLIENT, f"ray://{head}:10001"),
    ):
        # On a busy machine the client server may give up before it has started the process of a
        # client.
        wait_for(
            partial(is_accepted, *command, **right), f"an answer to {command}", PATIENCE_SECONDS
        )
        assert not is_accepted(*command, **wrong) and not is_accepted(*command, **none), command
    # The job server listens on the head's loopback only, and requires the token there as well.
    assert not is_accepted("ray", "job", "list", "--address", f"http://{head}:8265", **right)
    ask = "import urllib.request as r; r.urlopen('http://127.0.0.1:8265/api/jobs/')"
    there = cluster.laptop("ray", "exec", str(cluster.file), f'python -c "{ask}"')
    assert "HTTP Error 401" in there.stdout, there.stdout


def test_the_log_shows_a_mistake_in_the_configuration(cluster: Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("modle: {source: x}\n")
    # The shells of the laptop, of ssh and of the job change nothing in an argument.
    argument = """output=~/R&D; "$HOME" `id` 100% '*' \\ end"""
    job = cluster.submit(wrong, "--set", argument)
    # If a job fails at once, `ray job logs --follow` may end before the last lines.
    wait_for(lambda: "modle" in cluster.script("watch.sh", job), "the mistake", PATIENCE_SECONDS)
    as_typed = f"== qpruner run tune_configs/wrong.yaml --address auto --set {argument}\n"
    assert as_typed in cluster.script("watch.sh", job)
    assert "FAILED" in cluster.script("watch.sh")
    attached = cluster.laptop(
        "bash", "launch/submit.sh", "--attached", str(cluster.file), str(wrong), "--set", argument
    )
    assert as_typed in attached.stdout.replace("\r\n", "\n")
    assert attached.returncode


def test_a_job_resumes_a_search_that_was_run_attached(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    run = cluster.shared / "small"
    config = small_config(tmp_path / "small.yaml", tiny_model, run)
    said = cluster.script("submit.sh --attached", str(config))
    assert "== qpruner run tune_configs/small.yaml --address auto" in said
    assert num_trials(run) == 3
    # One more trial.
    job = cluster.submit(config, "--set", "search.max_trials=4")
    assert "already recorded" in cluster.script("watch.sh", job)
    assert num_trials(run) == 4
    assert "SUCCEEDED" in cluster.script("watch.sh")
    cluster.script("fetch.sh", str(run), str(tmp_path / "fetched"))
    fetched = {path.name for path in (tmp_path / "fetched").iterdir()}
    assert fetched == {"report.html", "report.md", "pictures", "results.json", "records", "final"}
    places = (str(cluster.file), str(run), str(tmp_path / "part"))
    part = cluster.laptop("bash", "launch/fetch.sh", *places, "gone", "records")
    assert part.returncode == 1 and "error: not fetched: gone; " in part.stdout, part.stdout[-3000:]
    # The other parts are fetched.
    assert (tmp_path / "part" / "records").is_dir()


def test_down_leaves_nothing(cluster: Cluster) -> None:
    cluster.script("down.sh")
    hosts = cluster.machines.hosts
    wait_for(
        lambda: not any(host.processes() for host in hosts),
        "the end of all Ray processes",
        PATIENCE_SECONDS,
    )
    cluster.machines.end()
    assert not any(
        psutil.pid_exists(machine.first.pid) for machine in [*hosts, cluster.machines.laptop]
    )
    # Ray's launcher wrote only to /tmp of the laptop.
    for name in ("ray-config-*", "ray_ssh_*", "ray/cluster-*"):
        assert not list(Path("/tmp").glob(name))
