"""A search whose trials only sleep: everything of ours and of Ray's is real, but for model and
training.

Plans of 64 groups, scored by a loss that adds up over the groups. Lengths are log-normal (sigma 1:
one trial in twenty takes 3.1 times the mean or more), the same for the same plan. A trial writes
down when it slept: only that is work.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from qpruner.cluster.connect import OBJECT_STORE_BYTES, Cluster
from qpruner.cluster.node_check import packed_check, versions
from qpruner.cluster.slots import Room, Slots
from qpruner.cluster.tune import SearchJob, SearchOutcome, search
from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.plans.plan import UNPRUNED, Group, Layout, LinearShape
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.quantization.formats import format_of
from qpruner.runs.events import Event
from qpruner.runs.records import RungResult
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import Materials, Progress, Report, TrialJob

NUM_GROUPS = 64
NAMES = tuple(f"layers.{index:02d}" for index in range(NUM_GROUPS))
LEVELS = ("nf4", "int8")
LAYOUT = Layout(
    groups=tuple(Group(name, (LinearShape(name, 64, 64),), LEVELS) for name in NAMES),
    ungrouped_bytes=1000,
    adapter_bytes=300,
    element_bytes=2,
    num_parameters=10**6,
    multiply_adds=10**6,
)
SIGMA = 1.0
STEPS = 16
FIRST_RUNG = 4
CHECKPOINT_BYTES = 100_000


@dataclass(frozen=True)
class Slept:
    """One sleep: of which process, for which trial's step, from when to when in Unix seconds."""

    process: int
    step: int
    start: float
    end: float


@dataclass(frozen=True)
class Sleeper:
    """Stands in for `run_trial`.

    Attributes:
        mean_seconds: Of a trial that no one stops.
        diary: Folder for a file of sleeps a process.
    """

    mean_seconds: float
    diary: Path

    def __call__(
        self, job: TrialJob, start: Path | None, report: Report, progress: Progress
    ) -> None:
        bits = [int(format_of(job.plan[name]).bits) for name in NAMES]
        generator = np.random.default_rng(bits)
        length = self.mean_seconds * generator.lognormal(-(SIGMA**2) / 2, SIGMA)
        weights = np.random.default_rng(0).exponential(0.01, NUM_GROUPS)
        loss = 3.0 + float(weights @ (np.array(bits) == 4)) + float(generator.normal(0.0, 0.003))
        done = int(start.name.rpartition("-")[2]) if start else 0
        for step in (rung for rung in job.config.search.rungs if rung > done):
            self._sleep(length * (step - done) / STEPS, step, progress)
            done = step
            checkpoint = self.diary / f"{os.getpid()}" / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "adapter.bin").write_bytes(os.urandom(CHECKPOINT_BYTES))
            report(RungResult(step=step, loss=loss + 0.5 * math.exp(-step / 8)), checkpoint)

    def _sleep(self, seconds: float, step: int, progress: Progress) -> None:
        started = time.time()
        while (left := started + seconds - time.time()) > 0:
            progress(step)
            time.sleep(min(left, 5.0))
        line = json.dumps([os.getpid(), step, started, time.time()])
        with (self.diary / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(line + "\n")


def start_ray(num_cpus: int, num_gpus: int = 0) -> None:
    """Ray on this machine, on loopback, with so many cores and GPUs to count."""
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
    )


def sleeps(diary: Path) -> list[Slept]:
    """Every sleep that was written down."""
    lines = [line for path in diary.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [Slept(*json.loads(line)) for line in lines]


def run_search(
    folder: Path,
    searcher: str,
    num_trials: int,
    slots: int,
    mean_seconds: float,
    resources: dict[str, float],
    emit: Callable[[Event], None] = lambda event: None,
) -> SearchOutcome:
    """The search in `folder`, on the Ray that this process has joined; goes on from what is there.

    Args:
        folder: Of the run.
        searcher: As in `search.searcher`.
        num_trials: In all.
        slots: Trials in flight.
        mean_seconds: Of a trial that no one stops.
        resources: Ray resources of a trial.
        emit: Told of every event.
    """
    diary = folder / "diary"
    diary.mkdir(parents=True, exist_ok=True)
    budget = (LAYOUT.plan_bytes(LAYOUT.smallest()) + LAYOUT.plan_bytes(LAYOUT.largest())) // 2
    job = SearchJob(
        config=_config(folder, searcher, num_trials),
        trial=Sleeper(mean_seconds, diary),
        materials=Materials({}, folder),
        layouts={UNPRUNED: LAYOUT},
        space=SearchSpace((PlanSpace.of(LAYOUT, budget),)),
        may_win=(UNPRUNED,),
        controls=[("unpruned-uniform", LAYOUT.uniform("nf4"))],
        priors={},
        trials=folder / "trials",
        scratch=folder / "tune",
        digest="0" * 16,
        search="1" * 16,
        resources=resources,
        check_node=packed_check(versions(), RunDir(folder)),
    )
    return search(job, Room(Cluster(Slots(())).slots, resources, slots, emit), emit)


def _config(folder: Path, searcher: str, num_trials: int) -> RunConfig:
    """A configuration whose model, data and tasks nobody opens."""
    rows = [{"source": "none.jsonl"}]
    return validate_config(
        {
            "output": str(folder),
            "model": {"source": "none"},
            "data": {"train": rows, "validation": rows, "confirmation": rows},
            "search": {
                "searcher": searcher,
                "max_trials": num_trials,
                "steps": STEPS,
                "first_rung": FIRST_RUNG,
                "reduction_factor": 2,
            },
            "finetune": {"steps": 1},
            "evaluate": {"tasks": ["none"]},
        }
    )
