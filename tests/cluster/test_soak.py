"""The soak: a real search on three raylets while its driver, its workers and their machines are killed at random.

    pytest -m cluster tests/cluster/test_soak.py -s

prints what was killed and how long it all took.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylets import Raylets, raylets
from real_driver import Driver, driver, search_config, search_record, trials_of

from qpruner.config.load import load_config
from qpruner.runs.records import BankRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import file_digest, folder_digests

pytestmark = pytest.mark.cluster

NUM_KILLS, NUM_NODES, SEED = 20, 3, 0
SHARE_AT_WORK = 0.75
"""Kills that wait until trials run; the others come at any time, on a busy machine mostly while a driver starts."""
TRIALS_A_ROUND = 8
"""A search that is over before the last kill is given so many trials more."""


@dataclass
class Killer:
    """SIGKILL at random instants to a random victim.

    Attributes:
        killed: How often, by the kind of victim.
        orphans: What raylets had started when they were killed.
    """

    cluster: Raylets
    generator: random.Random = field(default_factory=lambda: random.Random(SEED))
    killed: Counter[str] = field(default_factory=Counter)
    orphans: list[psutil.Process] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return sum(self.killed.values()) >= NUM_KILLS

    def disturb(self, process: Driver) -> None:
        """Kill until the driver has ended or there were kills enough."""
        while not self.is_done:
            at_work = self.generator.random() < SHARE_AT_WORK
            while at_work and not working(process.run) and process.process.poll() is None:
                time.sleep(0.05)
            instant = time.monotonic() + self.generator.uniform(1.0, 15.0)
            while time.monotonic() < instant:
                if process.process.poll() is not None:
                    return
                time.sleep(0.05)
            victim = self.generator.choice(("driver", "worker", "raylet"))
            if victim == "driver":
                process.process.send_signal(signal.SIGKILL)
                process.process.wait()
            elif victim == "raylet":
                node = self.generator.choice(self.cluster.nodes)
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                self.orphans += raylet.children(recursive=True)
                self.cluster.kill(node)
                self.cluster.add()
            elif not self._kill_worker(process):
                return
            self.killed[victim] += 1
            if victim == "driver":
                return

    def _kill_worker(self, process: Driver) -> bool:
        """Wait for one at work, so that their share of the kills is theirs; False if the driver ends first."""
        while process.process.poll() is None:
            if workers := working(process.run):
                with suppress(ProcessLookupError):
                    os.kill(self.generator.choice(workers), signal.SIGKILL)
                    return True
            time.sleep(0.05)
        return False


def working(run: Path) -> list[int]:
    """The processes that trials run in."""
    running = {index for index, trial in trials_of(run).items() if trial["status"] == "running"}
    pulses = [path for path in run.glob("trials/*/*/pulse.json") if int(path.parent.name) in running]
    pids = {json.loads(path.read_text())["pid"] for path in pulses}
    return sorted(pid for pid in pids if psutil.pid_exists(pid))


def test_twenty_kills_cost_no_trial_and_repeat_no_plan(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = search_config(tiny_model, tmp_path, **{"search.max_concurrent": NUM_NODES})
    with driver(config, verb="sensitivity") as process:
        code, said = process.end()
        assert code == 0, said[-3000:]
    started, num_trials, num_drivers = time.monotonic(), TRIALS_A_ROUND, 0
    finished: dict[int, dict[str, Any]] = {}
    with raylets(NUM_NODES) as cluster:
        session = cluster.cluster.head_node.get_session_dir_path()
        killer = Killer(cluster)
        code = None
        while not (killer.is_done and code == 0):
            num_trials += TRIALS_A_ROUND if code == 0 else 0
            options = ("--address", cluster.address, "--set", f"search.max_trials={num_trials}")
            num_drivers += 1
            with driver(config, *options) as process:
                killer.disturb(process)
                code, said = process.end()
            assert code in (0, -signal.SIGKILL), said[-4000:]
            trials = trials_of(tmp_path / "run")
            assert finished == {index: trials[index] for index in finished}, "what is finished is not run again"
            finished = {index: trial for index, trial in trials.items() if trial["status"] == "finished"}
            assert num_drivers < 3 * NUM_KILLS
    check_trials(tmp_path / "run", config, num_trials)
    check_files(tmp_path / "run")
    wait_for(lambda: not of_session(session), "Ray's processes to be gone")
    # Workers have titles of their own, and those of a raylet that was killed are nobody's children by now.
    _, left = psutil.wait_procs(killer.orphans, timeout=120)
    assert not left, left
    told = ", ".join(f"{number} {victim}s" for victim, number in sorted(killer.killed.items()))
    statuses = Counter(trial["status"] for trial in trials_of(tmp_path / "run").values())
    with capsys.disabled():
        print(f"\nkilled {told}; {num_drivers} drivers, {num_trials} trials {dict(statuses)}", end="; ")
        print(f"{time.monotonic() - started:.0f} s")


def check_trials(run: Path, config: Path, number: int) -> None:
    """Every planned trial is there once, with its rungs in order, and no plan twice."""
    trials, record = trials_of(run), search_record(run)
    assert sorted(trials) == list(range(number)) and record["num_trials"] == number
    plans = [tuple(trial["plan"].values()) for trial in trials.values()]
    assert len(set(plans)) == number
    statuses = Counter(trial["status"] for trial in trials.values())
    assert set(statuses) <= {"finished", "stopped", "failed"}
    assert (statuses["finished"], statuses["stopped"], statuses["failed"]) == (
        record["num_finished"],
        record["num_stopped"],
        record["num_failed"],
    )
    # Three deaths in a row without a rung between them may happen to a trial here; nothing else may.
    assert set(record["failures"]) <= {"lost"}, record["failures"]
    rungs = load_config(config).search.rungs
    for trial in trials.values():
        steps = tuple(rung["step"] for rung in trial["rungs"])
        assert steps == rungs[: len(steps)]
        assert (steps == rungs) == (trial["status"] == "finished")


def check_files(run: Path) -> None:
    """The last checkpoint of every trial and the bank are whole."""
    for path in run.glob("trials/*/*/trial.json"):
        trial = json.loads(path.read_text())
        if trial["rungs"]:
            checkpoint = path.parent / f"checkpoint-{trial['rungs'][-1]['step']}"
            assert folder_digests(checkpoint) == trial["checkpoint"], checkpoint
    bank = RunDir(run).read_record("bank", BankRecord)
    assert bank is not None
    assert {name: file_digest(run / "bank" / name) for name in bank.files} == bank.files


def of_session(session: str) -> list[psutil.Process]:
    """Processes of this cluster."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(session in argument for argument in process.info["cmdline"] or ()):
            found.append(process)
    return found


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.5)
