"""Random plans of equal bytes are equally likely, Pareto fronts non-dominated, and seed plans the
best predicted."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from made_searches import BITS, masked_space, plans_in
from scipy import stats

from qpruner.plans.plan import UNPRUNED, PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.quantization.formats import by_size, format_of
from qpruner.search.choice import (
    best_uniform,
    contenders,
    controls_of,
    finalist_positions,
    non_dominated,
    random_plans,
    seed_plan,
    uniform_plans,
    winner_position,
)

SIZES = {"nf4": 40, "int8": 70, "bf16": 130}


def space_of(num_groups: int, levels: tuple[str, ...], fixed_bytes: int) -> PlanSpace:
    """Groups of unlike sizes, as global pruning leaves them."""
    weights = np.random.default_rng(num_groups).integers(800, 1600, num_groups)
    sizes = tuple(tuple(int(weight * BITS[name]) for name in levels) for weight in weights)
    return PlanSpace(
        tuple(f"layers.{index}" for index in range(num_groups)), levels, sizes, fixed_bytes, 10**9
    )


def equal_plans(space: PlanSpace, plan: PrecisionPlan) -> list[PrecisionPlan]:
    size = space.plan_bytes(plan)
    return [
        other
        for other in plans_in(space)
        if abs(space.plan_bytes(other) - size) <= 0.01 * size and other != plan
    ]


@pytest.mark.parametrize("share_of_high", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("num_groups", "levels"), [(30, ("nf4", "int8")), (224, ("nf4", "int8", "bf16"))]
)
def test_random_plans_have_equal_bytes_and_differ(
    num_groups: int, levels: tuple[str, ...], share_of_high: float
) -> None:
    space = space_of(num_groups, levels, 200_000)
    high = np.random.default_rng(1).permutation(num_groups) < share_of_high * num_groups
    plan = space.plan_of(np.where(high, len(levels) - 1, 0))
    drawn = random_plans(space, plan, 5, seed=0)
    assert len({plan, *drawn}) == 6
    for other in drawn:
        assert abs(space.plan_bytes(other) - space.plan_bytes(plan)) <= 0.01 * space.plan_bytes(
            plan
        )
    assert drawn == random_plans(space, plan, 5, seed=0)
    assert set(drawn) != set(random_plans(space, plan, 5, seed=1))


@pytest.mark.parametrize("num_high", [1, 7])
def test_every_plan_of_equal_bytes_is_as_likely(num_high: int) -> None:
    # With so many fixed bytes plans of several sizes are within the tolerance.
    space = space_of(8, ("nf4", "int8"), 600_000)
    plan = space.plan_of([1] * num_high + [0] * (8 - num_high))
    wanted = equal_plans(space, plan)
    counts = Counter(random_plans(space, plan, 1, seed)[0] for seed in range(20 * len(wanted)))
    assert set(counts) <= set(wanted)
    assert stats.chisquare([counts[each] for each in wanted]).pvalue > 1e-3


def test_few_plans_of_equal_bytes_are_all_returned() -> None:
    space = space_of(6, ("nf4", "int8"), 0)
    plans = [space.plan_of(indices) for indices in itertools.product((0, 1), repeat=6)]
    few = next(plan for plan in plans if len(equal_plans(space, plan)) == 2)
    assert set(random_plans(space, few, 5, seed=0)) == set(equal_plans(space, few))
    assert random_plans(space, space.uniform("nf4"), 3, seed=0) == []


def test_no_plan_of_fewer_or_equal_bytes_beats_one_on_the_front() -> None:
    """The points lie on a small grid, so some are equal in bytes, score or both."""
    points = [
        (float(size), float(score))
        for size, score in np.random.default_rng(0).integers(0, 6, (20, 2))
    ]
    expected = {
        point
        for point in points
        if not any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)
    }
    assert [points[position] for position in non_dominated(points)] == sorted(expected)


def seed_space(
    num_groups: int, share: float, levels: tuple[str, ...] = ("nf4", "int8"), step: int = 0
) -> PlanSpace:
    """Make groups of `SIZES` bytes, each `step` larger than the previous, and a budget between all
    low and all high."""
    sizes = tuple(
        tuple(SIZES[name] + step * index for name in levels) for index in range(num_groups)
    )
    lowest, highest = (sum(size[index] for size in sizes) for index in (0, -1))
    names = tuple(f"layers.{index}" for index in range(num_groups))
    return PlanSpace(
        names,
        levels,
        sizes,
        fixed_bytes=500,
        budget_bytes=500 + lowest + int(share * (highest - lowest)),
    )


@pytest.mark.parametrize("unit", [1e-9, 1e6])
@pytest.mark.parametrize(
    "levels", [("nf4", "int8"), ("nf4", "int8", "bf16"), ("int8", "bf16")], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_no_other_plan_in_the_budget_is_predicted_better(
    levels: tuple[str, ...], seed: int, unit: float
) -> None:
    """Rises decrease with the bits to 0 at the highest, and differ by up to three orders of
    magnitude."""
    space = seed_space(6, 0.45, levels, step=7)
    generator = np.random.default_rng(seed)
    shares = np.sort(generator.uniform(0, 1, (len(levels) - 1, 6)), axis=0)[::-1]
    rows = [*(shares * 10.0 ** generator.uniform(-3, 0, 6)), np.zeros(6)]
    values = {name: (unit * row).tolist() for name, row in zip(levels, rows, strict=True)}

    def rise(plan: PrecisionPlan) -> float:
        return sum(values[name][index] for index, name in enumerate(plan.formats))

    found = seed_plan(values, space)
    assert space.is_feasible(found)
    assert rise(found) == pytest.approx(
        min(rise(plan) for plan in plans_in(space) if space.is_feasible(plan)), rel=1e-6
    )


@pytest.mark.parametrize(
    ("lowest", "expected"),
    [
        ((0.5, -0.01, 0.0, -0.02, 0.3, -0.5), "848484"),
        ((-0.01, -0.02, -0.03, -0.01, -0.02, -0.03), "444444"),
        ((0.0,) * 6, "888844"),
        ((2e-4, 1e-4, 5e-5, -1e-4, 1e-5, 0.0), "888484"),
        ((1.0, 1e-7, 2e-7, 3e-7, 4e-7, 5e-7), "844888"),
    ],
    ids=["some-negative", "all-negative", "all-zero", "all-tiny", "one-dominates"],
)
def test_a_seed_plan_leaves_no_bytes_that_may_help(
    lowest: tuple[float, ...], expected: str
) -> None:
    """Groups with a predicted rise of zero still get more bits, those of a negative one do not."""
    assert str(seed_plan({"nf4": lowest, "int8": (0.0,) * 6}, seed_space(6, 0.67))) == expected
    # Although 8 bits are predicted slightly worse than 4, the first group gets 16 bits, which saves
    # most.
    values = {"nf4": (0.2, 0.1), "int8": (0.21, 0.05), "bf16": (0.0, 0.0)}
    assert str(seed_plan(values, seed_space(2, 0.5, ("nf4", "int8", "bf16")))) == "F4"


# ---- formats of several families: a larger one may be worse, and two may have equal bytes


@pytest.mark.parametrize(("better", "worse"), [("w4", "nf4"), ("w3", "w3_hqq"), ("w3_hqq", "w3")])
def test_a_format_that_is_predicted_worse_is_not_taken(better: str, worse: str) -> None:
    """The budget has room for any plan."""
    levels = by_size((better, worse))
    space = space_of_families(levels)
    rises = {better: (0.1,) * 4, worse: (0.2,) * 4}
    assert set(seed_plan(rises, space).formats) == {better}
    assert set(best_uniform(space, rises).formats) == {better}
    # It is the largest one if nothing is known.
    assert set(best_uniform(space).formats) == {levels[-1]}


def space_of_families(levels: tuple[str, ...], budget: int = 10**9) -> PlanSpace:
    sizes = tuple(format_of(name).packed_bytes(64, 64, 2) for name in levels)
    return PlanSpace(tuple(f"layers.{at}" for at in range(4)), levels, (sizes,) * 4, 0, budget)


def test_formats_of_equal_bytes_are_drawn_alike() -> None:
    space = space_of_families(("w3", "w3_hqq"))
    plan = space.uniform("w3")
    # These are all other plans.
    assert len(random_plans(space, plan, 20, seed=0)) == 15


def test_the_best_uniform_plan_fits() -> None:
    levels = ("w3", "w4", "nf4")
    rises = {"w3": (0.3,) * 4, "w4": (0.1,) * 4, "nf4": (0.2,) * 4}
    sizes = {
        name: space_of_families(levels).plan_bytes(space_of_families(levels).uniform(name))
        for name in levels
    }
    for budget, best in ((sizes["nf4"], "w4"), (sizes["w4"] - 1, "w3"), (1, "w3")):
        assert set(best_uniform(space_of_families(levels, budget), rises).formats) == {best}


def test_controls_are_named_by_their_cut() -> None:
    """If no plan fits, the uniform plan is over the budget, and alone."""
    rises = {"nf4": (0.3, 0.1), "int8": (0.1, 0.0)}
    few = PlanSpace(("layers.0", "layers.1"), ("nf4", "int8"), ((4, 8), (4, 8)), 0, 12, "cut-10")
    assert [(origin, str(plan)) for origin, plan in controls_of(few, rises)] == [
        ("cut-10-uniform", "44"),
        ("cut-10-knapsack", "84"),
    ]
    base = replace(few, budget_bytes=7, cut=UNPRUNED)
    assert [(origin, str(plan)) for origin, plan in controls_of(base, rises)] == [
        ("unpruned-uniform", "44")
    ]


# ---- groups that are not offered every format


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_a_seed_plan_is_the_best_of_what_groups_are_offered(share: float) -> None:
    """Values of formats that are not offered, None or wild, do not matter."""
    space = masked_space(share)
    generator = np.random.default_rng(0)
    rises = np.sort(generator.uniform(0, 1, (8, 3)), axis=1)[:, ::-1]
    wild = {
        name: [float(rises[g, at]) if at in space.offered[g] else -1e9 for g in range(8)]
        for at, name in enumerate(space.levels)
    }
    known = {name: [None if value < 0 else value for value in row] for name, row in wild.items()}

    def rise(plan: PrecisionPlan) -> float:
        return sum(float(rises[group, at]) for group, at in enumerate(space.indices_of(plan)))

    found = seed_plan(known, space)
    assert seed_plan(wild, space) == found
    assert space.is_feasible(found)
    assert rise(found) == pytest.approx(
        min(rise(plan) for plan in plans_in(space) if space.is_feasible(plan))
    )


def test_uniform_plans_give_embeddings_what_the_budget_leaves() -> None:
    """Without `odd`, whose blocks take int8 alone; the embeddings take int8 or bf16."""
    whole = masked_space(1.0)
    groups = whole.groups[:-1]
    sizes = whole.group_bytes[:-1]

    def uniform(budget: int) -> dict[str, str]:
        space = PlanSpace(groups, whole.levels, sizes, 0, budget)
        return {
            name: str(plan)
            for name, plan in uniform_plans(space).items()
            if space.is_feasible(plan)
        }

    small, large = (sum(each[at] or 0 for each in sizes[1:]) for at in (0, 1))
    low = sizes[0][1] or 0
    high = sizes[0][2] or 0
    assert uniform(small + low - 1) == {}
    assert uniform(small + low) == {"nf4": "8444444"}
    assert uniform(small + high) == {"nf4": "F444444"}
    assert uniform(large + low) == {
        "nf4": ("F" if large + low >= small + high else "8") + "444444",
        "int8": "8888888",
    }
    # All blocks must take it.
    assert list(uniform_plans(masked_space())) == ["int8"]


def test_random_plans_have_formats_that_are_offered() -> None:
    space = masked_space(1.0)
    plan = space.plan_of([2, 0, 1, 1, 0, 0, 1, 1])
    wanted = {other for other in plans_in(space) if other in equal_plans(space, plan)}
    drawn = random_plans(space, plan, 100, seed=0)
    assert wanted
    assert set(drawn) == wanted


def test_a_trial_that_may_not_win_is_shown_all_the_same() -> None:
    """A control over budget: the best score of all, scored again, never the winner, and in no
    finalist's place."""
    scores = [1.0, 3.0, 2.0, 4.0]
    controls = [True, False, False, False]
    fits = [False, True, True, True]
    assert finalist_positions(scores, controls, 1, fits) == [0, 2]


# ---- finalists that cannot be told apart


def test_contenders_are_those_a_paired_interval_cannot_exclude() -> None:
    """Rows differ far more than finalists do, and alike for all of them."""
    generator = np.random.default_rng(0)
    rows = generator.normal(3, 1, 100)
    levels = (0.0, 0.005, 0.5, 0.01, 0.011, 0.02)
    losses = [(rows + level + generator.normal(0, 0.005, 100)).tolist() for level in levels]
    scores = [sum(each) / 100 for each in losses]
    controls = [False, False, False, False, True, True]
    assert contenders(scores, controls, 3, losses) == [0]
    wide = [(rows + level + generator.normal(0, 0.2, 100)).tolist() for level in levels]
    scores = [3.0, 3.005, 3.5, 3.01, 3.011, 3.02]
    # These are the three lowest and the best control.
    assert contenders(scores, controls, 3, wide) == [0, 1, 3, 4]
    # This is what holds without losses by row.
    assert contenders(scores, controls, 4) == [0, 1, 3, 4]
    assert contenders([], [], 3) == []


def test_the_lowest_mean_over_seeds_wins_of_those_that_have_them() -> None:
    assert winner_position([1.2, 1.15, 1.05], [False] * 3, [2, 2, 1]) == 1
    # A control wins ties.
    assert winner_position([1.1, 1.1], [False, True], [2, 2]) == 1
    assert winner_position([1.0, 0.9], [True, False]) == 1
    assert winner_position([], [], []) is None


def regrets(seed: int) -> list[float]:
    """Search plans of a range of 0.13 nats under noise as measured (LOG, 53d67bd): 0.013 nats, and
    more by rows.

    Return the loss of the plan that wins by one, two and three training seeds, less that of the
    best plan.
    """
    generator = np.random.default_rng(seed)
    true = generator.uniform(0, 0.13, 24)
    controls = [at < 2 for at in range(24)]
    trained = true[:, None] + generator.normal(0, 0.012, (24, 3))  # under three training seeds
    chosen = finalist_positions(trained[:, 0] + generator.normal(0, 0.005, 24), controls, 3)
    fresh = trained[chosen, :, None] + generator.normal(0, 0.06, (len(chosen), 3, 100))
    scores = fresh.mean(axis=2).tolist()
    are_controls = [controls[at] for at in chosen]
    again = contenders([each[0] for each in scores], are_controls, 3, fresh[:, 0].tolist())
    found = []
    for count in (1, 2, 3):
        seeds = [count if at in again else 1 for at in range(len(chosen))]
        means = [float(np.mean(each[:number])) for each, number in zip(scores, seeds, strict=True)]
        best = winner_position(means, are_controls, seeds)
        assert best is not None
        found.append(float(true[chosen[best]] - true.min()))
    return found


def test_further_seeds_return_a_better_plan_for_the_same_scores() -> None:
    """Over 2000 searches, 3.6 % of the range is lost with one seed, 2.7 % with one further seed,
    2.3 % with two."""
    one, two, three = np.mean([regrets(seed) for seed in range(500)], axis=0)
    assert two < 0.85 * one
    assert three < 0.95 * two
