"""What would have a session of Tune wait for ever, or end without a word: real Ray, with trials that stand in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from raylets import Raylets, raylets
from test_search_stage import job_of

from qpruner.errors import StageError
from qpruner.events import Event, Message, TrialChanged
from qpruner.execution.cluster import Cluster, connect, disconnect
from qpruner.execution.room import Room
from qpruner.records import RungResult
from qpruner.search.trial_job import Progress, Report, TrialJob
from qpruner.search.trial_records import read_trials
from qpruner.search.tune import search

pytestmark = pytest.mark.slow
SECONDS = 180.0
"""After so many a search that should have ended has not, on a machine that does much else."""


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Raylets, Cluster]]:
    """A head and one node with a slot, which this process has joined."""
    monkeypatch.chdir(tmp_path)
    with raylets(1, num_gpus=1) as found:
        yield found, connect(found.address)
        disconnect()


def within(room: Callable[[], int]) -> Callable[[], int]:
    """The room for a search that is to end in time."""
    deadline = time.monotonic() + SECONDS

    def timed() -> int:
        assert time.monotonic() < deadline, "the search does not end"
        return room()

    return timed


def test_a_search_whose_hours_are_over_and_whose_machines_are_gone_ends_and_goes_on_when_one_is_back(
    joined: tuple[Raylets, Cluster], tmp_path: Path
) -> None:
    """They are over with the first rung, after which its machine goes."""
    cluster, facts = joined
    told: list[str] = []

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        for step in (1, 4):
            if start and step == 1:
                continue
            (checkpoint := tmp_path / f"made-{time.monotonic_ns()}").mkdir()
            report(RungResult(step=step, loss=3.0), checkpoint)
            deadline = time.monotonic() + SECONDS
            while not (tmp_path / "back").exists():
                assert time.monotonic() < deadline, "its machine does not go"
                time.sleep(0.05)

    def tell(event: Event) -> None:
        if isinstance(event, TrialChanged) and event.trial.rungs and len(cluster.nodes) and not told:
            cluster.kill_machine(cluster.nodes[0])
        if isinstance(event, Message):
            told.append(event.text)

    held = {"cpu": 1.0, "gpu": 1.0}
    job = replace(job_of(tmp_path, max_trials=1, max_gpu_hours=1e-7), trial=trial, resources=held)
    with pytest.raises(StageError, match=r"GPU hours were spent .*, and no machine is left that could run a trial"):
        search(job, within(Room(facts.slots, held, None, tell)), tell)
    assert any("one has to join" in text for text in told)
    (left,) = read_trials(job.trials)
    assert (left.status, len(left.rungs), left.kills) == ("running", 1, 0)

    (tmp_path / "back").touch()
    cluster.add(num_gpus=1)
    outcome = search(job, within(Room(facts.slots, held, None, tell)), tell)
    assert [(trial.status, len(trial.rungs)) for trial in outcome.trials] == [("finished", 2)]
