"""Choose the controls that a search has to beat, its finalists, its winner or Pareto front, and random plans.

The replays in `benchmarks/` call these functions too, so they choose plans as a run does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpruner.plans.plan import PlanSpace, PrecisionPlan
from qpruner.search.searchers import Prior

SAME_BYTES = 0.01  # plans whose bytes differ by at most this share count as equal bytes
BATCH, MAX_BATCHES = 1024, 128
RESOLUTION = 1e-5
"""Smallest gain of more bits, relative to the largest gain: it makes a seed plan use the whole budget."""
SCALE = 1e3
"""Largest gain given to the solver: `SCALE * RESOLUTION` is far above its absolute tolerance of 1e-6."""
Point = tuple[float, float]
"""The bytes of a plan and its score; both are minimized."""


def seed_origin(method: str) -> str:
    """Return the name that trials and tables use for the seed plan of a method."""
    return f"seed-{method.replace('_', '-')}"


def seed_plan(values: Prior, space: PlanSpace) -> PrecisionPlan:
    """Return the plan in the budget with the smallest predicted rise of the loss, by an exact knapsack.

    `values` maps bits to the predicted rise of every group, in any unit. More bits that are predicted to be worse, for
    example because of noise, count as equal to fewer bits.
    """
    rises = np.array([values[bits] for bits in space.levels], dtype=float).T  # (groups, levels)
    gains = np.maximum.accumulate(rises[:, :1] - rises, axis=1)
    gains *= SCALE / (gains.max() or 1.0)
    gains += SCALE * RESOLUTION * np.arange(len(space.levels)) / (len(space.levels) - 1)
    return space.best_by_gain(gains.tolist())


def controls_of(space: PlanSpace, sensitivities: Mapping[str, Prior]) -> list[tuple[str, PrecisionPlan]]:
    """Return the controls inside the budget: what each sensitivity suggests without a search, and uniform plans."""
    uniform = [(f"uniform-{bits}", space.uniform(bits)) for bits in space.levels]
    seeds = [(seed_origin(method), seed_plan(values, space)) for method, values in sensitivities.items()]
    return [(origin, plan) for origin, plan in [*seeds, *uniform] if space.is_feasible(plan)]


def finalist_positions(scores: Sequence[float], are_controls: Sequence[bool], confirm: int) -> list[int]:
    """Return the trials to score on new rows, by position: the `confirm` lowest scores and all controls."""
    ranked = sorted(range(len(scores)), key=lambda position: (scores[position], position))
    return sorted({*ranked[:confirm], *(position for position, control in enumerate(are_controls) if control)})


def winner_position(fresh: Sequence[float], are_controls: Sequence[bool]) -> int | None:
    """Return the position of the lowest score on rows new to all trials; None without scores; controls win ties."""
    return min(range(len(fresh)), key=lambda at: (fresh[at], not are_controls[at], at), default=None)


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the positions of the points on the Pareto front, by rising bytes; of equal points only the first."""
    front, lowest = [], float("inf")
    for position in sorted(range(len(points)), key=lambda position: points[position]):
        if points[position][1] < lowest:
            front.append(position)
            lowest = points[position][1]
    return front


def hypervolume(points: Sequence[Point], smallest: Point, budget_bytes: float) -> float:
    """Compute the hypervolume of a front of bytes and scores (Zitzler and Thiele, 1998), in the unit of the score.

    For a budget, take the score of the smallest plan minus that of the best plan inside the budget. The result is the
    mean over all budgets from the smallest plan's bytes to `budget_bytes`. A plan of `budget_bytes` adds nothing.
    """
    area, lowest = 0.0, smallest[1]
    for position in non_dominated(points):
        size, score = points[position]
        if size < budget_bytes and score < lowest:
            area += (budget_bytes - size) * (lowest - score)
            lowest = score
    return area / (budget_bytes - smallest[0]) if area else 0.0


def random_plans(space: PlanSpace, plan: PrecisionPlan, count: int, seed: int) -> list[PrecisionPlan]:
    """Draw up to `count` plans uniformly from all others whose bytes are within `SAME_BYTES` of those of `plan`.

    The level of each group is drawn with probabilities ``exp(-tilt * bytes)``, so that plans of the wanted bytes are
    likely and plans of equal bytes equally likely. Rejection sampling (von Neumann 1951) then makes all plans
    equally likely. The budget is ignored. There are fewer than `count` plans if 131072 draws do not find enough.
    """
    if count == 0 or len(space.levels) == 1:
        return []
    generator = np.random.default_rng(seed)
    sizes = np.array(space.group_bytes, dtype=float)
    wanted, apart = space.plan_bytes(plan) - space.fixed_bytes, SAME_BYTES * space.plan_bytes(plan)
    least, most = wanted - apart, wanted + apart
    tilt = _tilt(sizes, most)
    limit = most
    if tilt < 0:  # light plans are the most frequent ones in the range
        tilt, limit = min(_tilt(sizes, least), 0.0), least
    chances = _chances(sizes, tilt).cumsum(axis=1)
    found: dict[PrecisionPlan, None] = {}
    for _ in range(MAX_BATCHES):
        levels = (generator.random((BATCH, len(sizes), 1)) > chances[None, :, :-1]).sum(axis=2)
        weights = np.take_along_axis(sizes[None], levels[:, :, None], axis=2).sum(axis=(1, 2))
        kept = (weights <= most) & (weights >= least)
        kept[kept] = generator.random(int(kept.sum())) < np.exp(tilt * (weights[kept] - limit))
        for indices in levels[kept]:
            other = space.plan_of(indices)
            if other != plan:
                found[other] = None
            if len(found) == count:
                return list(found)
    return list(found)


def _chances(sizes: np.ndarray, tilt: float) -> np.ndarray:
    """Return the probability ``(groups, levels)`` to draw each level: ``exp(-tilt * bytes)`` over its sum per group."""
    logits = -tilt * (sizes - sizes.min(axis=1, keepdims=True))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return chances


def _tilt(sizes: np.ndarray, wanted: float) -> float:
    """Find by bisection, within bounds, the `tilt` of `_chances` at which the expected bytes are `wanted`."""
    low, high = -50.0 / np.ptp(sizes, axis=1).mean(), 50.0 / np.ptp(sizes, axis=1).mean()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (_chances(sizes, middle) * sizes).sum() > wanted else (low, middle)
    return float((low + high) / 2)
