"""The plans every search starts with, the random ones beside it, and what wins: a plan, or a Pareto front.

The replays of `benchmarks/` share it, so a replay's regret is that of the plan a run returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qpruner.plans.plan import PlanSpace, PrecisionPlan
from qpruner.search.searchers import Prior
from qpruner.sensitivity.seeds import seed_origin, seed_plan

SAME_BYTES = 0.01  # plans whose bytes differ by at most this share count as equal bytes
BATCH, MAX_BATCHES = 1024, 128
Point = tuple[float, float]
"""Bytes, and what is minimized beside them."""


def controls_of(space: PlanSpace, sensitivities: Mapping[str, Prior]) -> list[tuple[str, PrecisionPlan]]:
    """Return the controls: the seed plan of every sensitivity, then the uniform plans, those inside the budget."""
    uniform = [(f"uniform-{bits}", space.uniform(bits)) for bits in space.levels]
    seeds = [(seed_origin(method), seed_plan(values, space)) for method, values in sensitivities.items()]
    return [(origin, plan) for origin, plan in [*seeds, *uniform] if space.is_feasible(plan)]


def finalist_positions(scores: Sequence[float], are_controls: Sequence[bool], confirm: int) -> list[int]:
    """Return the positions of the trials that are scored again: the `confirm` lowest scores and every control."""
    ranked = sorted(range(len(scores)), key=lambda position: (scores[position], position))
    return sorted({*ranked[:confirm], *(position for position, control in enumerate(are_controls) if control)})


def winner_position(fresh: Sequence[float], are_controls: Sequence[bool]) -> int | None:
    """Return the position of the best score on fresh rows; a control wins a tie. None if there are no scores."""
    return min(range(len(fresh)), key=lambda at: (fresh[at], not are_controls[at], at), default=None)


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the positions of the points that no other dominates; of equal points the first counts."""
    front, lowest = [], float("inf")
    for position in sorted(range(len(points)), key=lambda position: points[position]):
        if points[position][1] < lowest:
            front.append(position)
            lowest = points[position][1]
    return front


def hypervolume(points: Sequence[Point], smallest: Point, budget_bytes: float) -> float:
    """Compute the hypervolume of a front by bytes and score (Zitzler and Thiele, 1998), in the unit of the score.

    It is the area that the points dominate, up to the budget and to the score of the smallest plan, divided by the
    bytes between that plan and the budget: by how much the best plan inside a budget beats the smallest one, in the
    mean over all budgets between them. So a plan of the whole budget adds nothing.
    """
    area, lowest = 0.0, smallest[1]
    for position in non_dominated(points):
        size, score = points[position]
        if size < budget_bytes and score < lowest:
            area += (budget_bytes - size) * (lowest - score)
            lowest = score
    return area / (budget_bytes - smallest[0]) if area else 0.0


def random_plans(space: PlanSpace, plan: PrecisionPlan, count: int, seed: int) -> list[PrecisionPlan]:
    """Draw different plans, almost uniformly over all others whose bytes are within `SAME_BYTES` of those of `plan`.

    Levels are drawn group by group with probabilities ``exp(-tilt * bytes)``, which makes plans of the wanted bytes
    likely, and plans of equal bytes equally likely. Rejection sampling (von Neumann 1951) evens out the rest. The
    budget plays no part. Fewer than `count` are returned where 131072 draws found no more.
    """
    if count == 0 or len(space.levels) == 1:
        return []
    generator = np.random.default_rng(seed)
    sizes = np.array(space.group_bytes, dtype=float)
    wanted, apart = space.plan_bytes(plan) - space.fixed_bytes, SAME_BYTES * space.plan_bytes(plan)
    least, most = wanted - apart, wanted + apart
    tilt = _tilt(sizes, most)
    limit = most
    if tilt < 0:  # the lightest plans of the band are the most
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
    """Return the probability ``(groups, levels)`` of each level."""
    logits = -tilt * (sizes - sizes.min(axis=1, keepdims=True))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return chances


def _tilt(sizes: np.ndarray, wanted: float) -> float:
    """Find by bisection the tilt under which the expected bytes are `wanted`; it is bounded."""
    low, high = -50.0 / np.ptp(sizes, axis=1).mean(), 50.0 / np.ptp(sizes, axis=1).mean()
    for _ in range(60):
        middle = (low + high) / 2
        is_too_heavy = (_chances(sizes, middle) * sizes).sum() > wanted
        low, high = (middle, high) if is_too_heavy else (low, middle)
    return float((low + high) / 2)
