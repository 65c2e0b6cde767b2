"""The searcher `gp`: what its model learns from scores, rungs and sensitivities, and which plans it
proposes."""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pytest
import torch
from made_searches import blocks, masked_space, plans_in, space_of

from qpruner.plans.plan import PrecisionPlan
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.search.gaussian_process import GaussianProcessProposer, Plans
from qpruner.search.plan_model import NUM_RUNG_PAIRS, NUM_TRIALS, Data, PlanModel, informative
from qpruner.search.posterior import Posterior
from qpruner.search.searchers import History, Observation


def random_plans(space: PlanSpace, number: int, seed: int = 0) -> list[PrecisionPlan]:
    rows = np.random.default_rng(seed).integers(
        len(space.levels), size=(4 * number, len(space.groups))
    )
    return list(dict.fromkeys(space.plan_of(row) for row in rows))[:number]


def effects_of(number: int, seed: int = 0) -> np.ndarray:
    return 0.02 * np.random.default_rng([seed, 1]).exponential(size=number)


def loss_of(plan: PrecisionPlan, effects: np.ndarray) -> float:
    """A loss to which a group adds its effect at 4 bits, and a fiftieth of it at 8."""
    share = np.array([{"nf4": 1.0, "int8": 0.02, "bf16": 0.0}[name] for name in plan.formats])
    return 3.0 + float(effects @ share)


def posterior_of(
    space: PlanSpace,
    observations: Sequence[Observation],
    pending: Sequence[PrecisionPlan] = (),
    errors: Mapping[str, Sequence[float]] = MappingProxyType({}),
    **priors: object,
) -> Posterior:
    whole = SearchSpace((space,), errors=errors)
    model = PlanModel(whole, priors)  # type: ignore[arg-type]
    posterior = Posterior(model, Data.of(model, observations, {item.step for item in observations}))
    return posterior.with_pending(Plans(whole).tensor(pending))


def rows_of(space: PlanSpace, plans: Sequence[PrecisionPlan]) -> torch.Tensor:
    return Plans(SearchSpace((space,))).tensor(plans)


def scored(plans: Sequence[PrecisionPlan], effects: np.ndarray, step: int = 8) -> list[Observation]:
    return [
        Observation(index, plan, step, loss_of(plan, effects)) for index, plan in enumerate(plans)
    ]


@pytest.mark.parametrize("levels", [("nf4", "int8"), ("nf4", "int8", "bf16")], ids=str)
def test_scores_that_add_up_are_predicted_from_few(levels: tuple[str, ...]) -> None:
    space = space_of(blocks(12), levels)
    effects = effects_of(12)
    plans = random_plans(space, 60)
    posterior = posterior_of(space, scored(plans[:24], effects))
    expected = posterior.mean(rows_of(space, plans[24:])).numpy()
    actual = np.array([loss_of(plan, effects) for plan in plans[24:]])
    assert np.abs(expected - actual).max() < 0.05 * np.ptp(actual)


def test_true_sensitivities_help_and_false_ones_do_little_harm() -> None:
    space = space_of(blocks(20))
    effects = effects_of(20)
    plans = random_plans(space, 100)
    rest = rows_of(space, plans[10:])
    actual = np.array([loss_of(plan, effects) for plan in plans[10:]])
    rises = {
        "none": {},
        "true": {"first": {"nf4": (30 * effects).tolist(), "int8": (0.6 * effects).tolist()}},
        "lying": {"first": {"nf4": effects[::-1].tolist(), "int8": [0.0] * 20}},
    }
    errors = {
        name: float(
            np.std(
                posterior_of(space, scored(plans[:10], effects), **priors).mean(rest).numpy()
                - actual
            )
        )
        for name, priors in rises.items()
    }
    assert errors["true"] < 0.3 * errors["none"]
    assert errors["lying"] < 1.5 * errors["none"]


def test_outlier_groups_are_found_from_few_trials() -> None:
    space = space_of(blocks(60))
    effects = np.full(60, 0.002)
    effects[[11, 40]] = 0.05
    noise = 0.004 * np.random.default_rng(3).standard_normal(24)
    observations = [
        Observation(index, plan, 8, loss_of(plan, effects) + float(noise[index]))
        for index, plan in enumerate(random_plans(space, 24))
    ]
    posterior = posterior_of(space, observations)
    found = -posterior.effects(torch.zeros(1, 61, dtype=torch.float64))[0].diff(dim=1)[:, 0]
    assert set(found.argsort(descending=True)[:2].tolist()) == {11, 40}
    assert float(found[[11, 40]].min()) > 0.8 * 0.05


def test_trials_that_were_stopped_early_inform_the_last_rung() -> None:
    """24 trials have a score at step 4, on another scale; 4 of them also have one at the last step,
    8."""
    space = space_of(blocks(14))
    effects = effects_of(14)
    plans = random_plans(space, 80)
    low = [
        Observation(index, plan, 4, 0.5 + 1.4 * loss_of(plan, effects))
        for index, plan in enumerate(plans[:24])
    ]
    high = scored(plans[:4], effects)
    rest = rows_of(space, plans[24:])
    actual = np.array([loss_of(plan, effects) for plan in plans[24:]])
    together = (
        posterior_of(space, sorted([*low, *high], key=lambda item: (item.index, item.step)))
        .mean(rest)
        .numpy()
    )
    alone = posterior_of(space, high).mean(rest).numpy()
    assert np.std(together - actual) < 0.3 * np.std(alone - actual)
    assert np.mean(together) == pytest.approx(np.mean(actual), abs=0.2 * np.std(actual) + 0.01)


@pytest.mark.parametrize("levels", [("nf4", "int8"), ("nf4", "int8", "bf16")], ids=str)
def test_knapsacks_are_inside_the_budget_and_nearly_the_best(levels: tuple[str, ...]) -> None:
    space = space_of(blocks(40), levels, share=0.37)
    plans = Plans(SearchSpace((space,)))
    rows = torch.arange(40)
    costs = (
        torch.tensor(np.random.default_rng(2).normal(size=(5, 40, len(levels))))
        .sort(dim=2, descending=True)
        .values
    )
    found = plans.knapsacks(costs, torch.zeros(5, dtype=torch.long))
    assert (plans.sizes(found) <= plans.capacity).all()
    for cost, plan in zip(costs, found, strict=True):
        best = plans.tensor([space.best_by_gain((-cost).tolist())])[0]
        saved, most = (cost[:, 0].sum() - cost[rows, chosen[:-1]].sum() for chosen in (plan, best))
        assert saved > 0.98 * most


def gp_of(space: PlanSpace, **options: object) -> GaussianProcessProposer:
    return GaussianProcessProposer(SearchSpace((space,)), 0, **{"priors": {}, **options})  # type: ignore[arg-type]


def search(
    space: PlanSpace, effects: np.ndarray, trials: int, **options: object
) -> list[PrecisionPlan]:
    """The plans that `gp` runs, one after the other."""
    proposer = gp_of(space, **options)
    ran = []
    for index in range(trials):
        ran.append(proposer.propose(index, History(tuple(scored(ran, effects)))))
    return ran


def test_a_blind_search_finds_the_best_of_a_thousand_plans() -> None:
    space = space_of(blocks(10))
    effects = effects_of(10)
    losses = sorted(
        loss_of(plan, effects)
        for plan in (space.plan_of(row) for row in itertools.product(range(2), repeat=10))
        if space.is_feasible(plan)
    )
    ran = search(space, effects, 20)
    assert min(loss_of(plan, effects) for plan in ran) <= losses[1]


def test_large_spaces_too_get_only_new_plans_inside_the_budget() -> None:
    names = [
        f"layers.{index:02d}.{kind}"
        for index in range(12)
        for kind in ("qkv", "o", "gate_up", "down")
    ]
    space = space_of(names)
    effects = effects_of(48)
    ran = search(space, effects, 14)
    assert len(set(ran)) == 14
    assert all(space.is_feasible(plan) for plan in ran)
    losses = [loss_of(plan, effects) for plan in ran]
    assert min(losses[7:]) < min(losses[:7])


def rungs_of(plans: Sequence[PrecisionPlan], effects: np.ndarray) -> tuple[Observation, ...]:
    """The scores of a search with ASHA: noisy, at three rungs, every other trial stopped at the
    second."""
    noise = np.random.default_rng(2)
    return tuple(
        Observation(
            index, plan, step, loss_of(plan, effects) + above + 0.003 * noise.standard_normal()
        )
        for index, plan in enumerate(plans)
        for step, above in ((4, 0.3), (8, 0.1), (16, 0.0))[: 2 + (index + 1) % 2]
    )


def test_a_proposal_does_not_depend_on_earlier_ones() -> None:
    """A resumed search asks a new process, which has no fit from before."""
    space = space_of(blocks(20))
    effects = effects_of(20)
    plans = random_plans(space, 140)
    observations = rungs_of(plans, effects)
    asked = gp_of(space)
    for over, running in ((112, [5, 113]), (113, [113]), (118, [120]), (121, [122])):
        pending = tuple(plans[index] for index in running)
        history = History(tuple(item for item in observations if item.index < over), pending)
        assert asked.propose(over, history) == gp_of(space).propose(over, history)


def test_pending_plans_lower_the_variance_and_leave_the_mean() -> None:
    """Added in two steps they count as if they had been added at once."""
    space = space_of(blocks(14))
    effects = effects_of(14)
    plans = random_plans(space, 40)
    observations = scored(plans[:12], effects)
    without = posterior_of(space, observations)
    at_once = posterior_of(space, observations, plans[12:18])
    in_steps = without.with_pending(rows_of(space, plans[12:15]))
    in_steps = in_steps.with_pending(rows_of(space, plans[15:18]))
    rest = rows_of(space, plans[12:])
    reference = rows_of(space, plans[:1])
    for posterior in (at_once, in_steps):
        torch.testing.assert_close(posterior.mean(rest), without.mean(rest))
        mean, variance = posterior.gap(rest, reference)
        torch.testing.assert_close(mean, without.gap(rest, reference)[0])
        assert (variance < without.gap(rest, reference)[1]).all()
        torch.testing.assert_close(variance, at_once.gap(rest, reference)[1])
        slopes = posterior.slopes(rest, reference)
        torch.testing.assert_close(slopes, at_once.slopes(rest, reference))


def test_the_model_knows_the_best_and_the_newest_of_many_trials() -> None:
    space = space_of(blocks(14))
    effects = effects_of(14)
    observations = rungs_of(random_plans(space, 900), effects)
    kept = informative(observations)
    trials = {item.index for item in kept}
    assert len(trials) == NUM_TRIALS
    assert kept == [item for item in observations if item in kept]
    assert trials >= set(range(900 - NUM_TRIALS // 2, 900))
    finished = sorted(
        (item for item in observations if item.step == 16), key=lambda item: item.score
    )
    assert trials >= {item.index for item in finished[: NUM_TRIALS // 2]}
    steps = [[item.step for item in kept if item.index == trial] for trial in sorted(trials)]
    assert sum(len(of_trial) > 1 for of_trial in steps) == NUM_RUNG_PAIRS


# ---- groups that are not offered every format


def test_what_a_group_is_not_offered_has_no_effect() -> None:
    """Effects are relative to each group's own last level; those of other cells are 0, before and
    after scores."""
    space = masked_space()
    plans = plans_in(space)[::7][:40]
    model = PlanModel(SearchSpace((space,)), {})
    free = {(group, at) for group, offered in enumerate(space.offered) for at in offered[:-1]}
    assert {tuple(cell) for cell in torch.nonzero(model.is_free).tolist()} == free
    assert all(
        bool((part == part.T).all()) and part.isfinite().all() for part in model.parts.values()
    )
    features = model.features(rows_of(space, plans_in(space)))
    # The features are centred over the plans of the space.
    assert features[:, :-1].mean(0).abs().max() < 1e-9
    # Blocks have a depth all the same.
    assert {"depth", "group", "level"} <= set(model.parts)
    observations = [
        Observation(at, plan, 8, float(index_sum(space, plan))) for at, plan in enumerate(plans)
    ]
    posterior = posterior_of(space, observations)
    noise = torch.tensor(np.random.default_rng(0).standard_normal((3, model.num_effects)))
    effects = posterior.effects(noise)
    held = [
        [at for at in range(3) if (group, at) not in free] for group in range(len(space.groups))
    ]
    assert all(effects[:, group, cells].abs().max() < 1e-5 for group, cells in enumerate(held))
    predicted = posterior.mean(rows_of(space, plans_in(space))).numpy()
    actual = [index_sum(space, plan) for plan in plans_in(space)]
    assert np.corrcoef(predicted, actual)[0, 1] > 0.98


def index_sum(space: PlanSpace, plan: PrecisionPlan) -> float:
    """A score that falls with each group's bytes."""
    return 10.0 - space.plan_bytes(plan) / 500


def test_measured_damage_steers_a_search_without_scores() -> None:
    """One group is harmed eight times as much by the smallest format: it is the one to raise."""
    space = space_of(blocks(9), share=0.4)
    even = {"nf4": [0.01] * 9, "int8": [0.0001] * 9}
    uneven = even | {"nf4": [0.01] * 4 + [0.08] + [0.01] * 4}
    observations = [
        Observation(at, space.uniform(name), 8, 3.0 - at) for at, name in enumerate(space.levels)
    ]
    no_noise = torch.zeros(1, 10, dtype=torch.float64)
    effects = [
        posterior_of(space, observations, errors=errors).effects(no_noise)[0][:, 0]
        for errors in (even, uneven)
    ]
    assert effects[1].argmax() == 4
    assert effects[1][4] > 3 * effects[1].median()
    assert effects[1][4] / effects[1].sum() > 3 * effects[0][4] / effects[0].sum()
    proposer = GaussianProcessProposer(SearchSpace((space,), errors=uneven), 0, {})
    first = proposer.propose(2, History(tuple(observations)))
    assert first.formats[4] == "int8"


def test_formats_of_equal_bytes_are_both_searched() -> None:
    """Such as two ways to find scales: the better is found, also where no plan is listed."""
    for number in (6, 20):
        space = PlanSpace(
            tuple(blocks(number)), ("nf4", "int8"), ((50, 50),) * number, 0, 50 * number
        )
        effects = effects_of(number)
        ran = search(space, effects, 12)
        assert min(loss_of(plan, effects) for plan in ran) < 3.0 + 0.1 * float(effects.sum())
