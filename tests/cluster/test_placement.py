"""A real search with trials that only record where they run: every GPU of every node runs one trial at a time."""

import itertools
import json
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_searches import job_of
from raylets import Raylets, raylets

from qpruner.cluster.connect import Cluster, connect, disconnect
from qpruner.cluster.slots import Room, Slots
from qpruner.cluster.tune import SearchJob, search
from qpruner.cluster.tune.driver import MAX_ERRORS
from qpruner.errors import StageError
from qpruner.runs.events import Event, SlotsFound, TrialChanged
from qpruner.runs.records import RungResult
from qpruner.search.trial_records import (
    Progress,
    Report,
    Trial,
    TrialJob,
    read_pulse,
    read_trial,
    read_trials,
    write_trial,
)

GPUS = (2, 1)
"""The GPUs of two nodes; a third node, the head, has no GPU and no core."""
NUM_TRIALS = 8


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Raylets, Cluster]]:
    """A cluster of three nodes that this process has joined."""
    with raylets(0) as cluster:
        for number in GPUS:
            cluster.add(num_cpus=4, num_gpus=number)
        yield cluster, connect(cluster.address)
        disconnect()


@pytest.fixture
def slots(joined: tuple[Raylets, Cluster]) -> Slots:
    """The slots of that cluster."""
    return joined[1].slots()


# Workers cannot import this file; nested functions are pickled with their code.


def waiting(folder: Path, pattern: str, number: int) -> Callable[[], None]:
    """Make a function that waits for so many files."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while len(list(folder.glob(pattern))) < number:
            assert time.monotonic() < deadline, f"not {number} files {pattern} in time"
            time.sleep(0.05)

    return wait


def recording_trial(folder: Path, at_once: int) -> Trial:
    """Make a trial that records where and when it runs; trials end only after `at_once` of them have run together."""
    wait = waiting(folder, "began-*", at_once)

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        import ray

        began, name = time.time(), f"{os.getpid()}-{time.monotonic_ns()}"
        (folder / f"began-{name}").touch()
        wait()
        time.sleep(0.2)
        node, devices = ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]
        place = {"node": node, "devices": devices, "began": began, "ended": time.time(), "pid": os.getpid()}
        (folder / f"ended-{name}").write_text(json.dumps(place))
        (checkpoint := folder / f"checkpoint-{name}").mkdir()
        report(RungResult(step=job.config.search.steps, loss=3.0), checkpoint)

    return trial


def search_of(folder: Path, slots: Slots, at_once: int = 0, **settings: Any) -> SearchJob:
    """Make a search of random plans with recording trials and default resources."""
    job = job_of(folder, **{"searcher": "random", "max_trials": NUM_TRIALS, "first_rung": 4} | settings)
    return replace(job, trial=recording_trial(folder, at_once), resources=slots.resources_per_trial(None), controls=[])


def test_every_gpu_runs_one_trial_at_a_time(slots: Slots, tmp_path: Path) -> None:
    job = search_of(tmp_path, slots, at_once=sum(GPUS))
    assert job.resources == {"cpu": 1.0, "gpu": 1.0}
    events: list[Event] = []
    outcome = search(job, Room(lambda: slots, job.resources, None, events.append), events.append)
    assert [event for event in events if isinstance(event, SlotsFound)] == [SlotsFound(sum(GPUS))]
    assert [trial.status for trial in outcome.trials] == ["finished"] * NUM_TRIALS
    ended = [json.loads(path.read_text()) for path in tmp_path.glob("ended-*")]
    assert len(ended) == NUM_TRIALS
    used: dict[str, set[str]] = defaultdict(set)
    for trial in ended:
        used[trial["node"]].add(trial["devices"])
    assert sorted(used.values(), key=len) == [{"0"}, {"0", "1"}], "each trial sees one GPU, and every GPU had a trial"
    for one, other in itertools.combinations(ended, 2):
        if one["began"] < other["ended"] and other["began"] < one["ended"]:
            assert (one["node"], one["devices"]) != (other["node"], other["devices"])
    pulses = [read_pulse(job.trials, trial.index) for trial in outcome.trials]
    assert Counter(pulse.node for pulse in pulses if pulse) == Counter(trial["node"] for trial in ended)
    assert len({trial["pid"] for trial in ended}) < NUM_TRIALS, "reused workers keep their GPU"


def test_ctrl_c_starts_no_waiting_trial(slots: Slots, tmp_path: Path) -> None:
    """There is room for six trials, as on a cluster that may grow, but for three of them no machine."""
    is_first = True

    def emit(event: Event) -> None:
        nonlocal is_first
        if is_first and isinstance(event, TrialChanged) and event.trial.is_over:
            is_first = False
            os.kill(os.getpid(), signal.SIGINT)

    job = search_of(tmp_path, slots, at_once=sum(GPUS))
    with pytest.raises(KeyboardInterrupt):
        search(job, lambda: 6, emit)
    found = [(trial.status, trial.has_begun) for trial in read_trials(job.trials)]
    assert sorted(found) == [("finished", True)] * 3 + [("running", False)] * 3


@pytest.mark.slow
def test_trials_that_failed_on_a_broken_gpu_are_retried(
    joined: tuple[Raylets, Cluster], slots: Slots, tmp_path: Path
) -> None:
    """Trials on the other node wait until `MAX_ERRORS` trials have failed."""
    broken, intact_trial = joined[0].nodes[1].node_id, recording_trial(tmp_path, 0)
    wait = waiting(tmp_path, "failed-*", MAX_ERRORS)

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        import ray

        if ray.get_runtime_context().get_node_id() == broken and not (tmp_path / "mended").exists():
            (tmp_path / f"failed-{time.monotonic_ns()}").touch()
            raise RuntimeError("CUDA error: unspecified launch failure")
        wait()
        intact_trial(job, start, report, progress)

    job = replace(search_of(tmp_path, slots), trial=trial)
    with pytest.raises(StageError, match=rf"3 trials in a row failed on 127\.0\.0\.1 \(.*, {broken[:8]}\)") as caught:
        search(job, lambda: 3, lambda event: None)
    assert "unspecified launch failure" in caught.value.cause and "repair that machine" in caught.value.remedy
    (tmp_path / "mended").touch()
    outcome = search(job, lambda: 3, lambda event: None)
    assert [trial.status for trial in outcome.trials] == ["finished"] * NUM_TRIALS, "no plan was lost"


def test_a_worker_that_lost_its_trial_publishes_nothing(slots: Slots, tmp_path: Path) -> None:
    """As if its machine had been cut off for a while; another worker's id in the record stands for that worker."""

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        (checkpoint := tmp_path / f"made-{time.monotonic_ns()}").mkdir()
        (checkpoint / "weights").write_bytes(b"w" * 2**27)

        def take_over() -> None:
            while not list(folder.glob(".checkpoint-*")):
                time.sleep(0.001)
            others.mkdir()
            write_trial(trials, read_trial(trials, 0).model_copy(update={"worker": "another"}))

        is_first = not (tmp_path / "left").exists()
        if is_first:
            threading.Thread(target=take_over, daemon=True).start()
        try:
            report(RungResult(step=job.config.search.steps, loss=3.0), checkpoint)
        finally:
            if is_first:
                names = [path.name for path in folder.glob("checkpoint-*")]
                found = [names, read_trial(trials, 0).worker, others.is_dir()]
                (tmp_path / "left").write_text(json.dumps(found))

    trials, folder = tmp_path / "trials", tmp_path / "trials" / "0000"
    others = folder / ".checkpoint-4.another"
    job = replace(search_of(tmp_path, slots, max_trials=1), trial=trial)
    outcome = search(job, lambda: 1, lambda event: None)
    assert json.loads((tmp_path / "left").read_text()) == [[], "another", True]
    assert [trial.status for trial in outcome.trials] == ["finished"]
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["checkpoint-4", "pulse.json", "trial.json"], "unpublished copies are deleted"
