"""Real faults during a search: signals, too little memory, a storage that is full or away, machines
that die.

The results of a disturbed search are compared with those of one undisturbed search.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Raw, assert_has, away, flip_a_byte, full, winner_in
from raylets import Raylets, raylet_of, raylets
from real_driver import (
    Driver,
    between_rungs,
    driver,
    ended,
    pulse_of,
    rungs_of,
    search_config,
    search_record,
    trials_of,
)
from safetensors.torch import load_file, save_file
from whole_runs import comparable

from qpruner.cluster.tune.driver import MAX_KILLS
from qpruner.quantization.bank import EntryRecord, record_path
from qpruner.runs.storage import file_digest, read_json, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all stages up to the sensitivities."""
    return ended(search_config(tiny_model, tmp_path_factory.mktemp("measured")), "sensitivity").run


def copied(run: Path, model: Path, folder: Path, **keys: Any) -> Path:
    """Copy a run into a folder, and write the configuration that continues it there."""
    shutil.copytree(run, folder / "run")
    return search_config(model, folder, **keys)


@pytest.fixture
def config(measured: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A configuration whose run folder has all stages up to the sensitivities."""
    return copied(measured, tiny_model, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(measured: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed search."""
    return ended(copied(measured, tiny_model, tmp_path_factory.mktemp("undisturbed"))).run


def finished(process: Driver, undisturbed: Path | None = None) -> Raw:
    """Wait for a search that must succeed, and return its record.

    Its trials and its winner must be those of the undisturbed search, each rung measured once.
    """
    process.end_well()
    record = search_record(process.run)
    if undisturbed:
        assert rungs_of(process.run) == rungs_of(undisturbed)
        assert winner_in(record)["plan"] == winner_in(search_record(undisturbed))["plan"]
    return record


def between(process: Driver, index: int) -> int:
    """Wait until a trial is between two rungs and the driver knows the first; return the process id
    of its worker."""

    def at_work() -> int | None:
        return (
            between_rungs(process.run, index) if f"trial {index:3d} [" in process.said() else None
        )

    return process.wait_until(at_work, f"trial {index} between two rungs")


# ---- processes


def test_a_killed_trial_resumes_from_its_last_rung(config: Path, undisturbed: Path) -> None:
    with driver(config) as process:
        os.kill(between(process, 1), signal.SIGKILL)
        assert finished(process, undisturbed)["failures"] == {}
        assert "trial 1 lost its worker and is resumed from step" in process.said()
    assert all(trial["kills"] == 0 for trial in trials_of(process.run).values())


OFTEN = "from qpruner.training import checkpoints; checkpoints.SECONDS = 0.1"
"""Saves trials 0.1 s after they have begun, and often after that."""


def test_kills_between_rungs_lose_no_progress(
    measured: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Worker and driver are killed after a checkpoint by time each, and none of them would ever
    reach a rung."""
    keys = {"search.steps": 128, "search.first_rung": 64, "search.max_trials": 1}
    whole = ended(copied(measured, tiny_model, tmp_path / "undisturbed", **keys)).run
    config = copied(measured, tiny_model, tmp_path / "disturbed", **keys)
    run = config.parent / "run"
    steps = [0]

    def saved() -> bool:
        trial = trials_of(run).get(0, {})
        # A later kill would prove nothing.
        assert trial.get("status", "running") == "running"
        assert not trial.get("rungs")
        if trial.get("saved_between", 0) <= steps[-1]:
            return False
        steps.append(trial["saved_between"])
        return True

    def is_resumed() -> bool:
        return f"resumed from step {steps[-1]}\n" in process.said()

    with driver(config, before=OFTEN) as process:
        for _ in range(MAX_KILLS + 1):
            process.wait_until(saved, "another checkpoint")
            os.kill(pulse_of(run, 0)["pid"], signal.SIGKILL)
            process.wait_until(is_resumed, "another worker on the trial")
    for _ in range(2):
        # The driver is killed at the end of the block.
        with driver(config, before=OFTEN) as process:
            process.wait_until(saved, "another checkpoint")
    with driver(config) as process:
        assert finished(process, whole)["failures"] == {}
    assert len(trials_of(run)[0]["begun"]) == len(steps) == MAX_KILLS + 4


def test_a_trial_that_keeps_dying_fails_alone(config: Path, tmp_path: Path) -> None:
    with driver(config) as process:
        killed = set()
        while trials_of(process.run).get(1, {}).get("status") != "failed":
            pulse = pulse_of(process.run, 1)
            if pulse and pulse["pid"] not in killed:
                with suppress(ProcessLookupError):
                    os.kill(pulse["pid"], signal.SIGKILL)
                killed.add(pulse["pid"])
            assert len(killed) < 20 and process.process.poll() is None, process.said()[-2000:]
            time.sleep(0.02)
        record = finished(process)
    trial = trials_of(process.run)[1]
    assert_has(trial, failure="lost", kills=3, reason="its worker process died 3 times in a row")
    assert_has(record, failures={"lost": 1}, num_failed=1, num_trials=5)


def test_a_hung_trial_is_killed_and_frees_its_slot(config: Path) -> None:
    """A suspended process ignores SIGTERM."""
    with driver(config, "--set", "search.trial_timeout_seconds=20") as process:
        pid = between(process, 1)
        os.kill(pid, signal.SIGSTOP)
        record = finished(process)
        assert not psutil.pid_exists(pid)
    trials = trials_of(process.run)
    assert_has(trials[1], status="failed", failure="hung")
    assert "no progress for 20 s (`search.trial_timeout_seconds`)" in trials[1]["reason"]
    assert_has(record, num_trials=5, failures={"hung": 1})
    # The next trials got the only slot.
    assert all(trials[index]["rungs"] for index in (2, 3, 4))


# ---- Ctrl-C


def test_ctrl_c_once_finishes_the_rung_and_can_resume(config: Path, undisturbed: Path) -> None:
    """A trial whose checkpoint is damaged before the search resumes is reported and run again."""
    with driver(config) as process:
        between(process, 1)
        process.interrupt()
        code, said = process.end(minutes=3)
    assert code == 130
    again = f"python -m qpruner search {config} --json"
    assert f"interrupted; continue with: {again}" in said
    assert json.loads(said.splitlines()[-1]) == {"status": "interrupted", "resume": again}
    trial = trials_of(process.run)[1]
    # The rung that ran was finished.
    assert len(trial["rungs"]) > 1
    # No trial was started after that rung.
    assert trial["status"] == "running"
    assert 2 not in trials_of(process.run)
    assert not (process.run / "records" / "search.json").exists()
    assert not (process.run / "driver.lock").exists()
    [state] = process.run.glob("trials/*/0001/checkpoint-*/optimizer.pt")
    flip_a_byte(state)
    with driver(config) as process:
        record = finished(process, undisturbed)
        assert f"{state.parent} is damaged: set aside in" in process.said()
    # The damaged trial started again.
    assert_has(record, sessions=2, resumed=1)


def test_ctrl_c_twice_leaves_at_once_and_can_resume(config: Path, undisturbed: Path) -> None:
    with driver(config) as process:
        pid = between(process, 1)
        os.kill(pid, signal.SIGSTOP)  # the rung would never finish
        process.interrupt()
        process.wait_until(
            lambda: "Ctrl-C again leaves at once" in process.said(),
            "the answer to the first Ctrl-C",
        )
        process.interrupt()
        started = time.monotonic()
        code, _ = process.end(minutes=3)
        assert code == 130
        assert time.monotonic() - started < 30
        assert not psutil.pid_exists(pid)
    with driver(config) as process:
        finished(process, undisturbed)


def fresh_scores(run: Path) -> dict[int, tuple[int, Path]]:
    """Read the fresh score of each finalist and when it was written, by trial index."""
    files = {path: json.loads(path.read_text()) for path in run.glob("candidates/*/record.json")}
    plans = {
        (trial["cut"], *sorted(trial["plan"].items())): index
        for index, trial in trials_of(run).items()
    }
    return {
        plans[record["cut"], *sorted(record["plan"].items())]: (path.stat().st_mtime_ns, path)
        for path, record in files.items()
    }


def test_only_damaged_files_of_a_search_are_made_again(
    undisturbed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Damaged are the weights of one finalist, the score of another, and the record of a trial."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    (run / "records" / "search.json").unlink()
    before = fresh_scores(run)
    first, other = sorted(before)[:2]
    [weights] = run.glob(f"trials/*/{first:04d}/checkpoint-*/adapter_model.safetensors")
    before[first][1].unlink()  # the score of the intact weights
    flip_a_byte(weights)
    score = before[other][1]
    score.write_text(score.read_text()[:-3])
    third = max(set(trials_of(run)) - {first, other})
    [record] = run.glob(f"trials/*/{third:04d}/trial.json")
    flip_a_byte(record)
    with driver(search_config(tiny_model, tmp_path)) as process:
        again = finished(process, undisturbed)
        said = process.said()
    assert f"{weights.parent} is damaged: set aside in" in said
    assert str(score) in said
    assert "is scored again" in said
    assert str(record) in said
    assert "and its number gets another plan" in said
    after = fresh_scores(run)
    changed = {index for index in before if before[index] != after.get(index)}
    assert {first, other} <= changed <= {first, other, third}
    assert len(list(run.glob("trials/*/damaged/*/trial.json"))) == 1
    assert comparable(again["finalists"]) == comparable(search_record(undisturbed)["finalists"])


# ---- numbers


def spoil(path: Path) -> None:
    """Make the initial adapters in one file of a bank far too large, and update its record."""
    tensors = load_file(path)
    save_file(
        {key: tensor * 1e25 if "lora_A" in key else tensor for key, tensor in tensors.items()}, path
    )
    record = read_json(record_path(path), EntryRecord)
    write_json(record_path(path), record.model_copy(update={"sha256": file_digest(path)}))


def test_the_searcher_avoids_plans_that_diverge(config: Path, tiny_model: Path) -> None:
    keys = {"search.searcher": "gp", "search.max_trials": 12}
    config = search_config(tiny_model, config.parent, **keys)
    path = next((ended(config, "bank").run / "banks" / "cut-20" / "nf4").glob("*.safetensors"))
    spoil(path)
    group = path.stem
    with driver(config) as process:
        record = finished(process)
    trials = trials_of(process.run)
    ruined = set()
    proposed = set()
    for index, trial in trials.items():
        is_ruined = trial["cut"] == "cut-20" and trial["plan"][group] == "nf4"
        assert (trial["status"] == "failed") == is_ruined
        if is_ruined:
            ruined.add(index)
            # It is stopped at once.
            assert "nan at step 1" in trial["reason"]
        if trial["origin"] == "gp":
            proposed.add(index)
    assert record["failures"] == {"diverged": len(ruined)}
    assert len(proposed) >= 8
    # The controls had shown that it diverges.
    assert len(ruined & proposed) <= 2
    winner = winner_in(record)
    assert winner["cut"] != "cut-20" or winner["plan"][group] == "int8"


# ---- memory


BIG = {
    "data.train": [
        {"source": "package:qpruner/demo/data/questions_train.jsonl", "format": "multiple_choice"},
        {"source": "package:qpruner/demo/data/instructions.jsonl"},
    ],
    "data.max_length": 512,
    "data.packing": True,
    # Of these rows the tiny model predicts one token alone, so there is no mutual information.
    "sensitivity.methods": ["first_order"],
    "training.batch_size": 64,
    "training.micro_batch_size": 64,
    "search.steps": 4,
    "search.first_rung": 2,
    "search.max_trials": 1,
}
"""Keys for trials whose steps take more than 450 MB, or much less with smaller micro-batches."""


@pytest.fixture(scope="module")
def big(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of large batches: `measured` up to the sensitivities, `undisturbed`
    with its one trial."""
    folder = tmp_path_factory.mktemp("big")
    measured = ended(search_config(tiny_model, folder / "measured", **BIG), "sensitivity").run
    ended(copied(measured, tiny_model, folder / "undisturbed", **BIG))
    return folder


HOG = """
import os, psutil, sys
kept, until, victims = [], float(sys.argv[1]), [int(pid) for pid in sys.argv[2:]]
while all(map(psutil.pid_exists, victims)):
    if psutil.virtual_memory().available > until:
        kept.append(b"x" * 2**26)
os._exit(0)
"""
"""Takes memory until only so much is available, and ends when one of the given processes has ended.
"""


def test_a_machine_out_of_memory_costs_one_worker(
    config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Ray's own memory monitor kills one of two workers, which frees enough."""
    config = search_config(tiny_model, tmp_path, **{"search.max_concurrent": 2})
    memory = psutil.virtual_memory()
    limit = memory.available - 4 * 10**9
    # Without the buffer, by which Ray frees up to 500 MB too much: as much as two workers hold.
    monitor = {
        "RAY_memory_usage_threshold": str(1 - limit / memory.total),
        "RAY_max_kill_memory_buffer_bytes": "0",
    }
    with driver(config, **monitor) as process:
        between(process, 1)
        pulses = [pulse_of(process.run, index) for index in trials_of(process.run)]
        pids = [str(pulse["pid"]) for pulse in pulses if pulse]
        command = [sys.executable, "-c", HOG, str(limit - 2 * 10**8), *pids]
        subprocess.run(command, check=True, timeout=120)
        record = finished(process)
    [killed] = re.findall(r"trial (\d+) lost its worker, which Ray killed", process.said())
    for index, trial in trials_of(process.run).items():
        is_killed = index == int(killed)
        # It alone starts again, with half the rows at once.
        assert (trial["micro_batch_size"] is not None) == is_killed
        assert len(trial["begun"]) == 1 + is_killed
    assert_has(record, num_trials=5, failures={})


@pytest.mark.parametrize("retry", [True, False])
def test_a_trial_out_of_memory_shrinks_or_is_infeasible(
    retry: bool, big: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The process may take 450 MiB of address space more than at its first pulse, and 64 rows take
    more. Once the trial has shrunk, the limit goes: torch keeps the address space of a step that
    failed, so even one row may not fit."""
    keys = BIG | {"search.retry_out_of_memory": retry}
    config = copied(big / "measured" / "run", tiny_model, tmp_path, **keys)
    with driver(config) as process:
        pulse = process.wait_until(lambda: pulse_of(process.run, 0), "the first pulse")
        worker = psutil.Process(pulse["pid"])
        limit = worker.memory_info().vms + 450 * 2**20
        highest = worker.rlimit(psutil.RLIMIT_AS)[1]
        worker.rlimit(psutil.RLIMIT_AS, (limit, highest))
        if retry:
            process.wait_until(
                lambda: trials_of(process.run)[0]["micro_batch_size"], "smaller micro-batches"
            )
            worker.rlimit(psutil.RLIMIT_AS, (highest, highest))
        code, said = process.end()
    trial = trials_of(process.run)[0]
    assert 20e6 < trial["peak_memory_bytes"] < 500e6
    assert trial["memory_counter"] == "rise of resident memory"
    if not retry:
        assert_has(trial, status="failed", failure="infeasible")
        assert re.fullmatch(r"out of memory: .*\(micro-batch 64\)", trial["reason"], re.DOTALL)
        assert code == 1
        assert "the first reason: out of memory" in said
        return
    assert code == 0, said[-3000:]
    assert trial["status"] == "finished"
    assert trial["micro_batch_size"] in (32, 16, 8, 4)
    expected = trials_of(big / "undisturbed" / "run")[0]
    assert expected["micro_batch_size"] is None
    losses = [rung["loss"] for rung in trial["rungs"]]
    assert losses == pytest.approx([rung["loss"] for rung in expected["rungs"]], rel=2e-3)


GROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def group() -> Iterator[Path]:
    """The file with the memory limit of a new control group, of version 1 or version 2."""
    folder = GROUPS / ("memory" if (GROUPS / "memory").is_dir() else "") / f"qpruner-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        limits = [*folder.glob("memory.limit_in_bytes"), *folder.glob("memory.max")]
        if not limits:
            pytest.skip("control groups have no memory limit here")
        yield limits[0]
    finally:
        folder.rmdir()


def test_a_trial_the_kernel_kills_for_memory_shrinks(
    group: Path, big: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Each new worker is moved into a small control group, until more are killed than may die for
    other reasons."""
    pids = {0}

    def new_worker() -> int | None:
        pid = (pulse_of(process.run, 0) or {"pid": 0})["pid"]
        return None if pid in pids else pid

    with driver(copied(big / "measured" / "run", tiny_model, tmp_path, **BIG)) as process:
        group.write_text(str(20 * 2**20))
        for _ in range(MAX_KILLS + 1):
            pid = process.wait_until(new_worker, "a new worker")
            (group.parent / "cgroup.procs").write_text(str(pid))
            pids.add(pid)
        finished(process)
        assert process.said().count("resumed from its start") == MAX_KILLS + 1
    trial = trials_of(process.run)[0]
    assert_has(trial, status="finished", micro_batch_size=4, kills=0)


# ---- storage


@pytest.mark.parametrize(("trouble", "passes"), [(full, True), (full, False), (away, True)])
def test_a_full_or_missing_storage_is_waited_for(
    trouble: Any, passes: bool, disk: Path, measured: Path, undisturbed: Path, tiny_model: Path
) -> None:
    """Mounting an empty file system over the run folder makes its files unreachable."""
    config = copied(measured, tiny_model, disk)
    with driver(config, QPRUNER_STORAGE_PATIENCE_SECONDS="60" if passes else "2") as process:
        between(process, 1)
        with trouble(disk / "run" if trouble is away else disk) as end:
            if passes:
                time.sleep(8)
                end()
                finished(process)
            else:
                code, said = process.end(minutes=2)
                assert code == 1, said[-3000:]
                told = json.loads(said.splitlines()[-1])
                # It is no error of Ray Tune.
                assert told["kind"] == "StageError"
                assert "no space left" in told["error"]
                assert "make room" in told["error"]
    if not passes:
        ended(config)
    assert rungs_of(process.run) == rungs_of(undisturbed)


# ---- machines


def node_of(cluster: Raylets, run: Path, index: int) -> Any:
    """Find the living node on which a trial runs."""
    pulse = pulse_of(run, index) or {}
    return next((node for node in cluster.nodes if node.node_id == pulse.get("node")), None)


def test_a_dead_machine_does_not_count_against_its_trial(config: Path, undisturbed: Path) -> None:
    """Machines die more often in a row than the process of a trial may."""
    with raylets(MAX_KILLS + 2) as cluster, driver(config, "--address", cluster.address) as process:
        between(process, 1)
        before = rungs_of(process.run)[1]
        for _ in range(MAX_KILLS + 1):
            node = process.wait_until(
                lambda: node_of(cluster, process.run, 1), "trial 1 on a living node"
            )
            cluster.kill_machine(node)
        # A rung in between would reset the count.
        assert rungs_of(process.run)[1] == before
        assert finished(process, undisturbed)["failures"] == {}
    assert process.said().count("resumed from step") == MAX_KILLS + 1


def test_a_machine_dead_before_any_pulse_does_not_count(config: Path) -> None:
    """A worker imports for seconds before it reports its node, so the driver asks Ray which node it
    was."""

    def begins(node: Any) -> bool:
        for worker in psutil.Process(raylet_of(node).pid).children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if "ImplicitFunc" in " ".join(worker.cmdline()):
                    return True
        return False

    options = ("--set", "search.max_trials=1", "--address")
    with raylets(MAX_KILLS + 1) as cluster, driver(config, *options, cluster.address) as process:
        for _ in range(MAX_KILLS):
            node = process.wait_until(
                lambda: next(filter(begins, cluster.nodes), None), "a new worker"
            )
            cluster.kill_machine(node)
            assert pulse_of(process.run, 0) is None
        assert finished(process)["failures"] == {}
    assert process.said().count("resumed from its start") == MAX_KILLS


def test_trials_leave_a_drained_machine(config: Path, undisturbed: Path) -> None:
    """As after a spot notice.

    Without qpruner's handling, Ray Tune keeps giving trials to the worker there.
    """
    with raylets(2) as cluster, driver(config, "--address", cluster.address) as process:
        between(process, 1)
        node = node_of(cluster, process.run, 1)
        raylet = raylet_of(node)
        cluster.drain(node.node_id, seconds=3600)
        assert finished(process, undisturbed)["failures"] == {}
        assert raylet.poll() is not None, "an idle drained machine leaves the cluster early"
        last = pulse_of(process.run, 4)
    assert last["node"] != node.node_id
    assert process.said().count("resumed from step") == 1


def test_a_worker_declared_dead_writes_nothing_more(config: Path, undisturbed: Path) -> None:
    """A machine is unreachable for a while: its raylet does not answer, and its trial resumes
    elsewhere."""
    with raylets(2) as cluster, driver(config, "--address", cluster.address) as process:
        pid = between(process, 1)
        first = trials_of(process.run)[1]["worker"]
        raylet = raylet_of(node_of(cluster, process.run, 1)).pid
        for stopped in (raylet, pid):
            os.kill(stopped, signal.SIGSTOP)
        process.wait_until(
            lambda: trials_of(process.run)[1]["worker"] != first, "another worker on the trial"
        )
        second = trials_of(process.run)[1]["worker"]
        os.kill(pid, signal.SIGCONT)
        writers = set()
        while process.process.poll() is None:
            writers.add(trials_of(process.run)[1]["worker"])
            time.sleep(0.02)
        finished(process, undisturbed)
    assert writers == {second}


def test_a_new_head_resumes_from_the_run_folder(config: Path, undisturbed: Path) -> None:
    """The machine of the head dies with the driver; that of a worker lives on for a while."""
    with raylets(1) as cluster, driver(config, "--address", cluster.address) as process:
        between(process, 1)
        cluster.kill_head()
        process.process.send_signal(signal.SIGKILL)
        process.process.wait()
        before = rungs_of(process.run)
        shutil.rmtree(process.run / "tune")  # nothing that Ray wrote is left
        with raylets(1) as another, driver(config, "--address", another.address) as second:
            record = finished(second, undisturbed)
            assert "taking over from process" in second.said()
    assert before[1]
    assert_has(record, failures={}, sessions=2, resumed=2)
