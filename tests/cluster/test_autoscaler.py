"""A whole run on a cluster whose head runs no work: Ray's autoscaler starts workers and ends idle
ones.

The head is a simulated machine. The workers are raylets on it, which a test provider of Ray starts
and ends; Ray counts GPUs on them that do not exist. The cluster file is the one that `ray up` would
write on the head.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from machines import ROOT, Machine, skip_where_impossible, wait_for
from real_driver import Driver, driver, search_config, search_record, trials_of

pytestmark = pytest.mark.cluster

MAX_WORKERS = 3
IDLE_SECONDS = 20.0
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""The names that the provider gives."""
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
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HOME": "/root",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
AUTOSCALER = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def cluster_file(path: Path, worker: dict[str, float]) -> Path:
    """Write the file of a cluster that starts without workers; each worker has these resources."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    resources = worker | {"object_store_memory": 80 * 2**20}
    most = MAX_WORKERS
    commands = ("setup", "head_setup", "worker_setup", "initialization")
    starts = ("head_start_ray", "worker_start_ray")
    config = {
        "cluster_name": "test",
        "max_workers": most,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": PROVIDER,
        "auth": {"ssh_user": "nobody"},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": resources,
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in (*commands, *starts)},
    }
    prepared = prepare_config(config)
    validate_config(prepared)
    path.write_text(yaml.safe_dump(prepared))
    return path


@dataclass
class Head:
    """The machine of Ray's head and of all workers."""

    machine: Machine
    folder: Path

    def num_workers(self) -> int:
        """Count the raylets of workers."""
        return sum("/raylet/raylet " in line for line in self.machine.processes()) - 1

    def driver(self, verb: str, config: Path, *options: str) -> AbstractContextManager[Driver]:
        """Start a `qpruner` process on the head."""
        inside = self.machine.entered(self.folder)
        return driver(
            config, "--address", "auto", *options, verb=verb, inside=inside, **ENVIRONMENT
        )

    def most_seen(self, process: Driver, until: Callable[[], bool]) -> Counter[str]:
        """Watch until the condition holds; return the largest numbers of workers, trials in flight
        and begun trials."""
        most = Counter[str]()
        deadline = time.monotonic() + 900
        while not until():
            assert time.monotonic() < deadline, process.said()[-4000:]
            running = [
                trial for trial in trials_of(process.run).values() if trial["status"] == "running"
            ]
            begun = sum(bool(trial["worker"]) for trial in running)
            most |= Counter(
                {"workers": self.num_workers(), "in flight": len(running), "begun": begun}
            )
            time.sleep(0.25)
        return most


@contextmanager
def started(
    folder: Path, base: Path, worker: dict[str, float], num_cpus: int = 0
) -> Iterator[Head]:
    """Start a head without workers."""
    skip_where_impossible()
    folder.mkdir()
    machine = Machine(
        folder / "head", [base, ROOT, Path(sys.prefix), Path(sys.base_prefix)], "sleep infinity"
    )
    try:
        file = cluster_file(folder / "cluster.yaml", worker)
        command = (
            "ray start --head --node-ip-address=127.0.0.1 --port=6379 "
            f"--num-cpus={num_cpus} --num-gpus=0 --object-store-memory={80 * 2**20} "
            f"--include-dashboard=false --autoscaling-config={file}"
        )
        done = machine.run(command.split(), ENVIRONMENT | AUTOSCALER, folder, 240)
        assert done.returncode == 0, done.stdout
        yield Head(machine, folder)
    finally:
        machine.end()


def config_of(model: Path, folder: Path, **keys: object) -> Path:
    """Write the configuration of a small run."""
    given = {
        "sensitivity.methods": ["mutual_information"],
        "finetune.compare": False,
        "search.steps": 16,
    }
    return search_config(
        model, folder / "small", **{**given, "search.max_concurrent": None, **keys}
    )


def test_a_run_starts_workers_that_end_when_idle(
    tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The first stage starts one worker, and two trials in flight start a second; no third worker
    starts. A trial that is too large for every node type is refused before any worker starts."""
    with started(
        tmp_path / "cluster", tmp_path_factory.getbasetemp(), {"CPU": 1, "GPU": 1}
    ) as head:
        config = config_of(
            tiny_model, tmp_path, **{"search.max_trials": 6, "search.max_concurrent": 2}
        )
        with head.driver(
            "check", config, "--set", "search.resources_per_trial={cpu: 1, gpu: 2}"
        ) as large:
            code, said = large.end()
        assert code == 2
        largest = (
            "the largest of 1 machine and of those that the autoscaler may start "
            "has 1 CPUs and 1 GPUs:"
        )
        assert largest in said
        assert head.num_workers() == 0

        with head.driver("run", config) as process:
            most = head.most_seen(process, lambda: process.process.poll() is not None)
            code, said = process.end()
        assert code == 0, said[-4000:]
        assert (process.run / "report.md").exists()
        assert sorted(trials_of(process.run)) == list(range(6))
        assert most == {"workers": 2, "in flight": 2, "begun": 2}
        wait_for(lambda: head.num_workers() == 0, "the end of idle workers", 3 * IDLE_SECONDS + 60)


def test_trials_that_wait_for_workers_never_begin_at_the_end(
    tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The autoscaler is stopped, as if the cloud had no quota: one trial runs on the head and three
    wait. Neither after Ctrl-C nor after `search.max_hours` does a waiting trial begin; the running
    trial finishes its rung."""
    with started(
        tmp_path / "cluster", tmp_path_factory.getbasetemp(), {"CPU": 1}, num_cpus=1
    ) as head:
        for process in head.machine.first.children(recursive=True):
            if any(argument.startswith("--autoscaling-config=") for argument in process.cmdline()):
                process.send_signal(signal.SIGSTOP)
        resources = {"cpu": 1, "gpu": 0}
        config = config_of(
            tiny_model,
            tmp_path,
            **{"search.max_trials": 60, "search.resources_per_trial": resources},
        )
        with head.driver("search", config) as run:
            most = head.most_seen(
                run, lambda: any(trial["rungs"] for trial in trials_of(run.run).values())
            )
            assert most == {"in flight": 1 + MAX_WORKERS, "begun": 1}
            # nsenter does not pass the signal on to the command.
            psutil.Process(run.process.pid).children()[0].send_signal(signal.SIGINT)
            code, said = run.end()
        assert code == 130, said[-4000:]
        waiting = [trial for trial in trials_of(run.run).values() if not trial["worker"]]
        assert len(waiting) >= MAX_WORKERS - 1
        assert not any(trial["rungs"] for trial in waiting)

        with head.driver("search", config, "--set", "search.max_hours=0.01") as again:
            code, said = again.end()
        assert code == 0, said[-4000:]
        trials = trials_of(run.run).values()
        assert 0 < len(trials) < 60
        assert all(trial["status"] != "running" for trial in trials)
        assert search_record(run.run)["ended"].endswith("`search.max_hours` is 0.01)")
