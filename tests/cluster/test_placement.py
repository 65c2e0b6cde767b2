"""A real search with trials that only record where they run: every GPU of every node runs one trial
at a time."""

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
from conftest import texts
from made_searches import CONTROLS, LAYOUT, job_of, plan_of
from raylets import Raylets, joined_raylets

from qpruner.cluster.slots import Room, Slots
from qpruner.cluster.tune import SearchJob, search
from qpruner.cluster.tune.devices import MAX_FAILURES
from qpruner.cluster.tune.driver import MAX_ERRORS
from qpruner.cluster.tune.worker import check_free_memory
from qpruner.config.schema import TrainingConfig
from qpruner.errors import StageError
from qpruner.runs.events import Event, SlotsFound, TrialChanged
from qpruner.runs.records import RungResult, TrialRecord
from qpruner.search.progress import failing_devices
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

Fault = Callable[[TrialJob], None]
"""What a trial does on a GPU with a defect."""
GPUS = (2, 1)
"""The GPUs of two nodes; a third node, the head, has no GPU and no core."""
NUM_TRIALS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """A cluster of three nodes that this process has joined."""
    with joined_raylets(0) as found:
        for number in GPUS:
            found.add(num_cpus=4, num_gpus=number)
        yield found


@pytest.fixture
def slots(cluster: Raylets) -> Slots:
    """The slots of that cluster."""
    return cluster.joined.slots()


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
    """Make a trial that records where and when it runs; trials end only after `at_once` of them
    have run together."""
    wait = waiting(folder, "began-*", at_once)

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        import ray

        began = time.time()
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        (folder / f"began-{name}").touch()
        wait()
        time.sleep(0.2)
        node = ray.get_runtime_context().get_node_id()
        devices = os.environ["CUDA_VISIBLE_DEVICES"]
        place = {
            "node": node,
            "devices": devices,
            "began": began,
            "ended": time.time(),
            "pid": os.getpid(),
        }
        (folder / f"ended-{name}").write_text(json.dumps(place))
        (checkpoint := folder / f"checkpoint-{name}").mkdir()
        report(RungResult(step=job.config.search.steps, loss=3.0), checkpoint)

    return trial


def search_of(folder: Path, slots: Slots, at_once: int = 0, **settings: Any) -> SearchJob:
    """Make a search of random plans with recording trials and default resources."""
    job = job_of(
        folder, **{"searcher": "random", "max_trials": NUM_TRIALS, "first_rung": 4} | settings
    )
    return replace(
        job,
        trial=recording_trial(folder, at_once),
        resources=slots.resources_per_trial(None),
        controls=[],
    )


@pytest.mark.slow
def test_every_gpu_runs_one_trial_at_a_time(slots: Slots, tmp_path: Path) -> None:
    job = search_of(tmp_path, slots, at_once=sum(GPUS))
    assert job.resources == {"cpu": 1.0, "gpu": 1.0}
    events = []
    outcome = search(job, Room(lambda: slots, job.resources, None, events.append), events.append)
    assert [event for event in events if isinstance(event, SlotsFound)] == [SlotsFound(sum(GPUS))]
    assert statuses(outcome.trials) == ["finished"] * NUM_TRIALS
    ended = [json.loads(path.read_text()) for path in tmp_path.glob("ended-*")]
    assert len(ended) == NUM_TRIALS
    used: dict[str, set[str]] = defaultdict(set)
    for trial in ended:
        used[trial["node"]].add(trial["devices"])
    # Each trial sees one GPU, and every GPU had a trial.
    assert sorted(used.values(), key=len) == [{"0"}, {"0", "1"}]
    for one, other in itertools.combinations(ended, 2):
        if one["began"] < other["ended"] and other["began"] < one["ended"]:
            assert (one["node"], one["devices"]) != (other["node"], other["devices"])
    pulses = [read_pulse(job.trials, trial.index) for trial in outcome.trials]
    assert Counter(pulse.node for pulse in pulses if pulse) == Counter(
        trial["node"] for trial in ended
    )
    # Reused workers keep their GPU.
    assert len({trial["pid"] for trial in ended}) < NUM_TRIALS


@pytest.mark.slow
def test_ctrl_c_starts_no_waiting_trial(slots: Slots, tmp_path: Path) -> None:
    """There is room for six trials, as on a cluster that may grow, but for three of them no
    machine."""
    is_first = True

    def emit(event: Event) -> None:
        nonlocal is_first
        if is_first and isinstance(event, TrialChanged) and event.trial.is_over:
            is_first = False
            os.kill(os.getpid(), signal.SIGINT)

    job = search_of(tmp_path, slots, at_once=sum(GPUS))
    with pytest.raises(KeyboardInterrupt):
        search(job, lambda held: 6, emit)
    found = [(trial.status, trial.has_begun) for trial in read_trials(job.trials)]
    assert sorted(found) == [("finished", True)] * 3 + [("running", False)] * 3


def on_device(folder: Path, fault: Fault, only: str | None = None, seconds: float = 0.0) -> Trial:
    """Make a trial that causes a fault on the GPU `only`, or on every one, and otherwise records
    where it runs."""
    intact = recording_trial(folder, 0)

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        device = os.environ["CUDA_VISIBLE_DEVICES"]
        (folder / f"tried-{device}-{time.monotonic_ns()}").touch()
        if only in (None, device):
            fault(job)
        time.sleep(seconds)
        intact(job, start, report, progress)

    return trial


def out_of_memory() -> Fault:
    """Make a fault: allocating more than a process may have, as on a small GPU, or on one that
    others use."""

    def fault(job: TrialJob) -> None:
        import resource

        import torch

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, before[1]))
        try:
            torch.zeros(2**30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return fault


def breakdown(mended: Path | None = None) -> Fault:
    """Make a fault: the error of a GPU with a defect, until the file `mended` is there."""

    def fault(job: TrialJob) -> None:
        if not (mended and mended.exists()):
            raise RuntimeError("CUDA error: unspecified launch failure")

    return fault


def crash() -> Fault:
    """Make a fault: a driver of the GPU that ends the process without an error of Python's."""

    def fault(job: TrialJob) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    return fault


def statuses(trials: list[TrialRecord]) -> list[str]:
    """Return how each trial ended, with the reason if there is one."""
    return [": ".join(filter(None, (trial.status, trial.reason))) for trial in trials]


def searched(job: SearchJob, room: int = 2) -> tuple[list[TrialRecord], list[str]]:
    """Run a search; return its trials and the messages."""
    events = []
    outcome = search(job, lambda held: room - held, events.append)
    return outcome.trials, texts(events)


def on_gpus(folder: Path, trial: Trial, **settings: Any) -> SearchJob:
    """Make a search of two controls and five random plans on a machine with two GPUs; no other has
    as many cores."""
    job = job_of(folder, **{"searcher": "random", "first_rung": 4, "max_trials": 7} | settings)
    return replace(job, trial=trial, resources={"cpu": 2.0, "gpu": 1.0})


@pytest.fixture(scope="module")
def two_gpus(cluster: Raylets) -> Iterator[None]:
    """Only the machine with two GPUs and four cores can run a trial that takes two cores."""
    cluster.cluster.remove_node(cluster.nodes.pop())
    yield
    cluster.add(num_cpus=4, num_gpus=GPUS[1])


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_a_trial_that_runs_out_of_memory_is_tried_on_another_gpu(tmp_path: Path) -> None:
    """With one of two slots too small, most trials were lost, controls too, and the command ended
    with a winner."""
    trials, said = searched(
        on_gpus(tmp_path, on_device(tmp_path, out_of_memory(), "1"), max_trials=4)
    )
    assert statuses(trials) == ["finished"] * 4
    [moved] = [trial for trial in trials if trial.failed_on]
    [device] = moved.failed_on
    assert device.startswith("GPU 1 of 127.0.0.1")
    assert (moved.device or "").startswith("GPU 0 of ")
    # The other GPU may hold the whole batch.
    assert moved.micro_batch_size is None
    assert failing_devices(trials) == [f"1 trial failed on {device} and ran elsewhere"]
    assert any(f"failed on {device} (out of memory: " in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [out_of_memory, breakdown, crash])
@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_fails_where_the_other_succeeds_gets_no_more_trials(
    kind: Callable[[], Fault], tmp_path: Path
) -> None:
    """Trials are longer than a worker takes to start, or the worker of the other GPU would take
    them all."""
    trial = on_device(tmp_path, kind(), "1", seconds=10.0)
    trials, said = searched(on_gpus(tmp_path, trial))
    assert statuses(trials) == ["finished"] * 7
    assert len([trial for trial in trials if trial.failed_on]) == MAX_FAILURES
    [named] = [text for text in said if text.startswith("warning")]
    assert "2 trials failed on GPU 1 of 127.0.0.1" in named
    assert "gets no more trials" in named


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_gets_trials_again_after_one_that_diverged_elsewhere(tmp_path: Path) -> None:
    """A trial fails once on one GPU and diverges on the other: neither GPU is to blame."""
    fail = breakdown()
    intact = recording_trial(tmp_path, 0)

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        from qpruner.errors import TrainingDiverged

        if dict(job.plan) == first:
            is_moved = (tmp_path / "failed").exists()
            (tmp_path / "failed").touch()
            if is_moved:
                raise TrainingDiverged("the loss is nan")
            fail(job)
        time.sleep(5.0)
        intact(job, start, report, progress)

    first = CONTROLS[0][1].as_dict()
    trials, _ = searched(on_gpus(tmp_path, trial))
    assert trials[0].failure == "diverged"
    assert len(trials[0].failed_on) == 1
    used = Counter(trial.device for trial in trials[1:])
    assert len(used) == 2, used


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_a_plan_too_large_for_every_gpu_is_the_only_one_lost(tmp_path: Path) -> None:
    too_large = CONTROLS[1][1].as_dict()
    run_out = out_of_memory()

    def fault(job: TrialJob) -> None:
        if dict(job.plan) == too_large:
            run_out(job)

    trials, said = searched(on_gpus(tmp_path, on_device(tmp_path, fault)))
    [lost] = [trial for trial in trials if trial.status != "finished"]
    assert (lost.index, lost.failure, len(lost.failed_on)) == (1, "infeasible", 1)
    # It was tried on both GPUs.
    assert lost.device not in lost.failed_on
    assert not [text for text in said if text.startswith("warning")]
    assert failing_devices(trials) == []
    # Both GPUs go on.
    assert {trial.device for trial in trials if trial.index > 1} == {
        lost.device,
        *lost.failed_on,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_with_one_device_the_plan_is_blamed_at_once(tmp_path: Path) -> None:
    """The two GPUs of a trial are one device."""
    job = on_gpus(tmp_path, on_device(tmp_path, out_of_memory()), max_trials=1)
    [lost], _ = searched(replace(job, resources={"cpu": 4.0, "gpu": 2.0}), 1)
    assert (lost.failure, lost.failed_on, len(list(tmp_path.glob("tried-*")))) == (
        "infeasible",
        (),
        3,
    )
    # Two larger micro-batches came before.
    assert lost.reason
    assert "(micro-batch 1)" in lost.reason


def test_a_device_without_room_for_the_model_begins_no_trial() -> None:
    check_free_memory(LAYOUT, plan_of("888888"), TrainingConfig())
    with pytest.raises(
        MemoryError, match=r"GB are free, and the model takes at least 11529215\d\d.* GB"
    ):
        check_free_memory(
            replace(LAYOUT, ungrouped_bytes=2**60), plan_of("888888"), TrainingConfig()
        )


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_a_search_in_which_everything_fails_ends_and_loses_no_plan(tmp_path: Path) -> None:
    job = on_gpus(tmp_path, on_device(tmp_path, breakdown(tmp_path / "mended")))
    with pytest.raises(
        StageError, match=rf"{MAX_ERRORS} trials in a row failed, the last on GPU \d of"
    ) as caught:
        searched(job)
    assert "unspecified launch failure" in caught.value.cause
    assert "repair that machine" in caught.value.remedy
    (tmp_path / "mended").touch()
    trials, _ = searched(job)
    # No plan was lost.
    assert statuses(trials) == ["finished"] * 7


@pytest.mark.slow
def test_a_worker_that_lost_its_trial_publishes_nothing(slots: Slots, tmp_path: Path) -> None:
    """As if its machine had been cut off for a while; another worker's id in the record stands for
    that worker."""

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

    trials = tmp_path / "trials"
    folder = tmp_path / "trials" / "0000"
    others = folder / ".checkpoint-4.another"
    job = replace(search_of(tmp_path, slots, max_trials=1), trial=trial)
    outcome = search(job, lambda held: 1, lambda event: None)
    assert json.loads((tmp_path / "left").read_text()) == [[], "another", True]
    assert statuses(outcome.trials) == ["finished"]
    left = sorted(path.name for path in folder.iterdir())
    # Unpublished copies are deleted.
    assert left == ["checkpoint-4", "pulse.json", "trial.json"]
