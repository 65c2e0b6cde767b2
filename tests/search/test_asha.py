"""Early stopping: controls run to the end, poor trials stop, and an interruption changes no
decision.

Ray's own ASHA code runs here, on stand-ins for trials that have an id and a plan.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import raw_config, with_keys

from qpruner.cluster.tune.asha import RecordedAsha
from qpruner.cluster.tune.job import METRIC, TIME, plan_to_params
from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.runs.records import RungResult, TrialRecord

STOP = "STOP"
CONTINUE = "CONTINUE"
CONTROLS = range(3)
"""The numbers of the trials whose plans are controls."""
GROUPS = tuple(f"layers.{index}" for index in range(8))
SPACE = PlanSpace(
    GROUPS,
    ("nf4", "int8"),
    ((10, 20),) * len(GROUPS),
    fixed_bytes=5,
    budget_bytes=10**6,
    cut="cut-20",
)
ONE_CUT = SearchSpace((SPACE,))
TWO_CUTS = SearchSpace((replace(SPACE, cut="base"), SPACE))
OF_BASE = 256
"""The first number of the trials that prune nothing."""


def plan_of(index: int) -> PrecisionPlan:
    """A different plan for every trial: the bits of its number say which groups have 8 bits."""
    space = TWO_CUTS.spaces[index < OF_BASE]
    return space.plan_of(index >> place & 1 for place in range(len(GROUPS)))


def config_of(steps: int = 8, factor: int = 2, metric: str = "loss") -> RunConfig:
    values = {"steps": steps, "reduction_factor": factor, "metric": metric}
    keys = {
        f"search.{key}": value for key, value in (values | {"tasks": ["piqa"], "limit": 10}).items()
    }
    return validate_config(with_keys(raw_config(Path("model"), Path("run")), **keys))


class Session:
    """The scheduler in one session, called as Ray's controller calls it."""

    def __init__(
        self, config: RunConfig, recorded: Sequence[TrialRecord] = (), space: SearchSpace = ONE_CUT
    ) -> None:
        controls = [plan_of(index) for index in CONTROLS]
        self.config = config
        self.trials = {}
        self.space = space
        self.scheduler = RecordedAsha(config, space, controls, recorded, lambda trial_id: False)

    def report(self, index: int, rung: RungResult) -> str:
        """The decision of the scheduler after a rung of a trial."""
        if index not in self.trials:
            plan = plan_of(index)
            config = {
                "trial": index,
                "cut": plan.cut,
                "plan_bytes": self.space.plan_bytes(plan),
                **plan_to_params(plan),
            }
            self.trials[index] = SimpleNamespace(trial_id=f"ray-{index}", config=config)
            self.scheduler.on_trial_add(None, self.trials[index])
        result = {METRIC: rung.cost(self.config.search.metric), TIME: rung.step, "loss": rung.loss}
        action = self.scheduler.on_trial_result(None, self.trials[index], result)
        if action == STOP:
            self.scheduler.on_trial_complete(None, self.trials[index], result)
        return str(action)

    def report_all(
        self, index: int, value: float, steps: Sequence[int] = (1, 2, 4, 8)
    ) -> list[str]:
        return [self.report(index, rung(step, value)) for step in steps]


def rung(step: int, value: float, metric: str = "loss") -> RungResult:
    """A rung whose loss and error rate are both `value`; of accuracies the loss says otherwise."""
    return RungResult(
        step=step, loss=value if metric == "loss" else 1.0 - value, accuracy=1.0 - value
    )


def record(index: int, status: Any, rungs: Sequence[RungResult]) -> TrialRecord:
    return TrialRecord(
        index=index,
        digest="0" * 16,
        search="1" * 16,
        origin="hyperopt",
        cut=plan_of(index).cut,
        plan=plan_of(index).as_dict(),
        plan_bytes=TWO_CUTS.plan_bytes(plan_of(index)),
        mean_bits=4.0,
        status=status,
        rungs=tuple(rungs),
    )


def test_a_control_runs_to_the_last_rung_however_poor() -> None:
    session = Session(config_of())
    assert [session.report(index, rung(1, 0.1)) for index in range(10, 14)] == [CONTINUE] * 4
    for control in CONTROLS:
        assert session.report_all(control, 0.9) == [CONTINUE, CONTINUE, CONTINUE, STOP]


@pytest.mark.parametrize(("metric", "factor"), [("loss", 2), ("loss", 3), ("accuracy", 4)])
def test_a_trial_above_the_cutoff_stops(metric: str, factor: int) -> None:
    """The best 1/factor of the scores at a rung so far continue (arXiv 1810.05934, as Ray counts
    it)."""
    session = Session(config_of(factor=factor, metric=metric))
    values = np.random.default_rng(0).uniform(0.2, 0.8, 40)
    cutoffs = [np.inf, *(np.percentile(values[:seen], 100 / factor) for seen in range(1, 40))]
    actions = [
        session.report(10 + index, rung(1, float(value), metric))
        for index, value in enumerate(values)
    ]
    assert actions == [
        STOP if value > cutoff else CONTINUE for value, cutoff in zip(values, cutoffs, strict=True)
    ]
    assert {STOP, CONTINUE} == set(actions)


def test_trials_of_a_poor_cut_save_no_trial_of_a_better_one() -> None:
    session = Session(config_of(), space=TWO_CUTS)
    for control in CONTROLS:
        session.report_all(control, 0.9)
    assert session.report_all(OF_BASE + 10, 0.3) == [CONTINUE] * 3 + [STOP]
    assert [
        session.report(OF_BASE + 11 + at, rung(1, value)) for at, value in enumerate((0.4, 0.2))
    ] == [
        STOP,
        CONTINUE,
    ]


def test_recorded_rungs_set_the_cutoff() -> None:
    config = config_of()
    recorded = [
        record(10, "finished", [rung(step, 0.2) for step in (1, 2, 4, 8)]),
        record(11, "stopped", [rung(1, 0.5)]),
        record(12, "failed", [rung(1, 0.3)]),
    ]
    # Rung 1 has seen 0.2, 0.3, 0.5; rung 2 only 0.2.
    assert Session(config, recorded).report_all(13, 0.31, (1,)) == [STOP]
    assert Session(config, recorded).report_all(13, 0.29, (1, 2)) == [CONTINUE, STOP]
    assert Session(config, recorded).report_all(14, 0.1) == [CONTINUE] * 3 + [STOP]


# ---- two cuts


def test_the_best_of_each_cut_reaches_the_last_rung() -> None:
    """The cut starts far behind.

    As it recovers late, the first rung goes on to compare trials of one cut only.
    """
    session = Session(config_of(), space=TWO_CUTS)
    assert session.report_all(OF_BASE, 0.3) == [CONTINUE] * 3 + [STOP]
    # No trial of this cut has reached the last rung.
    assert session.report(10, rung(1, 0.9)) == CONTINUE
    # It is not the best of its cut.
    assert session.report(11, rung(1, 1.0)) == STOP
    assert session.report_all(10, 0.2, (2, 4, 8)) == [CONTINUE, CONTINUE, STOP]
    # Its elder was worse there and ended better.
    assert session.report(12, rung(1, 0.8)) == CONTINUE
    # It is worse than its elder.
    assert session.report(12, rung(2, 0.28)) == STOP


def test_cuts_compete_once_a_rung_agrees_with_the_last() -> None:
    """The trial is the best of its cut, which never recovers; few pairs of trials may agree by
    chance."""
    scores = {10: 0.9, 11: 0.9} | dict.fromkeys(range(OF_BASE, OF_BASE + 5), 0.3)
    finished = [
        record(each, "finished", [rung(step, scores[each]) for step in (1, 2, 4, 8)])
        for each in scores
    ]
    for recorded, decision in ((finished[:-1], CONTINUE), (finished, STOP)):  # 8 and 10 pairs
        assert Session(config_of(), recorded, TWO_CUTS).report(12, rung(1, 0.8)) == decision
    recorded = [
        record(OF_BASE, "finished", [rung(step, 0.3) for step in (1, 2, 4, 8)]),
        record(10, "running", [rung(step, 0.9) for step in (1, 2)]),
    ]
    assert Session(config_of(), recorded, TWO_CUTS).report_all(10, 0.9, (2, 4)) == [
        CONTINUE,
        CONTINUE,
    ]


class Search:
    """Trials one after the other; a rung is recorded before it is reported, as in a real search."""

    def __init__(
        self, config: RunConfig, values: np.ndarray, interrupted: tuple[int, int] | None = None
    ) -> None:
        """Run trials with these losses ``(trials, rungs)``; a new session begins after the rung
        `interrupted`."""
        self.records = {}
        self.decisions = dict[tuple[int, int], str]()
        session = Session(config)
        for index, row in enumerate(values):
            rungs = []
            for step, value in zip(config.search.rungs, row, strict=True):
                rungs.append(rung(step, float(value)))
                status = "finished" if step == config.search.steps else "running"
                self.records[index] = record(index, status, rungs)
                action = self._decide(session, index, rungs[-1])
                if (index, step) == interrupted:
                    session = Session(
                        config, [self.records[known] for known in sorted(self.records)]
                    )
                    if status == "running":
                        # As a trial that goes on does, whether or not the decision had been heard.
                        action = self._decide(session, index, rungs[-1])
                if action == STOP:
                    if status == "running":
                        self.records[index] = record(index, "stopped", rungs)
                    break

    def _decide(self, session: Session, index: int, result: RungResult) -> str:
        action = session.report(index, result)
        # The same question always gets the same answer.
        assert self.decisions.setdefault((index, result.step), action) == action
        return action


@pytest.mark.parametrize(("steps", "metric", "seed"), [(8, "loss", 0), (6, "accuracy", 1)])
def test_an_interruption_anywhere_changes_no_decision(steps: int, metric: str, seed: int) -> None:
    """Losses fall from rung to rung, with noise that changes the order of the trials."""
    generator = np.random.default_rng(seed)
    config = config_of(steps=steps, metric=metric)
    plans = generator.uniform(0.3, 0.7, (24, 1))
    values = plans - np.array([0.0, 0.1, 0.15, 0.18]) + generator.normal(0, 0.12, (24, 4))
    undisturbed = Search(config, values)
    stopped_at = {step for (_, step), action in undisturbed.decisions.items() if action == STOP}
    # The test proves something only if every rung decides something.
    assert stopped_at == set(config.search.rungs)
    for place in undisturbed.decisions:
        interrupted = Search(config, values, place)
        assert interrupted.decisions == undisturbed.decisions, f"interrupted after {place}"
        assert interrupted.records == undisturbed.records
