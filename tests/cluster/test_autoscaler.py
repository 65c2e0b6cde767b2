"""A whole run on a cluster of a head that can run nothing: Ray's own autoscaler starts its workers and takes them back.

The head is a machine made of namespaces, the workers are raylets on it, started and ended by Ray's provider for such
tests; their GPUs are counted, not there. The cluster file is as `ray up` leaves it on the head.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import raw_config, with_key
from machines import ROOT, Machine, skip_where_impossible, wait_for

pytestmark = pytest.mark.cluster

MAX_WORKERS = 3
IDLE_SECONDS = 20.0
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""As the provider calls them."""
PROVIDER = {
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
    "launch_multiple": True,
    "head_node_id": HEAD_ID,
    "gcs_address": "127.0.0.1:6379",
}
COMMANDS = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")


def cluster_file(path: Path, worker: dict[str, float]) -> Path:
    """A cluster of workers of this size, none at first."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = {
        "cluster_name": "test",
        "max_workers": MAX_WORKERS,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": PROVIDER,
        "auth": {"ssh_user": "nobody"},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": worker | {"object_store_memory": 80 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MAX_WORKERS,
            },
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in COMMANDS},
    }
    prepared = prepare_config(config)
    validate_config(prepared)
    path.write_text(yaml.safe_dump(prepared))
    return path


@dataclass
class Head:
    """The machine that Ray's head runs on, and all its workers."""

    machine: Machine
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": "/root",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, version: int, file: Path, num_cpus: int) -> None:
        """`ray start` with an autoscaler of this version."""
        environment = {
            "RAY_enable_autoscaler_v2": str(version - 1),
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        command = f"ray start --head --node-ip-address=127.0.0.1 --port=6379 --num-cpus={num_cpus} --num-gpus=0 "
        command += f"--object-store-memory={80 * 2**20} --include-dashboard=false --autoscaling-config={file}"
        done = self.machine.run(command.split(), self.environment | environment, self.folder, 240)
        assert done.returncode == 0, done.stdout

    def num_workers(self) -> int:
        """Raylets besides the head's."""
        return sum("/raylet/raylet " in line for line in self.machine.processes()) - 1

    def monitor(self) -> psutil.Process:
        """The autoscaler's process."""
        return next(
            process
            for process in self.machine.first.children(recursive=True)
            if any(argument.startswith("--autoscaling-config=") for argument in process.cmdline())
        )

    def run(self, verb: str, config: Path, *options: str) -> Run:
        """Start `qpruner` there."""
        out = self.folder / f"out-{time.monotonic_ns()}.txt"
        command = [sys.executable, "-m", "qpruner", verb, str(config), "--address", "auto", *options]
        with out.open("w") as file:
            process = subprocess.Popen(
                [*self.machine.entered(self.folder), *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Tests that were started in the background ignore Ctrl-C, and what they start would, too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return Run(process, Path(yaml.safe_load(config.read_text())["output"]), out)


@dataclass
class Run:
    """A `qpruner` process, and the most that was seen of it."""

    process: subprocess.Popen[bytes]
    folder: Path
    out: Path
    most: dict[str, int] = field(default_factory=dict)

    def said(self) -> str:
        return self.out.read_text()

    def trials(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.glob("trials/*/*/trial.json")):
            try:
                found.append(json.loads(path.read_text()))
            except FileNotFoundError:  # withdrawn meanwhile
                continue
        return found

    def see(self, head: Head) -> None:
        """Keep the most workers, trials in flight and trials that workers had at once."""
        running = [trial for trial in self.trials() if trial["status"] == "running"]
        begun = [trial for trial in running if trial["worker"]]
        for name, number in (("workers", head.num_workers()), ("in flight", len(running)), ("begun", len(begun))):
            self.most[name] = max(number, self.most.get(name, 0))

    def wait_until(self, head: Head, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Watch it until something is so, which must be while it lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()[-4000:]
            self.see(head)
            time.sleep(0.25)

    def end(self, head: Head, seconds: float = 600) -> int:
        """Watch it to its end; returns its exit code."""
        deadline = time.monotonic() + seconds
        while (code := self.process.poll()) is None:
            assert time.monotonic() < deadline, self.said()[-4000:]
            self.see(head)
            time.sleep(0.25)
        return code

    def interrupt(self) -> None:
        """Ctrl-C; what enters a machine does not pass it on."""
        psutil.Process(self.process.pid).children()[0].send_signal(signal.SIGINT)


@contextmanager
def started(folder: Path, base: Path, version: int, worker: dict[str, float], num_cpus: int = 0) -> Iterator[Head]:
    """A head without workers."""
    skip_where_impossible()
    folder.mkdir()
    machine = Machine(folder / "head", [base, ROOT, Path(sys.prefix), Path(sys.base_prefix)], "sleep infinity")
    try:
        head = Head(machine, folder)
        head.start(version, cluster_file(folder / "cluster.yaml", worker), num_cpus)
        yield head
    finally:
        machine.end()


def config_of(model: Path, folder: Path, **keys: Any) -> Path:
    """A small run's file."""
    raw = raw_config(model, folder / "run")
    settings = {
        "sensitivity.methods": ["mutual_information"],
        "finetune.compare": False,
        "search.steps": 16,
        "search.first_rung": 4,
    }
    for key, value in (settings | keys).items():
        raw = with_key(raw, key, value)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("version", [2, 1])
def test_a_run_starts_its_workers_and_they_go_when_they_idle(
    version: int, tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From nothing: the first stage waits for the first worker, the trials for a second; no third one ever comes, since
    two trials may be in flight. A trial that is too large for every type is refused before anything is started."""
    base = tmp_path_factory.getbasetemp()
    with started(tmp_path / "cluster", base, version, {"CPU": 1, "GPU": 1}) as head:
        config = config_of(tiny_model, tmp_path, **{"search.max_trials": 6, "search.max_concurrent": 2})
        large = head.run("check", config, "--set", "search.resources_per_trial={cpu: 1, gpu: 2}")
        assert large.end(head) == 2
        expected = "the largest of 1 and of those that the autoscaler may start has 1 CPUs and 1 GPUs: ask for less"
        assert expected in large.said()

        assert head.num_workers() == 0
        run = head.run("run", config)
        assert run.end(head) == 0, run.said()[-4000:]
        assert (run.folder / "report.md").exists()
        assert run.most == {"workers": 2, "in flight": 2, "begun": 2}
        assert [trial["index"] for trial in run.trials()] == list(range(6))
        wait_for(lambda: head.num_workers() == 0, "the end of idle workers", 3 * IDLE_SECONDS + 60)


def test_what_waits_for_workers_that_never_come_is_left_alone(
    tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The autoscaler is stopped, as good as one without quota: one trial at a time runs on the head, three more wait.
    Ctrl-C waits for the one, and begins none of the others; nor does a search whose hours are over."""
    base = tmp_path_factory.getbasetemp()
    with started(tmp_path / "cluster", base, 2, {"CPU": 1}, num_cpus=1) as head:
        head.monitor().send_signal(signal.SIGSTOP)
        resources = {"cpu": 1, "gpu": 0}
        config = config_of(tiny_model, tmp_path, **{"search.max_trials": 60, "search.resources_per_trial": resources})
        run = head.run("search", config)
        run.wait_until(head, lambda: any(trial["rungs"] for trial in run.trials()))
        assert run.most == {"workers": 0, "in flight": 1 + MAX_WORKERS, "begun": 1}
        run.interrupt()
        assert run.end(head) == 130, run.said()[-4000:]
        waiting = [trial for trial in run.trials() if not trial["worker"]]
        assert len(waiting) >= MAX_WORKERS - 1 and not any(trial["rungs"] for trial in waiting)

        again = head.run("search", config, "--set", "search.max_hours=0.02")
        assert again.end(head) == 0, again.said()[-4000:]
        trials = again.trials()
        assert 0 < len(trials) < 60 and all(trial["status"] != "running" for trial in trials)
        assert json.loads((run.folder / "records" / "search.json").read_text())["ended"].endswith(
            "`search.max_hours` is 0.02)"
        )
