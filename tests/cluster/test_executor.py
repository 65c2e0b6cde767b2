"""Work behaves the same on a cluster and in this process: events arrive at once, errors keep their
type."""

import errno
import gc
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
from conftest import ignore, raw_config, texts, with_key
from raylets import raylets
from transformers import PreTrainedModel

from qpruner.cluster.connect import connect, disconnect
from qpruner.cluster.executor import ClusterExecutor, GpuTime, LocalExecutor, ModelExecutor
from qpruner.cluster.node_check import packed_check
from qpruner.cluster.tasks import MAX_DEATHS, run_tasks
from qpruner.config.load import validate_config
from qpruner.errors import CorruptFile, StageError, UserError, WorkerDied
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight import inspect
from qpruner.pipeline.run import run
from qpruner.runs.events import Emit, Event, Progress, StageStarted, TableMade
from qpruner.runs.records import Results
from qpruner.runs.run_dir import RunDir

GPU = {"cpu": 1.0, "gpu": 1.0}
CHECK = packed_check({}, None)


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[str]:
    """The address of a cluster with one node, which has one GPU."""
    with raylets(1, num_gpus=1) as started:
        yield started.address


@pytest.fixture(scope="module")
def joined(one_gpu: str) -> Iterator[str]:
    """The address of that cluster, which this process has joined."""
    connect(one_gpu)
    yield one_gpu
    disconnect()


@pytest.fixture(scope="module", params=["here", "cluster"])
def executor(request: pytest.FixtureRequest) -> ModelExecutor:
    """An executor of each kind."""
    made: ModelExecutor = LocalExecutor(0.0, GpuTime())
    if request.param == "cluster":
        request.getfixturevalue("joined")
        made = ClusterExecutor(GPU, GpuTime(), CHECK)
    return made


# Workers cannot import this file; nested functions are pickled with their code.


def test_events_arrive_during_the_work(executor: ModelExecutor, tmp_path: Path) -> None:
    heard = tmp_path / "heard"

    def work(job: int, emit: Emit) -> int:
        emit(Progress("prune", 1, 2))
        while not heard.exists():
            time.sleep(0.01)
        return job + 1

    assert executor.run(partial(work, 1), lambda event: heard.write_text(str(event))) == 2
    assert "done=1" in heard.read_text()


def test_errors_keep_their_type_and_attributes(executor: ModelExecutor) -> None:
    def work(job: Exception, emit: Emit) -> None:
        raise job

    for error in (
        UserError("`model.source`: no such model"),
        StageError("prune", "a disk is full", "make room"),
        CorruptFile("a weight file is damaged", Path("/run/prune/model.safetensors")),
        OSError(errno.ENOSPC, "No space left on device", "/run/prune"),
    ):
        with pytest.raises(type(error)) as caught:
            executor.run(partial(work, error), ignore)
        assert str(caught.value) == str(error)
        for attribute in ("path", "stage", "cause", "remedy", "errno", "filename"):
            assert getattr(caught.value, attribute, None) == getattr(error, attribute, None)


@pytest.mark.slow
def test_the_work_of_a_killed_worker_runs_again(joined: str, tmp_path: Path) -> None:
    """After progress between two deaths, as between checkpoints of a fine-tune, deaths are counted
    anew."""
    marks = tmp_path / "killed"
    events = []
    marks.mkdir()

    def task(deaths: int) -> int:
        made = len(list(marks.iterdir()))
        if made < deaths:
            (marks / str(made)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    def work(deaths: int, emit: Emit) -> int:
        return task(deaths)

    place = ClusterExecutor(GPU, GpuTime(), CHECK)
    assert place.run(partial(work, 1), events.append) == 1
    # A slow start is reported as well.
    said = [text for text in texts(events) if "waiting" not in text]
    assert len(said) == 1
    assert said[0].startswith("a worker died")
    with pytest.raises(WorkerDied, match=f"{MAX_DEATHS} workers died"):
        place.run(partial(work, 10**6), ignore)
    deaths = len(list(marks.iterdir())) + MAX_DEATHS + 1
    found = run_tasks(
        task, [deaths], GPU, 1, True, CHECK, progress=lambda position: len(list(marks.iterdir()))
    )
    assert list(found) == [(0, deaths)]


def test_gpu_seconds_count_only_while_work_runs(joined: str) -> None:
    """Waiting for a GPU and the time between two pieces of work do not count."""

    def work(seconds: float, emit: Emit) -> None:
        time.sleep(seconds)

    held = GpuTime()
    place = LocalExecutor(2.0, held)
    for _ in range(2):
        place.run(partial(work, 0.5), ignore)
        time.sleep(0.5)
    assert 2 <= held.seconds < 2.8
    tasks = []
    list(
        run_tasks(
            lambda seconds: time.sleep(seconds),
            [2.0, 2.0],
            GPU,
            2,
            False,
            CHECK,
            on_held=tasks.append,
        )
    )
    # One of the two waits for 2 s and a start.
    assert len(tasks) == 2
    assert all(2.0 <= seconds < 4.0 for seconds in tasks)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["task", "group"])
def test_lost_machines_are_not_counted_as_deaths(place: str, tmp_path: Path) -> None:
    """The work starts again on another machine, more than `MAX_DEATHS` times."""

    def task(job: None) -> int:
        import ray

        (tmp_path / ray.get_runtime_context().get_node_id()).touch()
        while not (tmp_path / "last").exists():
            time.sleep(0.05)
        return 3

    def done() -> int:
        if place == "task":
            [(_, found)] = run_tasks(task, [None], GPU, 1, True, CHECK)
        else:
            from qpruner.cluster.group import run_groups

            [(_, found)] = run_groups(task, [None], {"cpu": 1.0}, 1, 1, tmp_path / "train", CHECK)
        return found

    def take_machines_away() -> None:
        for _ in range(MAX_DEATHS):
            node = cluster.nodes[0]
            while not (tmp_path / node.node_id).exists():
                time.sleep(0.05)
            cluster.add(num_gpus=1)
            cluster.kill_machine(node)
        (tmp_path / "last").touch()

    with raylets(1, num_gpus=1) as cluster, ThreadPoolExecutor(1) as thread:
        cluster.in_a_thread()
        disconnect()  # from the cluster of the tests before
        connect(cluster.address)
        try:
            taking = thread.submit(take_machines_away)
            assert done() == 3
            taking.result()
        finally:
            disconnect()


@pytest.mark.slow
def test_stages_share_the_only_gpu_of_a_cluster(
    one_gpu: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The driver never holds a model."""

    def models() -> set[int]:
        return {id(each) for each in gc.get_objects() if issubclass(type(each), PreTrainedModel)}

    def tell(event: Event) -> None:
        events.append(event)
        assert models() <= before, f"the driver holds another model at {event}"

    def sensed(folder: str, emit: Emit, address: str | None) -> Results:
        config = validate_config(raw_config(tiny_model, tmp_path / folder))
        return run(config, emit, address, "sensitivity")

    gc.collect()
    events = []
    before = models()
    there = sensed("there", tell, one_gpu)
    nodes, begin = events[:2]
    # The rows are those of the head and the worker.
    assert isinstance(nodes, TableMade)
    assert [row[-1] for row in nodes.body] == ["ok", "ok"]
    # Nodes are checked before the first stage.
    assert isinstance(begin, StageStarted)
    here = sensed("here", ignore, None)
    for record in (there.prune, there.bank, there.sensitivity):
        # One GPU is held while work runs.
        assert 0 < record.gpu_seconds <= record.seconds
    assert there.prune.cuts.keys() == here.prune.cuts.keys()
    for name, cut in here.prune.cuts.items():
        assert there.prune.cuts[name].layers == cut.layers
    assert there.bank.files == here.bank.files
    for name, method in here.sensitivity.methods.items():
        for level, values in method.values.items():
            # A group that is not offered the format has no value.
            assert there.sensitivity.methods[name].values[level] == tuple(
                value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
                for value in values
            )


@pytest.mark.slow
def test_workers_find_paths_relative_to_the_driver(
    one_gpu: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers run in another folder than the driver."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "data/model")
    shutil.copytree(str(files("qpruner") / "demo"), "data/demo")
    raw = with_key(
        raw_config(Path("data/model"), tmp_path / "run"), "evaluate.include_path", "data/demo/tasks"
    )
    config = validate_config(raw)
    prepared = run(config, ignore, one_gpu, "prepare").prepare
    assert prepared.model_path == str(tmp_path / "data/model")
    context = Context(config, RunDir(tmp_path / "run"), ignore, None, inspect(config))
    assert context.worker_config.evaluate.include_path == str(tmp_path / "data/demo/tasks")
    # Records and digests keep the path of the configuration.
    assert context.config.model.source == "data/model"
