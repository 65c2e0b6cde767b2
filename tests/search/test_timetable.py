"""The same seed and the same `max_concurrent` give the same plans, however long trials take and whatever runs them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from conftest import raw_config, with_key
from raylets import raylets
from test_search_stage import job_of
from test_searchers import MakeProposer, Neighbour, controls_of, maker, score_of, space_of

from qpruner.config import validate_config
from qpruner.execution.cluster import Cluster, connect, disconnect
from qpruner.plan import PrecisionPlan
from qpruner.records import RungResult, TrialRecord
from qpruner.search.searchers import Ending, Ledger, Observation, Suggestion
from qpruner.search.timetable import Timetable
from qpruner.search.trial_job import Progress, Report, TrialJob
from qpruner.search.trial_records import read_trials
from qpruner.search.tune import SearchJob, search
from qpruner.search.tune.asha import RecordedAsha
from qpruner.search.tune.job import METRIC, TIME

SPACE = space_of(10)
SLOTS, MAX_TRIALS = 4, 24
RUNGS = (1, 2, 4, 8)
Found = list[tuple[Suggestion, int]]
"""Suggestions in order, and the step at which each was over."""


def score(plan: PrecisionPlan, step: int) -> float:
    """Of a rung: worth following, and worth stopping for."""
    return score_of(plan) + 1 / step


def diverges(suggestion: Suggestion) -> bool:
    """After its second rung, for one plan in four; no control."""
    return "-" not in suggestion.origin and crc32(str(suggestion.plan).encode()) % 4 == 0


@dataclass
class Machines:
    """A search on machines whose trials take as long as they please; ASHA is Ray's own code.

    Attributes:
        ledger: What hands out plans.
        room: Trials that really run at a time.
        seed: Of how long they take.
        found: What has run so far.
    """

    ledger: Ledger
    room: int
    seed: int
    found: dict[int, tuple[Suggestion, int, Ending | None]] = field(default_factory=dict)

    def run(self, num_events: int | None = None) -> Found:
        """Run the search to its end, or until so many rungs have been reported."""
        generator = np.random.default_rng(self.seed)
        scheduler = asha(self.ledger, self.found)
        events: list[tuple[float, int, int]] = []
        live: dict[int, tuple[Suggestion, Any]] = {}
        now, is_over, heard = 0.0, False, 0
        while True:
            while not is_over and len(live) < self.room and not self.ledger.waits:
                suggestion = self.ledger.next()
                if suggestion is None:
                    is_over = True
                    break
                bits = {f"bits/{name}": value for name, value in suggestion.plan.as_dict().items()}
                trial = SimpleNamespace(trial_id=str(suggestion.index), config={"trial": suggestion.index, **bits})
                scheduler.on_trial_add(None, trial)
                live[suggestion.index] = (suggestion, trial)
                reached = self.found.get(suggestion.index, (suggestion, 0, None))[1]
                self.found[suggestion.index] = (suggestion, reached, None)
                if reached:  # a trial that goes on says its last rung again
                    told = {METRIC: score(suggestion.plan, reached), TIME: reached}
                    assert scheduler.on_trial_result(None, trial, told) == RecordedAsha.CONTINUE
                heapq.heappush(events, (now + generator.lognormal(0, 1.5), suggestion.index, reached))
            if not events or heard == num_events:
                return [(suggestion, step) for _, (suggestion, step, _) in sorted(self.found.items())]
            now, index, reached = heapq.heappop(events)
            heard += 1
            suggestion, trial = live[index]
            if reached == RUNGS[1] and diverges(suggestion):
                self._close(live, index, reached, "ruined")
                continue
            step = next(rung for rung in RUNGS if rung > reached)
            value = score(suggestion.plan, step)
            action = scheduler.on_trial_result(None, trial, {METRIC: value, TIME: step})
            self.ledger.observe(Observation(index, suggestion.plan, step, value))
            self.found[index] = (suggestion, step, None)
            if step == RUNGS[-1] or action == RecordedAsha.STOP:
                self._close(live, index, step, "scored")
            else:
                heapq.heappush(events, (now + generator.lognormal(0, 1.5), index, step))

    def _close(self, live: dict[int, Any], index: int, step: int, ending: Ending) -> None:
        suggestion, _ = live.pop(index)
        self.ledger.close(suggestion, ending)
        self.found[index] = (suggestion, step, ending)


def asha(ledger: Ledger, found: Mapping[int, tuple[Suggestion, int, Ending | None]]) -> RecordedAsha:
    settings = {"steps": RUNGS[-1], "first_rung": RUNGS[0], "reduction_factor": 2}
    raw = raw_config(Path("model"), Path("run"))
    for key, value in settings.items():
        raw = with_key(raw, f"search.{key}", value)
    controls = [plan for _, plan in ledger.controls]
    recorded = [
        TrialRecord(
            index=index,
            digest="0" * 16,
            search="1" * 16,
            origin=suggestion.origin,
            plan=suggestion.plan.as_dict(),
            plan_bytes=SPACE.plan_bytes(suggestion.plan),
            mean_bits=6.0,
            status="running" if ending is None else "stopped",
            rungs=tuple(RungResult(step=step, loss=score(suggestion.plan, step)) for step in RUNGS if step <= reached),
        )
        for index, (suggestion, reached, ending) in sorted(found.items())
    ]
    return RecordedAsha(validate_config(raw), SPACE, controls, recorded, lambda trial: False, is_known=ledger.is_known)


def ledger_of(make: MakeProposer, timetable: bool = True) -> Ledger:
    steps = Timetable(SLOTS, RUNGS) if timetable else None
    return Ledger(SPACE, make(SPACE, 0), controls_of(SPACE), MAX_TRIALS, timetable=steps)


@pytest.mark.parametrize("make", [*map(maker, ("hyperopt", "gp")), Neighbour], ids=["hyperopt", "gp", "neighbour"])
def test_how_long_trials_take_and_how_many_run_at_once_changes_no_plan(make: MakeProposer) -> None:
    """Trials are stopped, fail and end in any order, on as many machines as there are slots or on fewer."""
    expected = Machines(ledger_of(make), SLOTS, seed=0).run()
    ends = [step for _, step in expected]
    assert len(expected) == MAX_TRIALS and {1, RUNGS[-1]} <= set(ends), "some are stopped, some run to the end"
    assert any(diverges(suggestion) and step == RUNGS[1] for suggestion, step in expected)
    for seed, room in ((1, SLOTS), (2, SLOTS), (3, 3), (4, 1)):
        assert Machines(ledger_of(make), room, seed).run() == expected, f"{room} at a time, seed {seed}"
    # By themselves they would change them.
    found = [Machines(ledger_of(make, timetable=False), SLOTS, seed).run() for seed in range(3)]
    assert found[0] != found[1] or found[0] != found[2]


def test_it_learns_from_what_is_over() -> None:
    """The first plans beyond the slots follow the first that have ended, by trial number where they end together."""
    ledger = ledger_of(Neighbour)
    suggestions = [ledger.next() for _ in range(SLOTS)]
    assert ledger.waits
    for suggestion in reversed(suggestions):
        assert suggestion and ledger.waits, "the first trial is not over yet"
        for step in RUNGS:
            ledger.observe(Observation(suggestion.index, suggestion.plan, step, 1.0))
        ledger.close(suggestion)
    for number in range(SLOTS):
        assert not ledger.waits
        ledger.next()
        history = ledger.history()
        finished = {item.index for item in history.observations if item.step == RUNGS[-1]}
        assert finished == set(range(number + 1))
        assert len(history.pending) == SLOTS
    assert ledger.waits


def test_one_slot_changes_nothing() -> None:
    """With one trial at a time everything is known in any case, and stops what it would have."""
    make = maker("gp")
    timetable = Timetable(1, RUNGS)
    slots = replace(ledger_of(make), timetable=timetable)
    assert Machines(slots, 1, seed=0).run() == Machines(ledger_of(make, timetable=False), 1, seed=5).run()


@pytest.mark.parametrize("killed_after", [1, 9, 23, 40])
def test_a_search_taken_up_again_proposes_what_it_would_have(killed_after: int) -> None:
    make = maker("gp")
    expected = Machines(ledger_of(make), SLOTS, seed=0).run()
    killed = Machines(ledger_of(make), SLOTS, seed=1)
    killed.run(num_events=killed_after)
    again = ledger_of(make)
    for index in sorted(killed.found):
        suggestion, reached, ending = killed.found[index]
        rungs = [Observation(index, suggestion.plan, step, score(suggestion.plan, step)) for step in RUNGS]
        known = [rung for rung in rungs if rung.step <= reached]
        if ending is None:
            again.resume(suggestion, known)
        else:
            again.recall(suggestion, known, ending)
    machines = Machines(again, SLOTS, seed=2, found=killed.found)
    assert [suggestion for suggestion, _ in machines.run()] == [suggestion for suggestion, _ in expected]


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head and two nodes with a slot each, which this process has joined."""
    monkeypatch.chdir(tmp_path)
    with raylets(2) as found:
        yield connect(found.address)
        disconnect()


def paced(folder: Path, deterministic: bool, pace: int) -> SearchJob:
    """A search of 14 trials, two at a time, whose trials take as long as `pace` says."""

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        generator = np.random.default_rng([pace, *job.plan.values()])
        loss = 3.0 - sum(bits / (1 + place) for place, bits in enumerate(job.plan.values())) / 20
        for step in job.config.search.rungs:
            time.sleep(float(generator.choice((0.05, 0.6))))
            (checkpoint := folder / f"made-{time.monotonic_ns()}").mkdir()
            report(RungResult(step=step, loss=loss + 1 / step), checkpoint)

    settings = {"max_trials": 14, "max_concurrent": 2, "searcher": "gp", "steps": 4, "first_rung": 1}
    folder.mkdir()
    return replace(job_of(folder, **settings, deterministic=deterministic), trial=trial)


@pytest.mark.slow
def test_the_same_seed_and_as_many_workers_give_the_same_plans(two_nodes: Cluster, tmp_path: Path) -> None:
    """Real Ray, real ASHA: trials of another pace each time."""

    def planned(name: str, deterministic: bool, pace: int) -> list[tuple[dict[str, int], int]]:
        job = paced(tmp_path / name, deterministic, pace)
        search(job, lambda: 2, lambda event: None)
        return [(dict(trial.plan), trial.rungs[-1].step) for trial in read_trials(job.trials)]

    expected = planned("first", True, pace=0)
    assert len(expected) == 14 and {step for _, step in expected} >= {1, 4}, "some were stopped"
    assert planned("second", True, pace=1) == expected
    assert planned("third", True, pace=2) == expected
    free = [planned(f"free-{pace}", False, pace) for pace in range(3)]
    assert free[0] != free[1] or free[0] != free[2], "their pace would have changed them"
