"""The same seed and the same `max_concurrent` give the same plans, however long trials take and how many really run."""

from __future__ import annotations

import heapq
import itertools
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

from qpruner.cluster.cluster import Cluster, connect, disconnect
from qpruner.cluster.tune import SearchJob, search
from qpruner.cluster.tune.asha import RecordedAsha
from qpruner.cluster.tune.job import METRIC, TIME
from qpruner.config.load import validate_config
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.records import RungResult, TrialRecord
from qpruner.search.searchers import Ending, Ledger, Observation, Suggestion
from qpruner.search.timetable import Timetable
from qpruner.search.trial_job import Progress, Report, TrialJob
from qpruner.search.trial_records import read_trials

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
        found: Suggestion, last step and ending of each trial so far, by number; what goes on comes from here.
        slow: A trial that takes long to come up again.
    """

    ledger: Ledger
    room: int
    seed: int
    found: dict[int, tuple[Suggestion, int, Ending | None]] = field(default_factory=dict)
    slow: int | None = None

    def run(self, num_events: int | None = None, is_halted: bool = False) -> Found:
        """Run the search to its end, or until so many rungs have been reported: killed then, or halted, where running
        rungs finish, are recorded and not decided on."""
        self._generator = np.random.default_rng(self.seed)
        self._scheduler = asha(self.ledger, self.found)
        self._events: list[tuple[float, int, int]] = []
        self._live: dict[int, tuple[Suggestion, Any]] = {}
        now, heard, is_over = 0.0, 0, False
        while True:
            while not is_over and len(self._live) < self.room and not self.ledger.waits:
                suggestion = self.ledger.next()
                if suggestion:
                    self._start(suggestion, now)
                is_over = suggestion is None
            if not self._events or heard == num_events:
                break
            now, index, step = heapq.heappop(self._events)
            self._report(now, index, step)
            heard += 1
        if is_halted:
            for _, index, step in self._events:
                suggestion, reached, _ = self.found[index]
                if not (reached == RUNGS[1] and diverges(suggestion)):
                    self.found[index] = (suggestion, step, "scored" if step == RUNGS[-1] else None)
        elif num_events is None:
            assert is_over and not self._live
        return [(suggestion, step) for _, (suggestion, step, _) in sorted(self.found.items())]

    def _start(self, suggestion: Suggestion, now: float) -> None:
        index = suggestion.index
        bits = {f"bits/{name}": value for name, value in suggestion.plan.as_dict().items()}
        trial = SimpleNamespace(trial_id=str(index), config={"trial": index, **bits})
        self._scheduler.on_trial_add(None, trial)
        self._live[index] = (suggestion, trial)
        reached = self.found[index][1] if index in self.found else 0
        self.found[index] = (suggestion, reached, None)
        # A trial that goes on says its last rung again.
        self._await(index, reached or RUNGS[0], now + (100.0 if index == self.slow else 0.0))

    def _await(self, index: int, step: int, now: float) -> None:
        heapq.heappush(self._events, (now + self._generator.lognormal(0, 1.5), index, step))

    def _report(self, now: float, index: int, step: int) -> None:
        suggestion, trial = self._live[index]
        if step > RUNGS[1] and diverges(suggestion):
            self._close(index, RUNGS[1], "ruined")
            return
        value = score(suggestion.plan, step)
        action = self._scheduler.on_trial_result(None, trial, {METRIC: value, TIME: step})
        self.ledger.observe(Observation(index, suggestion.plan, step, value))
        self.found[index] = (suggestion, step, None)
        if step == RUNGS[-1] or action == RecordedAsha.STOP:
            self._close(index, step, "scored")
        else:
            self._await(index, next(rung for rung in RUNGS if rung > step), now)

    def _close(self, index: int, step: int, ending: Ending) -> None:
        suggestion, _ = self._live.pop(index)
        self.ledger.close(suggestion, ending)
        self.found[index] = (suggestion, step, ending)


def taken_up(make: MakeProposer, found: Mapping[int, tuple[Suggestion, int, Ending | None]]) -> Ledger:
    """The ledger of a search that finds these records; they are read in any order."""
    again = ledger_of(make)
    for index, (suggestion, reached, ending) in sorted(found.items(), reverse=True):
        rungs = [Observation(index, suggestion.plan, step, score(suggestion.plan, step)) for step in RUNGS]
        known = [rung for rung in rungs if rung.step <= reached]
        if ending is None:
            again.resume(suggestion, known)
        else:
            again.recall(suggestion, known, ending)
    return again


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
    return RecordedAsha(
        validate_config(raw),
        SPACE,
        controls,
        recorded,
        lambda trial: False,
        rivals=ledger.rivals if ledger.timetable else None,
    )


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
    timed = Machines(replace(ledger_of(make), timetable=Timetable(1, RUNGS)), 1, seed=0).run()
    free = Machines(ledger_of(make, timetable=False), 1, seed=5).run()
    assert [(replace(suggestion, begun=None), step) for suggestion, step in timed] == free


@pytest.mark.parametrize("is_halted", [False, True], ids=["killed", "halted"])
def test_a_search_taken_up_again_goes_on_as_it_would_have(is_halted: bool) -> None:
    """Wherever it was left, however long each trial takes to come up again, on as many machines or on one."""
    make = Neighbour
    expected = Machines(ledger_of(make), SLOTS, seed=0).run()
    num_under_way = 0
    for seed, num_events in itertools.product((1, 2), range(1, 60, 4)):
        left = Machines(ledger_of(make), SLOTS, seed)
        left.run(num_events, is_halted)
        running = [index for index, (_, reached, ending) in left.found.items() if ending is None and reached]
        num_under_way += len(running)
        for room, slow in ((SLOTS, min(running, default=None)), (SLOTS, max(running, default=None)), (1, None)):
            again = Machines(taken_up(make, left.found), room, seed + 10, dict(left.found), slow)
            assert again.run() == expected, f"seed {seed}, left after {num_events} rungs"
    assert num_under_way > 30


def test_what_another_search_left_running_begins_like_any_other_trial() -> None:
    """More of them than there are slots: the third is handed out when the first is over, and is waited for like it."""
    ledger = ledger_of(Neighbour)
    plans = [SPACE.best_by_gain([[0.0, float(group == first)] for group in range(10)]) for first in range(SLOTS + 1)]
    for index, plan in enumerate(plans):
        ledger.resume(Suggestion(index, "random", plan), [Observation(index, plan, 1, 2.0)])
    running = [ledger.next() for _ in range(SLOTS)]
    assert [item.index for item in running if item] == list(range(SLOTS)) and ledger.waits
    for suggestion in running[:0:-1]:
        assert suggestion
        ledger.close(suggestion)
        assert ledger.waits, "the first of them is not over"
    assert running[0]
    ledger.close(running[0])
    last = ledger.next()
    assert last and (last.index, last.begun) == (SLOTS, (1, 0))


def test_a_number_that_is_given_again_is_in_flight_again() -> None:
    """A failed trial's folder was deleted: the trial that has its number now is not the one that made room."""
    timetable = Timetable(2, RUNGS)
    for index, begun in ((0, (0, -1)), (2, (8, 0)), (1, (16, 2)), (3, (1, 1))):
        timetable.take_up(index, begun)
    timetable.end(0, has_failed=False)
    timetable.end(2, has_failed=False)
    assert timetable.in_flight == {1, 3}


def test_a_withdrawn_trial_leaves_its_slot_to_the_next() -> None:
    ledger = ledger_of(Neighbour)
    suggestions = [ledger.next() for _ in range(SLOTS)]
    assert ledger.waits and suggestions[-1]
    ledger.withdraw(suggestions[-1])
    assert not ledger.waits
    assert ledger.next() == suggestions[-1] and ledger.waits


def test_what_other_searches_have_measured_is_known_from_the_start() -> None:
    ledger = ledger_of(Neighbour)
    plan = SPACE.best_by_gain([[0.0, 1.0]] * 10)
    measured = [Observation(7, plan, step, 2.0) for step in RUNGS]
    ledger.recall(Suggestion(7, "random", plan), measured, counts=False)
    first = ledger.next()
    assert first and ledger.history().observations == tuple(measured)
    assert ledger.rivals(first.index, RUNGS[0]) == {7: 2.0}


def test_a_search_that_is_over_waits_for_nothing() -> None:
    ledger = replace(ledger_of(Neighbour), max_trials=SLOTS)
    for _ in range(SLOTS):
        ledger.next()
    assert not ledger.waits and ledger.next() is None
    ledger = ledger_of(Neighbour)
    for _ in range(SLOTS):
        ledger.next()
    ledger.end("the hours are over")
    assert not ledger.waits and ledger.next() is None


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
