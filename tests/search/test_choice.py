"""Random plans of equal bytes are equally likely, Pareto fronts non-dominated, and seed plans the best predicted."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from scipy import stats

from qpruner.plans.plan import PlanSpace, PrecisionPlan
from qpruner.search.choice import hypervolume, non_dominated, random_plans, seed_plan

SIZES = {4: 40, 8: 70, 16: 130}


def space_of(num_groups: int, levels: tuple[int, ...], fixed_bytes: int) -> PlanSpace:
    """Groups of unlike sizes, as global pruning leaves them."""
    weights = np.random.default_rng(num_groups).integers(800, 1600, num_groups)
    sizes = tuple(tuple(int(weight * bits) for bits in levels) for weight in weights)
    return PlanSpace(tuple(f"layers.{index}" for index in range(num_groups)), levels, sizes, fixed_bytes, 10**9)


def equal_plans(space: PlanSpace, plan: PrecisionPlan) -> list[PrecisionPlan]:
    size = space.plan_bytes(plan)
    every = (PrecisionPlan(space.groups, bits) for bits in itertools.product(space.levels, repeat=len(space.groups)))
    return [other for other in every if abs(space.plan_bytes(other) - size) <= 0.01 * size and other != plan]


@pytest.mark.parametrize("share_of_high", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("num_groups", "levels"), [(30, (4, 8)), (224, (4, 8, 16))])
def test_random_plans_have_equal_bytes_and_differ(
    num_groups: int, levels: tuple[int, ...], share_of_high: float
) -> None:
    space = space_of(num_groups, levels, 200_000)
    high = np.random.default_rng(1).permutation(num_groups) < share_of_high * num_groups
    plan = space.plan_of(np.where(high, len(levels) - 1, 0))
    drawn = random_plans(space, plan, 5, seed=0)
    assert len({plan, *drawn}) == 6
    for other in drawn:
        assert abs(space.plan_bytes(other) - space.plan_bytes(plan)) <= 0.01 * space.plan_bytes(plan)
    assert drawn == random_plans(space, plan, 5, seed=0)
    assert set(drawn) != set(random_plans(space, plan, 5, seed=1))


@pytest.mark.parametrize("num_high", [1, 7])
def test_every_plan_of_equal_bytes_is_as_likely(num_high: int) -> None:
    # With so many fixed bytes plans of several sizes are within the tolerance.
    space = space_of(8, (4, 8), 600_000)
    plan = space.plan_of([1] * num_high + [0] * (8 - num_high))
    wanted = equal_plans(space, plan)
    counts = Counter(random_plans(space, plan, 1, seed)[0] for seed in range(20 * len(wanted)))
    assert set(counts) <= set(wanted)
    assert stats.chisquare([counts[each] for each in wanted]).pvalue > 1e-3


def test_few_plans_of_equal_bytes_are_all_returned() -> None:
    space = space_of(6, (4, 8), 0)
    plans = [space.plan_of(indices) for indices in itertools.product((0, 1), repeat=6)]
    few = next(plan for plan in plans if len(equal_plans(space, plan)) == 2)
    assert set(random_plans(space, few, 5, seed=0)) == set(equal_plans(space, few))
    assert random_plans(space, space.uniform(4), 3, seed=0) == []


def test_no_plan_of_fewer_or_equal_bytes_beats_one_on_the_front() -> None:
    """The points lie on a small grid, so some are equal in bytes, score or both."""
    points = [(float(size), float(score)) for size, score in np.random.default_rng(0).integers(0, 6, (20, 2))]
    expected = {
        point for point in points if not any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)
    }
    assert [points[position] for position in non_dominated(points)] == sorted(expected)


@pytest.mark.parametrize("budget", [4.0, 5.0, 8.0])
def test_the_hypervolume_is_botorchs(budget: float) -> None:
    """BoTorch maximizes, and takes a corner in place of the smallest plan."""
    points = [(size, 6.0 - size + noise) for size, noise in np.random.default_rng(0).uniform(0, 5, (12, 2)).tolist()]
    smallest = min(points)
    corner = torch.tensor([-budget, -smallest[1]], dtype=torch.float64)
    area = Hypervolume(corner).compute(-torch.tensor(points, dtype=torch.float64))
    assert area > 0.1
    assert hypervolume(points, smallest, budget) == pytest.approx(area / (budget - smallest[0]))


def seed_space(num_groups: int, share: float, levels: tuple[int, ...] = (4, 8), step: int = 0) -> PlanSpace:
    """Make groups of `SIZES` bytes, each `step` larger than the previous, and a budget between all low and all high."""
    sizes = tuple(tuple(SIZES[bits] + step * index for bits in levels) for index in range(num_groups))
    lowest, highest = (sum(size[index] for size in sizes) for index in (0, -1))
    names = tuple(f"layers.{index}" for index in range(num_groups))
    return PlanSpace(names, levels, sizes, fixed_bytes=500, budget_bytes=500 + lowest + int(share * (highest - lowest)))


@pytest.mark.parametrize("unit", [1e-9, 1e6])
@pytest.mark.parametrize("levels", [(4, 8), (4, 8, 16), (8, 16)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_other_plan_in_the_budget_is_predicted_better(levels: tuple[int, ...], seed: int, unit: float) -> None:
    """Rises decrease with the bits to 0 at the highest, and differ by up to three orders of magnitude."""
    space, generator = seed_space(6, 0.45, levels, step=7), np.random.default_rng(seed)
    shares = np.sort(generator.uniform(0, 1, (len(levels) - 1, 6)), axis=0)[::-1]
    rows = [*(shares * 10.0 ** generator.uniform(-3, 0, 6)), np.zeros(6)]
    values = {bits: (unit * row).tolist() for bits, row in zip(levels, rows, strict=True)}

    def rise(plan: PrecisionPlan) -> float:
        return sum(values[bits][index] for index, bits in enumerate(plan.bits))

    plans = (PrecisionPlan(space.groups, bits) for bits in itertools.product(levels, repeat=6))
    found = seed_plan(values, space)
    assert space.is_feasible(found)
    assert rise(found) == pytest.approx(min(rise(plan) for plan in plans if space.is_feasible(plan)), rel=1e-6)


@pytest.mark.parametrize(
    "lowest",
    [
        (0.5, -0.01, 0.0, -0.02, 0.3, -0.5),
        (-0.01, -0.02, -0.03, -0.01, -0.02, -0.03),
        (0.0,) * 6,
        (2e-4, 1e-4, 5e-5, -1e-4, 1e-5, 0.0),
        (1.0, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9),
    ],
    ids=["some-negative", "all-negative", "all-zero", "all-tiny", "one-dominates"],
)
def test_a_seed_plan_always_uses_the_budget(lowest: tuple[float, ...]) -> None:
    """Groups with a predicted rise of zero still get more bits, so that no bytes of the budget are left."""
    plan = seed_plan({4: lowest, 8: (0.0,) * 6}, seed_space(6, 0.67))
    assert sorted(plan.bits) == [4, 4, 8, 8, 8, 8]
    assert all(bits == 8 for bits, value in zip(plan.bits, lowest, strict=True) if value == max(lowest) > 0)
    # Although 8 bits are predicted slightly worse than 4, the first group gets 16 bits, which saves most.
    values = {4: (0.2, 0.1), 8: (0.21, 0.05), 16: (0.0, 0.0)}
    assert seed_plan(values, seed_space(2, 0.5, (4, 8, 16))).bits == (16, 4)
