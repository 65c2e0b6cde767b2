"""A real search over two cuts on three raylets whose driver, workers and raylets are killed at
random.

`pytest -m cluster tests/cluster/test_soak.py -s` prints the numbers of kills and the time.
"""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from raylets import Raylets, raylets
from real_driver import Driver, driver, ended, pulse_of, search_config, search_record, trials_of

from qpruner.config.load import load_config
from qpruner.runs.storage import folder_digests

pytestmark = pytest.mark.cluster

NUM_KILLS = 10
NUM_NODES = 3
SEED = 0
TRIALS_A_ROUND = 5
"""The trials at first, and those that are added if the search is over before the last kill."""


def working(run: Path) -> list[int]:
    """Return the process ids of running trials."""
    running = [index for index, trial in trials_of(run).items() if trial["status"] == "running"]
    pids = {pulse["pid"] for index in running if (pulse := pulse_of(run, index))}
    return sorted(filter(psutil.pid_exists, pids))


def disturb(
    process: Driver, cluster: Raylets, generator: random.Random, killed: Counter[str]
) -> None:
    """Kill random processes at random times, until the driver has ended or `NUM_KILLS` are reached.

    Three of four kills wait until trials run. The others mostly happen while a driver starts.
    """
    while killed.total() < NUM_KILLS:
        at_work = generator.random() < 0.75
        pause = generator.uniform(1.0, 15.0)
        instant = time.monotonic() + pause
        while time.monotonic() < instant or (at_work and not working(process.run)):
            if process.process.poll() is not None:
                return
            time.sleep(0.05)
        victim = generator.choice(("driver", "worker", "raylet"))
        if victim == "worker":
            workers = working(process.run)
            if not workers:
                continue
            with suppress(ProcessLookupError):
                os.kill(generator.choice(workers), signal.SIGKILL)
        elif victim == "raylet":
            cluster.kill(generator.choice(cluster.nodes))
            cluster.add()
        killed[victim] += 1
        if victim == "driver":
            process.process.send_signal(signal.SIGKILL)
            process.process.wait()
            return


def test_random_kills_lose_no_trial_and_repeat_no_plan(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {
        "search.max_concurrent": NUM_NODES,
        "prune": {"rates": [0, 0.2]},
        "quantize.budget": {"bytes": 200_000},
    }
    config = search_config(tiny_model, tmp_path, **keys)
    run = tmp_path / "run"
    ended(config, "sensitivity")
    started = time.monotonic()
    number = TRIALS_A_ROUND
    num_drivers = 0
    generator = random.Random(SEED)
    finished = {}
    killed: Counter[str] = Counter()
    with raylets(NUM_NODES) as cluster:
        code = None
        while not (killed.total() >= NUM_KILLS and code == 0):
            number += TRIALS_A_ROUND if code == 0 else 0
            num_drivers += 1
            options = ("--address", cluster.address, "--set", f"search.max_trials={number}")
            with driver(config, *options) as process:
                disturb(process, cluster, generator, killed)
                code, said = process.end()
            assert code in (0, -signal.SIGKILL), said[-4000:]
            trials = trials_of(run)
            # Finished trials are not run again.
            assert finished == {index: trials[index] for index in finished}
            finished = {
                index: trial for index, trial in trials.items() if trial["status"] == "finished"
            }
            assert num_drivers < 3 * NUM_KILLS
    record = search_record(run)
    rungs = load_config(config).search.rungs
    assert sorted(trials) == list(range(number))
    assert record["num_trials"] == number
    assert len({(trial["cut"], *trial["plan"].values()) for trial in trials.values()}) == number
    assert {trial["cut"] for trial in trials.values()} == {"base", "cut-20"}
    # A trial may fail only because its worker died three times in a row without a rung between.
    assert set(record["failures"]) <= {"lost"}, record["failures"]
    for index, trial in trials.items():
        steps = tuple(rung["step"] for rung in trial["rungs"])
        assert steps == rungs[: len(steps)]
        assert (steps == rungs) == (trial["status"] == "finished")
        if steps:
            [checkpoint] = run.glob(f"trials/*/{index:04d}/checkpoint-{steps[-1]}")
            assert folder_digests(checkpoint) == trial["checkpoint"], checkpoint
    with capsys.disabled():
        seconds = time.monotonic() - started
        counts = f"{num_drivers} drivers, {number} trials"
        print(f"\nkilled {dict(killed)}; {counts}; {seconds:.0f} s")
