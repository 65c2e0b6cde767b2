"""Where trials run: one a GPU, on every node, and never two on one; through the search itself, with trials that only
say where they are."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import raw_config, with_key
from raylets import raylets

from qpruner.config import validate_config
from qpruner.execution.cluster import connect, disconnect
from qpruner.execution.slots import Slots
from qpruner.plan import Group, Layout, LinearShape, PlanSpace
from qpruner.records import RungResult
from qpruner.search.trial_job import Materials, Progress, Report, Trial, TrialJob
from qpruner.search.trial_records import read_pulse
from qpruner.search.tune import SearchJob, search

GPUS = (2, 1)
"""Of two nodes; the head, the third, has none and no core."""
NUM_TRIALS = 8
GROUPS = tuple(Group(f"layers.{index}", (LinearShape(f"layers.{index}", 64, 64),)) for index in range(6))
LAYOUT = Layout(GROUPS, 1000, 300, 2, double_quant=False, num_parameters=10**5)


@pytest.fixture(scope="module")
def slots() -> Iterator[Slots]:
    """A cluster of three raylets that this process has joined."""
    with raylets(0) as cluster:
        for number in GPUS:
            cluster.add(num_cpus=4, num_gpus=number)
        yield connect(cluster.address)
        disconnect()


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


def job_of(folder: Path, slots: Slots) -> SearchJob:
    """A search of random plans that takes every slot, a trial's resources being what they are by default."""
    raw = with_key(raw_config(Path("model"), folder / "run"), "search.searcher", "random")
    raw = with_key(with_key(raw, "search.max_trials", NUM_TRIALS), "search.first_rung", 4)
    resources = slots.resources_per_trial(None)
    return SearchJob(
        config=validate_config(raw),
        materials=Materials(folder, folder, folder),
        layout=LAYOUT,
        space=PlanSpace.of(LAYOUT, (4, 8), LAYOUT.plan_bytes(LAYOUT.uniform(8))),
        controls=[],
        priors={},
        trials=folder / "trials",
        scratch=folder / "tune",
        digest="0" * 16,
        search="1" * 16,
        resources=resources,
        max_concurrent=slots.concurrent(resources, None),
        trial=standing_in(folder, slots.concurrent(resources, None)),
    )


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["began"] < other["ended"] and other["began"] < one["ended"])


def test_every_gpu_has_one_trial_and_no_gpu_two(slots: Slots, tmp_path: Path) -> None:
    job = job_of(tmp_path, slots)
    assert job.resources == {"cpu": 1.0, "gpu": 1.0} and job.max_concurrent == sum(GPUS)
    outcome = search(job, lambda event: None)
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
