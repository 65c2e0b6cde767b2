"""launch/slurm.sbatch, unchanged, under a real SLURM with two simulated machines as nodes.

SLURM counts eight cores and one GPU on each node; in truth the nodes share this machine's cores,
and trials use CPUs.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machines import ROOT, Machine, link_environment, machines, num_trials, small_config, wait_for

pytestmark = pytest.mark.cluster

MINUTES = 60.0
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=host0({addresses[0]})
SlurmUser=root
StateSaveLocation=/tmp/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/tmp/slurmctld.log
SlurmdLogFile=/tmp/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
MailProg=/bin/true
ReturnToService=2
GresTypes=gpu
NodeName=host0 NodeAddr={addresses[0]} CPUs=8 Gres=gpu:1
NodeName=host1 NodeAddr={addresses[1]} CPUs=8 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """The nodes, and a checkout that they share."""

    nodes: list[Machine]
    checkout: Path
    environment: dict[str, str]

    def run(self, *command: str, node: int = 0) -> str:
        """Run a command in the checkout, by default on the first node; return its output."""
        done = self.nodes[node].run(list(command), self.environment, self.checkout, 10 * MINUTES)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def submit(self, *options: str) -> tuple[str, str]:
        """Submit a job and wait for its end; return its state and its log."""
        job = self.run("sbatch", "--parsable", *options)
        state = lambda: self.run("scontrol", "show", "job", job).split("JobState=")[1].split()[0]  # noqa: E731
        under_way = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING")
        wait_for(lambda: state() not in under_way, "its end", seconds=40 * MINUTES)
        return state(), (self.checkout / f"qpruner-{job}.log").read_text()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM cluster with two idle nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    checkout = folder / "checkout"
    key = folder / "munge.key"
    conf = folder / "slurm.conf"
    tools = ("munged", "slurmctld", "slurmd", "sbatch")
    visible = [tmp_path_factory.getbasetemp()]
    with machines(folder / "machines", visible, 2, *tools) as made:
        for name in ("qpruner", "launch"):
            shutil.copytree(
                ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        link_environment(checkout)
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        conf.write_text(SLURM_CONF.format(addresses=made.addresses))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        environment = {
            "PATH": f"/usr/sbin:/sbin:{os.environ['PATH']}",
            "HOME": "/root",
            "SLURM_CONF": str(conf),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(checkout),
            "HF_HUB_OFFLINE": "1",
        }
        cluster = Slurm(made.hosts, checkout, environment)
        munge = f"mkdir -p /run/munge && munged --force --key-file={key} --pid-file=/run/munge/pid"
        for node in range(2):
            files = "--log-file=/tmp/munged.log --seed-file=/tmp/munged.seed"
            cluster.run("sh", "-c", f"{munge} {files}", node=node)
        cluster.run("sh", "-c", "mkdir -p /tmp/state && slurmctld")
        for node in range(2):
            cluster.run("slurmd", node=node)
        idle = lambda: cluster.run("sinfo", "--noheader", "--format=%D %t") == "2 idle"  # noqa: E731
        wait_for(idle, "two idle nodes", seconds=5 * MINUTES)
        yield cluster


def test_a_search_under_slurm(slurm: Slurm, tiny_model: Path) -> None:
    output = slurm.checkout / "runs" / "small"
    config = small_config(slurm.checkout / "small.yaml", tiny_model, output)
    state, text = slurm.submit("launch/slurm.sbatch", config.name, "--set", "seed=1")
    assert state == "COMPLETED", text[-5000:]
    assert "== ray symmetric-run on 2 nodes" in text
    assert "2/2" in text or "Ray runtime started" in text, text[:3000]
    assert num_trials(output) == 3
    # The token is deleted at the end.
    assert not list(slurm.checkout.glob(".ray-token-*"))
    for node in slurm.nodes:
        assert not re.search("raylet|gcs_server", "\n".join(node.processes()))


def test_a_job_fails_if_ray_does_not_start(slurm: Slurm, tiny_model: Path) -> None:
    """Another process listens on Ray's port. `ray symmetric-run` itself exits with 0 (Ray 2.60)."""
    config = small_config(
        slurm.checkout / "refused.yaml", tiny_model, slurm.checkout / "runs" / "refused"
    )
    listen = "import socket, time; server = socket.create_server(('', 6379)); time.sleep(1200)"
    slurm.run("sh", "-c", f'{sys.executable} -c "{listen}" > /dev/null 2>&1 &')
    state, text = slurm.submit("--nodes=1", "--nodelist=host0", "launch/slurm.sbatch", config.name)
    assert state == "FAILED" and "error: Ray did not start, and nothing was run" in text, text[
        -3000:
    ]
    assert not list(slurm.checkout.glob(".ray-token-*"))
    assert not list(slurm.checkout.glob(".exit-code-*"))
