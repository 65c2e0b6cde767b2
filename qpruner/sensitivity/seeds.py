"""Turn a sensitivity into a seed plan: the plan in the byte budget whose predicted rise of the loss is smallest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpruner.plans.plan import PlanSpace, PrecisionPlan

RESOLUTION = 1e-5
"""Smallest gain of more bits, relative to the largest gain: it makes the plan use the whole budget."""
SCALE = 1e3
"""Largest gain given to the solver: `SCALE * RESOLUTION` is far above its absolute tolerance of 1e-6."""


def seed_origin(method: str) -> str:
    """Return the name that trials and tables use for the seed plan of a method."""
    return f"seed-{method.replace('_', '-')}"


def seed_plan(values: Mapping[int, Sequence[float]], space: PlanSpace) -> PrecisionPlan:
    """Return the plan in the budget with the smallest predicted rise, by an exact knapsack.

    `values` maps bits to the predicted rise of every group, in any unit. More bits that are predicted to be worse, for
    example because of noise, count as equal to fewer bits.
    """
    rises = np.array([values[bits] for bits in space.levels], dtype=float).T  # (groups, levels)
    gains = np.maximum.accumulate(rises[:, :1] - rises, axis=1)
    gains *= SCALE / (gains.max() or 1.0)
    gains += SCALE * RESOLUTION * np.arange(len(space.levels)) / (len(space.levels) - 1)
    return space.best_by_gain(gains.tolist())
