"""Seed plans follow the sensitivities: otherwise the search would start from arbitrary plans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qpruner.plans.plan import PlanSpace, PrecisionPlan
from qpruner.search.choice import seed_plan

SIZES = {4: 40, 8: 70, 16: 130}


def space_of(num_groups: int, share: float, levels: tuple[int, ...] = (4, 8), step: int = 0) -> PlanSpace:
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
    space, generator = space_of(6, 0.45, levels, step=7), np.random.default_rng(seed)
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
    plan = seed_plan({4: lowest, 8: (0.0,) * 6}, space_of(6, 0.67))
    assert sorted(plan.bits) == [4, 4, 8, 8, 8, 8]
    assert all(bits == 8 for bits, value in zip(plan.bits, lowest, strict=True) if value == max(lowest) > 0)
    # Although 8 bits are predicted slightly worse than 4, the first group gets 16 bits, which saves most.
    values = {4: (0.2, 0.1), 8: (0.21, 0.05), 16: (0.0, 0.0)}
    assert seed_plan(values, space_of(2, 0.5, (4, 8, 16))).bits == (16, 4)
