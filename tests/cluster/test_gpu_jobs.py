"""The jobs of a whole flow on four GPUs: each runs on the GPU that Ray reserved for it, and no two
at once on one."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ignore
from made_searches import job_of
from raylets import joined_raylets

from qpruner.cluster.executor import ClusterExecutor, GpuTime
from qpruner.cluster.node_check import packed_check
from qpruner.cluster.tasks import run_tasks
from qpruner.cluster.tune import search
from qpruner.runs.events import Emit
from qpruner.runs.records import RungResult
from qpruner.search.trial_records import Progress, Report, TrialJob

NUM_GPUS = 4
ONE = {"cpu": 1.0, "gpu": 1.0}
CHECK = packed_check({}, None)


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    with joined_raylets(1, num_cpus=2 * NUM_GPUS, num_gpus=NUM_GPUS):
        yield


# Workers cannot import this file; nested functions are pickled with their code.


def noting(folder: Path) -> Callable[[str, float], None]:
    """Make a function that works for some seconds and writes down on which GPU.

    CUDA keeps the first device that a process has used; a variable of the process stands for it.
    """

    def work(name: str, seconds: float) -> None:
        given = os.environ["CUDA_VISIBLE_DEVICES"]
        kept = os.environ.setdefault("FIRST_DEVICE_OF_THIS_PROCESS", given)
        began = time.time()
        time.sleep(seconds)
        place = {
            "job": name,
            "given": given,
            "kept": kept,
            "began": began,
            "ended": time.time(),
            "pid": os.getpid(),
        }
        (folder / f"{name}-{time.monotonic_ns()}.json").write_text(json.dumps(place))

    return work


@pytest.mark.slow
def test_every_job_of_a_flow_runs_on_its_own_gpu(four_gpus: None, tmp_path: Path) -> None:
    """In the order of the stages; the worker of a job is killed, and the job runs again."""
    note = noting(tmp_path)

    def alone(emit: Emit) -> None:
        note("prune", 0.2)

    def job(described: tuple[str, float]) -> str:
        name, seconds = described
        if name == "confirm" and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        note(name, seconds)
        return name

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        note("trial", 0.4)
        (checkpoint := tmp_path / f"checkpoint-{time.monotonic_ns()}").mkdir()
        report(RungResult(step=job.config.search.steps, loss=3.0), checkpoint)

    def run_all(name: str, seconds: Sequence[float], own_process: bool = False) -> None:
        jobs: list[Any] = list(zip(itertools.repeat(name), seconds, strict=False))
        done = list(run_tasks(job, jobs, ONE, NUM_GPUS, own_process, CHECK))
        assert len(done) == len(seconds)

    ClusterExecutor(ONE, GpuTime(), CHECK).run(alone, ignore)
    run_all("bank", [0.5, 0.3, 0.7, 0.4])
    of_search = job_of(tmp_path, searcher="random", first_rung=4, max_trials=5)
    search(
        replace(of_search, trial=trial, resources=ONE, controls=[]), lambda held: NUM_GPUS, ignore
    )
    run_all("confirm", [0.3, 0.6, 0.2, 0.5])
    run_all("winner", [0.3], own_process=True)
    run_all("evaluate", [0.5, 0.3, 0.4])
    run_all("comparison", [0.6, 0.2, 0.5, 0.3, 0.4], own_process=True)
    run_all("inference", [0.2], own_process=True)

    places = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(places) == 1 + 4 + 5 + 4 + 1 + 3 + 5 + 1
    assert (tmp_path / "killed").exists()
    misplaced = [place for place in places if place["kept"] != place["given"]]
    assert not misplaced, f"{len(misplaced)} jobs on another GPU than the one reserved"
    at_once = [
        (one["job"], other["job"])
        for one, other in itertools.combinations(places, 2)
        if one["kept"] == other["kept"]
        and one["began"] < other["ended"]
        and other["began"] < one["ended"]
    ]
    # No two jobs ran at once on one GPU.
    assert not at_once
    assert {place["given"] for place in places if place["job"] == "bank"} == {
        str(gpu) for gpu in range(NUM_GPUS)
    }


def test_a_process_with_a_gpu_serves_one_job(four_gpus: None) -> None:
    def job(number: int) -> int:
        return os.getpid()

    assert len({pid for _, pid in run_tasks(job, range(4), ONE, 2, False, CHECK)}) == 4


@pytest.mark.slow
def test_a_job_with_its_own_process_begins_in_a_new_one(four_gpus: None) -> None:
    """Also without a GPU: the memory of earlier jobs would count as its own."""

    def count(job: int) -> int:
        number = int(os.environ.get("JOBS_OF_THIS_PROCESS", "0"))
        os.environ["JOBS_OF_THIS_PROCESS"] = str(number + 1)
        return number

    run: Callable[..., Any] = partial(run_tasks, count, range(4), {"cpu": 1.0}, 2, check_node=CHECK)
    before = [number for _, number in run(own_process=False)]
    # Other jobs share processes.
    assert max(before) > 0
    assert [number for _, number in run(own_process=True)] == [0] * 4


def test_a_process_keeps_no_memory_of_a_finished_job(four_gpus: None) -> None:
    """An idle process would keep it, perhaps on a GPU, until its next job."""

    def fill(job: int) -> int:
        import torch

        class Model:
            def __init__(self) -> None:
                # as Trainer, model and callbacks form cycles
                self.weights = torch.ones(2**27)
                self.itself = self

        Model()
        return os.getpid()

    import psutil

    [(_, pid)] = run_tasks(fill, [0], {"cpu": 1.0}, 1, False, CHECK)
    # The process is idle now, without its 0.5 GB of weights.
    assert psutil.Process(pid).memory_info().rss < 2**29
