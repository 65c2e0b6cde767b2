"""Turn a sensitivity into a plan: bits where they are predicted to save the most loss, under the byte budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpruner.plans.plan import PlanSpace, PrecisionPlan

RESOLUTION = 1e-5
"""Least gain of a step to more bits, as a share of the largest: the budget is used whatever is predicted."""
SCALE = 1e3
"""The solver's largest gain: `RESOLUTION` of that is far above its absolute tolerances (1e-6)."""


def seed_origin(method: str) -> str:
    """Name a method's seed plan as trials and tables do."""
    return f"seed-{method.replace('_', '-')}"


def seed_plan(values: Mapping[int, Sequence[float]], space: PlanSpace) -> PrecisionPlan:
    """Solve an exact knapsack for the feasible plan with the least predicted rise.

    `values` has bits -> predicted rise of every group, in any unit. More bits are never worse: where a prediction says
    so (noise, a negative slope) they are worth nothing.
    """
    rises = np.array([values[bits] for bits in space.levels], dtype=float).T  # (groups, levels)
    gains = np.maximum.accumulate(rises[:, :1] - rises, axis=1)
    gains *= SCALE / (gains.max() or 1.0)
    gains += SCALE * RESOLUTION * np.arange(len(space.levels)) / (len(space.levels) - 1)
    return space.best_by_gain(gains.tolist())
