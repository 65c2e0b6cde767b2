"""Faults at which Tune alone would wait for ever or end without a message: real Ray, with stand-ins
for trials."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ignore
from made_searches import job_of
from ray.cloudpickle import register_pickle_by_value
from raylets import Raylets, joined_raylets
from transformers import AutoConfig

from qpruner.cluster.slots import Room
from qpruner.cluster.tune import search
from qpruner.errors import StageError, StorageError
from qpruner.runs.events import Event, Message, StepsSeen, TrialChanged
from qpruner.runs.records import RungResult
from qpruner.search.trial_records import Progress, Report, TrialJob, read_trials

pytestmark = pytest.mark.slow
register_pickle_by_value(sys.modules[__name__])  # workers have no such module
HELD = {"cpu": 1.0, "gpu": 1.0}
LAST = RungResult(step=4, loss=3.0)
SECONDS = 180.0
"""The longest that a search here may take, on a busy machine."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylets]:
    """A head and one node with a slot, which this process has joined."""
    monkeypatch.chdir(tmp_path)
    with joined_raylets(1, num_gpus=1) as found:
        yield found


def within(room: Callable[[int], int]) -> Callable[[int], int]:
    """The room for trials, which also fails the test if the search does not end in time."""
    deadline = time.monotonic() + SECONDS

    def timed(num_held: int) -> int:
        assert time.monotonic() < deadline, "the search does not end"
        return room(num_held)

    return timed


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def reported(folder: Path, report: Report, result: RungResult) -> None:
    """Report a rung with a checkpoint."""
    (checkpoint := folder / f"made-{time.monotonic_ns()}").mkdir()
    report(result, checkpoint)


def test_a_search_without_hours_and_machines_ends_and_resumes(
    cluster: Raylets, tmp_path: Path
) -> None:
    """The GPU hours are spent with the first rung, after which the only machine is killed."""
    slots = cluster.joined.slots
    told = []

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        for step in (4,) if start else (1, 4):
            reported(tmp_path, report, RungResult(step=step, loss=3.0))
            until((tmp_path / "back").exists, "its machine does not go")

    def tell(event: Event) -> None:
        if (
            isinstance(event, TrialChanged)
            and event.trial.rungs
            and len(cluster.nodes)
            and not told
        ):
            cluster.kill_machine(cluster.nodes[0])
        if isinstance(event, Message):
            told.append(event.text)

    job = replace(job_of(tmp_path, max_trials=1, max_gpu_hours=1e-7), trial=trial, resources=HELD)
    with pytest.raises(
        StageError, match=r"GPU hours were spent .*, and no machine is left that could run a trial"
    ):
        search(job, within(Room(slots, HELD, None, tell)), tell)
    assert any("add a machine" in text for text in told)
    [left] = read_trials(job.trials)
    assert (left.status, len(left.rungs), left.kills) == ("running", 1, 0)

    (tmp_path / "back").touch()
    cluster.add(num_gpus=1)
    outcome = search(job, within(Room(slots, HELD, None, tell)), tell)
    assert [(trial.status, len(trial.rungs)) for trial in outcome.trials] == [("finished", 2)]
    first, again = outcome.trials[0].begun
    assert (first.session, first.seconds, again.session, again.search) == (1, 0.0, 2, job.search)
    # The pause between both is not counted.
    assert first.time + again.seconds < again.time


@pytest.mark.parametrize("room", [1, 2])
def test_a_full_disk_of_the_driver_ends_the_search(
    room: int, cluster: Raylets, disk: Path, tmp_path: Path
) -> None:
    """The disk fills up after the trial has recorded its last rung and before the driver knows.
    With room for a second trial, Tune has learned by then that there is none."""
    filler = disk / "filler"

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        (tmp_path / "begun").touch()
        until((tmp_path / "go").exists, "nobody says go")
        reported(tmp_path, report, LAST)

    job = replace(
        job_of(tmp_path, max_trials=1), trial=trial, trials=disk / "trials", resources=HELD
    )

    def tell(event: Event) -> None:
        if isinstance(event, StepsSeen) and (tmp_path / "begun").exists() and not filler.exists():
            (tmp_path / "go").touch()
            until(lambda: read_trials(job.trials)[0].is_over, "the trial does not finish")
            filler.write_bytes(b"\0" * shutil.disk_usage(disk).free)

    with pytest.raises(StorageError, match="no space left"):
        search(job, within(lambda held: room), tell)
    filler.unlink()
    outcome = search(job, within(lambda held: 1), ignore)
    assert [(trial.status, trial.kills) for trial in outcome.trials] == [("finished", 0)]


def test_a_trial_waits_for_a_storage_that_is_away(
    cluster: Raylets, disk: Path, tmp_path: Path
) -> None:
    """transformers reports a missing file by an error without the errno of the system."""
    (disk / "config.json").write_text('{"model_type": "llama"}')

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        if not (tmp_path / "away").exists():
            (tmp_path / "away").touch()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "qpruner-away", disk], check=True)
            subprocess.Popen(["sh", "-c", f"sleep 1; umount {disk}"])
        AutoConfig.from_pretrained(disk)
        reported(tmp_path, report, LAST)

    job = replace(
        job_of(tmp_path, max_trials=1), trial=trial, trials=disk / "trials", resources=HELD
    )
    outcome = search(job, within(lambda held: 1), ignore)
    assert [(trial.status, trial.reason, trial.kills) for trial in outcome.trials] == [
        ("finished", None, 0)
    ]


def test_a_worker_that_never_leaves_its_trial_is_killed(cluster: Raylets, tmp_path: Path) -> None:
    """The next trial waits for this worker: the trial has not failed, and the death is not counted
    against it."""

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        is_first = not list(tmp_path.glob("made-*"))
        try:
            reported(tmp_path, report, LAST)
        finally:
            time.sleep(10 * SECONDS if is_first else 0)

    kills = []

    def on_event(event: Event) -> None:
        if isinstance(event, Message) and "trial 1 lost its worker" in event.text:
            kills.append(read_trials(job.trials)[1].kills)

    job = replace(
        job_of(tmp_path, max_trials=2, trial_timeout_seconds=20.0), trial=trial, resources=HELD
    )
    outcome = search(job, within(lambda held: 1), on_event)
    assert [trial.status for trial in outcome.trials] == ["finished"] * 2
    assert kills == [0]
