"""Early stopping: controls run to the end, the poor stop, and an interruption changes no decision.

Ray's own ASHA code runs here. Of a trial it looks at nothing but the id, and we at its plan besides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import raw_config, with_key

from qpruner.cluster.tune.asha import RecordedAsha
from qpruner.cluster.tune.job import METRIC, TIME
from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.plans.plan import PlanSpace, PrecisionPlan
from qpruner.runs.records import RungResult, TrialRecord
from qpruner.search.trial_records import objective

STOP, CONTINUE = "STOP", "CONTINUE"
CONTROLS = range(3)
"""Trials whose plans are controls."""
GROUPS = tuple(f"layers.{index}" for index in range(8))
SPACE = PlanSpace(GROUPS, (4, 8), ((10, 20),) * len(GROUPS), fixed_bytes=5, budget_bytes=10**6)


def plan_of(index: int) -> PrecisionPlan:
    """A plan of its own for every trial: its number in binary, so the larger has the more bytes by and large."""
    return PrecisionPlan(GROUPS, tuple(8 if index >> place & 1 else 4 for place in range(len(GROUPS))))


def config_of(steps: int = 8, factor: int = 2, metric: str = "loss", pareto: bool = False) -> RunConfig:
    raw = raw_config(Path("model"), Path("run"))
    values = {"steps": steps, "reduction_factor": factor, "metric": metric, "pareto": pareto}
    for key, value in (values | {"tasks": ["piqa"], "limit": 10}).items():
        raw = with_key(raw, f"search.{key}", value)
    return validate_config(raw)


@dataclass(frozen=True)
class RayTrial:
    """As much of Ray's trial as a scheduler looks at."""

    trial_id: str
    config: dict[str, Any]


@dataclass
class Session:
    """One life of the scheduler, called as Ray's controller calls it."""

    config: RunConfig
    recorded: Sequence[TrialRecord] = ()
    space: PlanSpace = SPACE
    trials: dict[int, RayTrial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        controls = [plan_of(index) for index in CONTROLS]
        self.scheduler = RecordedAsha(self.config, self.space, controls, self.recorded, lambda trial_id: False)

    def report(self, index: int, rung: RungResult) -> str:
        """What the scheduler says of a trial's rung."""
        if index not in self.trials:
            bits = {f"bits/{name}": value for name, value in plan_of(index).as_dict().items()}
            self.trials[index] = RayTrial(f"ray-{index}", {"trial": index, **bits})
            self.scheduler.on_trial_add(None, self.trials[index])
        result = {METRIC: objective(rung, self.config), TIME: rung.step, "loss": rung.loss}
        action = self.scheduler.on_trial_result(None, self.trials[index], result)
        if action == STOP:
            self.scheduler.on_trial_complete(None, self.trials[index], result)
        return str(action)


def rung(step: int, value: float) -> RungResult:
    """A rung whose loss and error rate are the same figure."""
    return RungResult(step=step, loss=value, accuracy=1.0 - value)


def record(index: int, status: Any, rungs: Sequence[RungResult]) -> TrialRecord:
    return TrialRecord(
        index=index,
        digest="0" * 16,
        search="1" * 16,
        origin="hyperopt",
        plan=plan_of(index).as_dict(),
        plan_bytes=SPACE.plan_bytes(plan_of(index)),
        mean_bits=4.0,
        status=status,
        rungs=tuple(rungs),
    )


# Who is stopped


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_runs_to_the_last_rung_however_poor(control: int) -> None:
    session = Session(config_of())
    for index in range(10, 14):
        assert session.report(index, rung(1, 0.1)) == CONTINUE
    actions = [session.report(control, rung(step, 0.9)) for step in (1, 2, 4, 8)]
    assert actions == [CONTINUE, CONTINUE, CONTINUE, STOP]


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_what_is_worse_than_the_cutoff_stops(metric: str, factor: int) -> None:
    """The best 1/factor of what a rung has seen goes on (arXiv 1810.05934, as Ray counts it)."""
    session = Session(config_of(steps=8, factor=factor, metric=metric))
    seen: list[float] = []
    actions = []
    for index, value in enumerate(np.random.default_rng(0).uniform(0.2, 0.8, 40)):
        worst_kept = np.percentile(seen, 100 / factor) if seen else np.inf
        expected = STOP if value > worst_kept else CONTINUE
        actions.append(session.report(10 + index, rung(1, value)))
        assert actions[-1] == expected
        seen.append(value)
    assert {STOP, CONTINUE} == set(actions)


def test_a_front_compares_plans_of_no_more_bytes() -> None:
    large, middle, small = 0b11111111, 0b00111100, 0b00100000
    for pareto, fate in ((False, STOP), (True, CONTINUE)):
        session = Session(config_of(pareto=pareto))
        assert session.report(large, rung(1, 0.3)) == CONTINUE
        assert session.report(middle, rung(1, 0.4)) == fate
        assert session.report(small, rung(1, 0.5)) == fate
    # It is beaten by plans of no more bytes: as large as it, and smaller.
    session = Session(config_of(pareto=True))
    for index in (small, middle):
        assert session.report(index, rung(1, 0.3)) == CONTINUE
    assert session.report(0b01100110, rung(1, 0.4)) == STOP
    assert session.report(0b10000000, rung(1, 0.4)) == STOP


# Going on from records


def test_recorded_rungs_set_the_cutoff() -> None:
    config = config_of()
    recorded = [
        record(10, "finished", [rung(step, 0.2) for step in (1, 2, 4, 8)]),
        record(11, "stopped", [rung(1, 0.5)]),
        record(12, "failed", [rung(1, 0.3)]),
    ]
    # Rung 1 has seen 0.2, 0.3, 0.5; rung 2 only 0.2.
    session = Session(config, recorded)
    assert session.report(13, rung(1, 0.31)) == STOP
    session = Session(config, recorded)
    assert session.report(13, rung(1, 0.29)) == CONTINUE
    assert session.report(13, rung(2, 0.29)) == STOP
    session = Session(config, recorded)
    assert [session.report(14, rung(step, 0.1)) for step in (1, 2, 4, 8)] == [CONTINUE] * 3 + [STOP]


@dataclass
class Search:
    """Trials one after the other, each recorded before it is reported, as the trainable and the searcher do it."""

    config: RunConfig
    values: np.ndarray  # (trials, rungs)
    records: dict[int, TrialRecord] = field(default_factory=dict)
    decisions: dict[tuple[int, int], str] = field(default_factory=dict)

    def run(self, interruptions: Collection[tuple[int, int]] = ()) -> None:
        """Run all trials; the scheduler is lost after each (trial, step) in `interruptions` was reported."""
        session = Session(self.config)
        for index, row in enumerate(self.values):
            for step, value in zip(self.config.search.rungs, row, strict=True):
                result = rung(step, float(value))
                before = self.records[index].rungs if index in self.records else ()
                status = "finished" if step == self.config.search.steps else "running"
                self.records[index] = record(index, status, (*before, result))
                action = self._decide(session, index, result)
                if (index, step) in interruptions:
                    session = Session(self.config, [self.records[known] for known in sorted(self.records)])
                    if status == "running":
                        # As a trial that goes on does, whether or not the decision had been heard.
                        action = self._decide(session, index, result)
                if action == STOP:
                    if status == "running":
                        self.records[index] = self.records[index].model_copy(update={"status": "stopped"})
                    break

    def _decide(self, session: Session, index: int, result: RungResult) -> str:
        action = session.report(index, result)
        assert self.decisions.setdefault((index, result.step), action) == action, "asked again, answered otherwise"
        return action


def values_of(seed: int) -> np.ndarray:
    """``(24, 4)``: plans differ, get better as they are trained, and do not keep their order exactly."""
    generator = np.random.default_rng(seed)
    plans = generator.uniform(0.3, 0.7, (24, 1))
    return plans - np.array([0.0, 0.1, 0.15, 0.18]) + generator.normal(0, 0.12, (24, 4))


@pytest.mark.parametrize(("steps", "metric", "seed"), [(8, "loss", 0), (6, "accuracy", 1)])
def test_an_interruption_anywhere_changes_no_decision(steps: int, metric: str, seed: int) -> None:
    config = config_of(steps=steps, metric=metric)
    undisturbed = Search(config, values_of(seed))
    undisturbed.run()
    stopped_at = {step for (_, step), action in undisturbed.decisions.items() if action == STOP}
    assert stopped_at == set(config.search.rungs), "every rung must decide something for this to say anything"
    for place in undisturbed.decisions:
        interrupted = Search(config, values_of(seed))
        interrupted.run([place])
        assert interrupted.decisions == undisturbed.decisions, f"interrupted after {place}"
        assert interrupted.records == undisturbed.records
