"""Where trials run: one a GPU, on every node, and never two on one; through the search itself, with trials that only
say where they are."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_searches import job_of as made_job
from raylets import Raylets, raylets

from qpruner.cluster.connect import Cluster, connect, disconnect
from qpruner.cluster.slots import Room, Slots
from qpruner.cluster.tune import SearchJob, search
from qpruner.cluster.tune.driver import MAX_ERRORS
from qpruner.errors import StageError
from qpruner.runs.events import Event, SlotsFound, TrialChanged, TrialWithdrawn
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
"""Of two nodes; the head, the third, has none and no core."""
NUM_TRIALS = 8


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Raylets, Cluster]]:
    """A cluster of three raylets that this process has joined."""
    with raylets(0) as cluster:
        for number in GPUS:
            cluster.add(num_cpus=4, num_gpus=number)
        yield cluster, connect(cluster.address)
        disconnect()


@pytest.fixture
def slots(joined: tuple[Raylets, Cluster]) -> Slots:
    """What it can run."""
    return joined[1].slots()


def standing_in(folder: Path, at_once: int) -> Trial:
    """A trial that says where it runs and from when to when; none ends before so many have run at once."""

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        import ray

        began = time.time()
        mark = folder / f"began-{os.getpid()}-{time.monotonic_ns()}"
        mark.touch()
        while len(list(folder.glob("began-*"))) < at_once:
            assert time.time() - began < 120, f"never {at_once} trials at once"
            time.sleep(0.05)
        time.sleep(0.2)
        node, devices = ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]
        said = {"node": node, "devices": devices, "began": began, "ended": time.time(), "pid": os.getpid()}
        mark.with_name(mark.name.replace("began", "said")).write_text(json.dumps(said))
        checkpoint = folder / f"checkpoint-{mark.name}"
        checkpoint.mkdir()
        report(RungResult(step=job.config.search.steps, loss=3.0), checkpoint)

    return trial


def broken_on(node: str, folder: Path) -> Trial:
    """A trial that fails on one node until that is mended; elsewhere none ends before as many failed there as may."""
    whole = standing_in(folder, 0)

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        import ray

        if ray.get_runtime_context().get_node_id() == node and not (folder / "mended").exists():
            (folder / f"failed-{time.monotonic_ns()}").touch()
            raise RuntimeError("CUDA error: unspecified launch failure")
        deadline = time.monotonic() + 120
        while len(list(folder.glob("failed-*"))) < MAX_ERRORS:
            assert time.monotonic() < deadline, "the broken machine takes no plans"
            time.sleep(0.05)
        whole(job, start, report, progress)

    return trial


def job_of(folder: Path, slots: Slots, at_once: int, **settings: Any) -> SearchJob:
    """A search of random plans whose trials take what they do by default, and end once so many have run at once."""
    job = made_job(folder, **{"searcher": "random", "max_trials": NUM_TRIALS, "first_rung": 4} | settings)
    job = replace(job, space=replace(job.space, budget_bytes=10**9), controls=[])
    return replace(job, resources=slots.resources_per_trial(None), trial=standing_in(folder, at_once))


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["began"] < other["ended"] and other["began"] < one["ended"])


def test_every_gpu_has_one_trial_and_no_gpu_two(slots: Slots, tmp_path: Path) -> None:
    job = job_of(tmp_path, slots, at_once=sum(GPUS))
    assert job.resources == {"cpu": 1.0, "gpu": 1.0}
    events: list[Event] = []
    outcome = search(job, Room(lambda: slots, job.resources, None, events.append), events.append)
    assert [event for event in events if isinstance(event, SlotsFound)] == [SlotsFound(sum(GPUS))]
    assert [trial.status for trial in outcome.trials] == ["finished"] * NUM_TRIALS
    said = [json.loads(path.read_text()) for path in tmp_path.glob("said-*")]
    assert len(said) == NUM_TRIALS
    used: dict[str, set[str]] = defaultdict(set)
    for trial in said:
        used[trial["node"]].add(trial["devices"])
    assert sorted(used.values(), key=len) == [{"0"}, {"0", "1"}], "each trial sees one GPU, and every GPU had a trial"
    for one, other in itertools.combinations(said, 2):
        if overlap(one, other) and one["node"] == other["node"]:
            assert one["devices"] != other["devices"], (one, other)
    pulses = [read_pulse(job.trials, trial.index) for trial in outcome.trials]
    assert Counter(pulse.node for pulse in pulses if pulse) == Counter(trial["node"] for trial in said), (
        "and tells where"
    )
    assert len({trial["pid"] for trial in said}) < NUM_TRIALS, "workers that were used again kept to their GPU"


def over(event: Event) -> bool:
    return isinstance(event, TrialChanged) and event.trial.is_over


def test_ctrl_c_begins_nothing_that_waits_for_a_machine(slots: Slots, tmp_path: Path) -> None:
    """With room for six, as on a cluster that may grow, three wait; the next session would begin with them."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        if over(event) and not any(map(over, events)):
            os.kill(os.getpid(), signal.SIGINT)
        events.append(event)

    job = job_of(tmp_path, slots, at_once=sum(GPUS))
    with pytest.raises(KeyboardInterrupt):
        search(job, lambda: 6, emit)
    found = [(trial.status, trial.has_begun) for trial in read_trials(job.trials)]
    assert sorted(found) == [("finished", True)] * 3 + [("running", False)] * 3


def test_what_still_waits_when_the_hours_are_over_is_not_begun(slots: Slots, tmp_path: Path) -> None:
    """They are over with the first rung, while the three that began it go on."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        if isinstance(event, TrialWithdrawn):
            (tmp_path / f"withdrawn-{event.index}").touch()
        events.append(event)

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        (checkpoint := tmp_path / f"first-{os.getpid()}").mkdir()
        report(RungResult(step=1, loss=3.0), checkpoint)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("withdrawn-*"))) < 3:
            assert time.monotonic() < deadline, "the trials that wait are not withdrawn"
            time.sleep(0.05)
        whole(job, start, report, progress)

    whole = standing_in(tmp_path, sum(GPUS))
    job = job_of(tmp_path, slots, at_once=0, first_rung=1, max_gpu_hours=1e-7)
    outcome = search(replace(job, trial=trial), lambda: 6, emit)
    assert [trial.status for trial in outcome.trials] == ["finished"] * 3
    assert outcome.ended.endswith("GPU hours were spent (`search.max_gpu_hours` is 1e-07)")


@pytest.mark.slow
def test_trials_of_a_broken_gpu_are_retried_once_mended(
    joined: tuple[Raylets, Cluster], slots: Slots, tmp_path: Path
) -> None:
    broken = joined[0].nodes[1].node_id
    job = replace(job_of(tmp_path, slots, at_once=0), trial=broken_on(broken, tmp_path))
    with pytest.raises(StageError, match=rf"3 trials in a row failed on 127\.0\.0\.1 \(.*, {broken[:8]}\)") as caught:
        search(job, lambda: 3, lambda event: None)
    assert "unspecified launch failure" in caught.value.cause and "repair that machine" in caught.value.remedy
    (tmp_path / "mended").touch()
    outcome = search(job, lambda: 3, lambda event: None)
    assert [trial.status for trial in outcome.trials] == ["finished"] * NUM_TRIALS, "no plan was lost"


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_worker_that_lost_its_trial_publishes_nothing(when: str, slots: Slots, tmp_path: Path) -> None:
    """Its machine was cut off, and came back; the other worker is a line in the record and a copy of its own here."""

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        (checkpoint := tmp_path / f"made-{time.monotonic_ns()}").mkdir()
        (checkpoint / "weights").write_bytes(b"w" * 2**27)

        def take_over() -> None:
            while when == "while" and not list(folder.glob(".checkpoint-*")):
                time.sleep(0.001)
            others.mkdir()
            write_trial(trials, read_trial(trials, 0).model_copy(update={"worker": "another"}))

        is_first = not (tmp_path / "left").exists()
        if is_first:
            taking = threading.Thread(target=take_over, daemon=True)
            taking.start()
            if when == "before":
                taking.join()
        try:
            report(RungResult(step=job.config.search.steps, loss=3.0), checkpoint)
        finally:
            if is_first:
                names = [path.name for path in folder.glob("checkpoint-*")]
                told = [names, read_trial(trials, 0).worker, others.is_dir()]
                (tmp_path / "left").write_text(json.dumps(told))

    trials, folder = tmp_path / "trials", tmp_path / "trials" / "0000"
    others = folder / ".checkpoint-4.another"
    job = replace(job_of(tmp_path, slots, at_once=0, max_trials=1), trial=trial)
    outcome = search(job, lambda: 1, lambda event: None)
    assert json.loads((tmp_path / "left").read_text()) == [[], "another", True]
    assert [trial.status for trial in outcome.trials] == ["finished"]
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["checkpoint-4", "pulse.json", "suggested.json", "trial.json"], "what both had copied is gone, too"


@pytest.mark.slow
def test_a_search_takes_a_machine_that_joins_late(joined: tuple[Raylets, Cluster], tmp_path: Path) -> None:
    """None of its trials ends before so many run at once that one of them is on it."""
    raylets, cluster = joined
    events: list[Event] = []

    def emit(event: Event) -> None:
        if isinstance(event, TrialChanged) and len(raylets.nodes) == len(GPUS):
            raylets.add(num_cpus=4, num_gpus=2)
        events.append(event)

    job = job_of(tmp_path, cluster.slots(), at_once=4)
    try:
        outcome = search(job, Room(cluster.slots, job.resources, 4, emit), emit)
    finally:
        raylets.cluster.remove_node(raylets.nodes.pop())
    assert [trial.status for trial in outcome.trials] == ["finished"] * NUM_TRIALS
    assert [event.slots for event in events if isinstance(event, SlotsFound)] == [3, 4], "not five"
