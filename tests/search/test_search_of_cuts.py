"""Searches over several cuts: what `gp` learns of cuts, which plans it finds, and what all
searchers keep to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from made_searches import blocks

from qpruner.cluster.tune import make_proposer
from qpruner.plans.plan import UNPRUNED, PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.search.choice import best_uniform, seed_plan
from qpruner.search.gaussian_process import Plans
from qpruner.search.plan_model import Data, PlanModel
from qpruner.search.posterior import Posterior
from qpruner.search.searchers import History, Ledger, Observation, Prior

RATES = {UNPRUNED: 0.0, "cut-10": 0.1, "cut-20": 0.2}
LEVELS = {"nf4": (4, 1.0), "int8": (8, 0.1), "bf16": (16, 0.0)}
"""Bits of a weight, and the share of a group's effect."""
STEPS, GROWTH, NOISE = (4, 8, 16), (1.3, 1.1, 1.0), 0.002
"""Steps of the rungs, how much larger effects are there than at the last one, and the standard
deviation of a score."""


@dataclass(frozen=True)
class MadeTable:
    """Losses of three cuts: what no searcher is told.

    A cut has a level at every rung, and cut `seed % 3` is the worst at the first rung and the best
    at the last. Of a group's effect, 70 % is that of all cuts. Sensitivities are off by a factor of
    e, up or down.
    """

    space: SearchSpace
    effects: np.ndarray  # (cuts, groups, levels)
    levels: np.ndarray  # (rungs, cuts)
    prior: Prior

    @classmethod
    def draw(cls, seed: int, num_groups: int) -> MadeTable:
        drawn = np.random.default_rng([seed, 35])
        weights = drawn.integers(50, 200, num_groups)
        names = tuple(blocks(num_groups))
        bits, shares = (np.array(each) for each in zip(*LEVELS.values(), strict=True))
        budget = int(weights.sum() * 6)
        spaces = [
            PlanSpace(names, tuple(LEVELS), cls._sizes(weights * (1 - rate), bits), 0, budget, cut)
            for cut, rate in RATES.items()
        ]
        shared = drawn.exponential(size=num_groups)
        own = drawn.exponential(size=(3, num_groups))
        effects = 0.3 / num_groups * (0.7 * shared + 0.3 * own)[:, :, None] * shares
        prior = dict(
            zip(
                LEVELS,
                np.outer(shares, shared * np.exp(drawn.standard_normal(num_groups))),
                strict=True,
            )
        )
        behind = np.array([0.02, 0.04, 0.06])
        recovers = np.array([0.0, 0.05, 0.1])
        behind[seed % 3] = 0.0
        recovers[seed % 3] = 0.25
        best = [-seed_value(each, -effects[at]) for at, each in enumerate(spaces)]
        last = 2.5 + behind - best
        levels = np.stack([last + recovers + 0.5, last + 0.4 * recovers + 0.2, last])
        losses = {cut: 3.0 + 8 * rate for cut, rate in RATES.items()}
        return cls(
            SearchSpace(tuple(spaces), losses),
            effects,
            levels,
            {name: list(of) for name, of in prior.items()},
        )

    @staticmethod
    def _sizes(weights: np.ndarray, bits: np.ndarray) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(weight * each) for each in bits) for weight in weights)

    def loss(self, plan: PrecisionPlan, rung: int = -1) -> float:
        *levels, cut = self.space.indices_of(plan)
        effects = self.effects[cut][np.arange(len(levels)), levels]
        return float(self.levels[rung][cut] + GROWTH[rung] * effects.sum())

    def regret(self, plan: PrecisionPlan) -> float:
        """The loss of a plan above that of the best, 2.5, as a share of the range of plans in the
        budget."""
        worst = max(self.loss(each.smallest()) for each in self.space.spaces)
        return (self.loss(plan) - 2.5) / (worst - 2.5)

    def controls(self) -> list[tuple[str, PrecisionPlan]]:
        plans = [(f"{each.cut}-uniform", best_uniform(each)) for each in self.space.spaces]
        return [
            *plans,
            *((f"{each.cut}-knapsack", seed_plan(self.prior, each)) for each in self.space.spaces),
        ]


def seed_value(space: PlanSpace, gains: np.ndarray) -> float:
    """The largest sum of gains ``(groups, levels)`` in the budget."""
    plan = space.best_by_gain(gains.tolist())
    return float(gains[np.arange(len(gains)), space.indices_of(plan)].sum())


def search(table: MadeTable, searcher: str, trials: int, seed: int) -> list[PrecisionPlan]:
    """Search with early stopping, and return the plans whose trial finished, the best first.

    The worse half at a rung stops, but neither a control nor the best trial of its cut.
    """
    controls = table.controls()
    scores = [dict[PrecisionPlan, float]() for _ in STEPS]
    noise = np.random.default_rng([seed, 1])
    ledger = Ledger(
        table.space,
        make_proposer(searcher, table.space, seed, {"kl": table.prior}),
        controls,
        trials,
    )
    while (suggestion := ledger.next()) is not None:
        plan = suggestion.plan
        # No plan is over the budget, and none comes twice.
        assert table.space.is_feasible(plan)
        assert plan not in scores[0]
        for rung, step in enumerate(STEPS):
            score = scores[rung][plan] = table.loss(plan, rung) + NOISE * float(
                noise.standard_normal()
            )
            ledger.observe(Observation(suggestion.index, plan, step, score))
            is_best = score <= min(
                value for other, value in scores[rung].items() if other.cut == plan.cut
            )
            is_control = suggestion.index < len(controls)
            if not is_best and not is_control and score > np.median(list(scores[rung].values())):
                break
        ledger.close(suggestion)
    return sorted(scores[-1], key=scores[-1].__getitem__)


def test_gp_finds_the_late_cut_in_half_of_hyperopts_trials() -> None:
    """The cut that is the worst at the first rung and the best at the last, and nearly its best
    plan."""
    regrets: dict[str, list[float]] = {"gp": [], "hyperopt": []}
    for seed in (103, 104):
        table = MadeTable.draw(seed, 10)
        found = {
            name: search(table, name, trials, seed)[0]
            for name, trials in (("gp", 16), ("hyperopt", 32))
        }
        assert found["gp"].cut == table.space.cuts[seed % 3]
        for name, plan in found.items():
            regrets[name].append(table.regret(plan))
    assert max(regrets["gp"]) < 0.02, regrets
    assert sum(regrets["gp"]) <= sum(regrets["hyperopt"]), regrets


def test_first_rungs_do_not_hide_a_cut_that_recovers() -> None:
    """Each cut has two scores at the last rung and eight at the first, where the best cut is the
    worst."""
    table = MadeTable.draw(103, 8)
    drawn = np.random.default_rng(1)
    observations = []
    for each in table.space.spaces:
        for number, row in enumerate(drawn.integers(3, size=(8, 8))):
            plan = each.plan_of(row)
            index = len({item.index for item in observations})
            rungs = (0, 1, 2) if number < 2 else (0,)
            observations += [
                Observation(index, plan, STEPS[rung], table.loss(plan, rung)) for rung in rungs
            ]
    model = PlanModel(table.space, {"kl": table.prior})
    plans = Plans(table.space)
    posterior = Posterior(model, Data.of(model, observations, STEPS))
    same = [PrecisionPlan(each.groups, ("int8",) * 8, each.cut) for each in table.space.spaces]
    expected = posterior.mean(plans.tensor(same)).numpy()
    actual = np.array([table.loss(plan) for plan in same])
    assert np.argsort(expected).tolist() == np.argsort(actual).tolist()
    # At the first rung the late cut is at least 0.15 behind.
    assert np.abs(expected - actual).max() < 0.02


def uneven() -> SearchSpace:
    """Three cuts; the last has lost a block and is not offered the largest format."""
    base, narrow, short = MadeTable.draw(1, 5).space.spaces
    kept = tuple(name for name in base.groups if name != "layers.01")
    rows = [(*each[:2], None) for each in short.group_bytes[1:]]
    short = replace(short, groups=tuple(blocks(4)), base_groups=kept, group_bytes=tuple(rows))
    return SearchSpace((base, narrow, short))


@pytest.mark.parametrize("name", ["random", "hyperopt", "gp", "bayesopt"])
def test_no_searcher_repeats_a_plan_or_passes_the_budget(name: str) -> None:
    """Scores fall with bytes; plans of the base model, which is not searched here, run as controls
    only."""
    base, *others = uneven().spaces
    space = SearchSpace(tuple(others))
    control = base.smallest()
    ledger = Ledger(space, make_proposer(name, space, 0, {}), [("unpruned-uniform", control)], 12)
    plans = []
    while (suggestion := ledger.next()) is not None:
        plans.append(suggestion.plan)
        score = 5.0 - sum(map(["nf4", "int8", "bf16"].index, suggestion.plan.formats)) / 10
        ledger.observe(Observation(suggestion.index, suggestion.plan, 8, score))
        ledger.close(suggestion)
    assert plans[0] == control
    assert len(set(plans)) == 12
    assert all(map(space.is_feasible, plans[1:]))
    assert control not in {item.plan for item in ledger.history().observations}
    assert {plan.cut for plan in plans[1:]} == {"cut-10", "cut-20"}
    assert all(ledger.proposer.propose(index, History()) in space for index in range(100, 104))
