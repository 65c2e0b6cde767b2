"""The plans every search starts with, and the choice of its winner, from plans and scores alone.

The search stage and the replays of `benchmarks/` share it, so a replay's regret is that of the plan a run returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpruner.plans.plan import PlanSpace, PrecisionPlan
from qpruner.search.searchers import Prior
from qpruner.sensitivity.seeds import seed_origin, seed_plan


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
