"""Choose plans: the controls of a search, its finalists, its winner and random plans.

The replays in `benchmarks/` call these functions too, so they choose plans as a run does.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from qpruner.data import measures
from qpruner.plans.plan import OUTSIDE_BLOCKS, UNPRUNED, PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.runs.records import OF_EVERY_CUT
from qpruner.search.searchers import Prior

SAME_BYTES = 0.01  # plans whose bytes differ by at most this share count as equal bytes
BATCH = 1024
MAX_BATCHES = 128
SCALE = 1e3  # largest gain given to the solver, far above its absolute tolerance of 1e-6
BEST_FIRST = ("kl", "second_order", "fisher", "loss", "first_order", "mutual_information")
"""Sensitivities that may choose the plans of controls: the first that is measured does. See
docs/results.md, Search."""
Point = tuple[float, float]  # the bytes of a plan and its score; both are minimized


def seed_plan(values: Prior, space: PlanSpace) -> PrecisionPlan:
    """Return the plan in the budget with the smallest predicted rise of the loss.

    It is found by an exact knapsack. Bytes that are left go to formats that are predicted no worse.

    Args:
        values: For each format the predicted rise by every group, in any unit; None counts as that
            of the group's smallest format.
        space: The plans of a cut, and the budget.
    """
    rises = np.array([values[level] for level in space.levels], dtype=float).T
    smallest = [offered[0] for offered in space.offered]
    of_smallest = rises[np.arange(len(rises)), smallest][:, None]
    gains = np.where(np.isnan(space.table), 0.0, np.nan_to_num(of_smallest - rises))
    largest = gains.max() or np.abs(gains).max() or 1.0
    # Much worse is as bad as worse: the smallest format is there.
    scaled = gains.clip(min=-largest) * (SCALE / largest)
    return _with_left_over(space, space.best_by_gain(scaled), gains)


def _with_left_over(space: PlanSpace, plan: PrecisionPlan, gains: np.ndarray) -> PrecisionPlan:
    """Raise groups, level by level, as far as bytes are left and the gains get no smaller.

    Gains are an array ``(groups, levels)``.
    """
    indices = list(space.indices_of(plan))
    left = space.budget_bytes - space.plan_bytes(plan)
    for level, group in itertools.product(range(len(space.levels)), range(len(space.groups))):
        current = indices[group]
        more = space.table[group, level] - space.table[group, current]  # NaN if not offered
        if 0 < more <= left and gains[group, level] >= gains[group, current]:
            indices[group] = level
            left -= more
    return space.plan_of(indices)


def uniform_plans(space: PlanSpace) -> dict[str, PrecisionPlan]:
    """Map each format that all groups of blocks are offered to the plan with all of them in it.

    The formats are in order of size, smallest first. If the groups share no format, map each
    format of any block; blocks that do not take it get their next larger one. Embeddings and head
    have the largest of their formats with which the plan fits the budget; if none fits, the
    smallest.
    """
    outside = [at for at, name in enumerate(space.groups) if name in OUTSIDE_BLOCKS]
    inside = [offered for at, offered in enumerate(space.offered) if at not in outside]
    of_any = sorted(set(itertools.chain(*inside)))
    common = [at for at in of_any if all(at in offered for offered in inside)]
    plans: dict[PrecisionPlan, str] = {}
    for level in common or of_any:
        name = space.levels[level]
        plans.setdefault(_with_outside(space, space.uniform(name), outside), name)
    return {name: plan for plan, name in plans.items()}


def _with_outside(
    space: PlanSpace, uniform: PrecisionPlan, outside: Sequence[int]
) -> PrecisionPlan:
    plans = []
    for chosen in itertools.product(*(space.offered[at] for at in outside)):
        indices = list(space.indices_of(uniform))
        for group, level in zip(outside, chosen, strict=True):
            indices[group] = level
        plans.append(space.plan_of(indices))
    # Of formats of equal bytes the last counts as the largest.
    fitting = filter(space.is_feasible, reversed(plans))
    return max(fitting, key=space.plan_bytes, default=min(plans, key=space.plan_bytes))


def best_uniform(space: PlanSpace, rises: Prior | None = None) -> PrecisionPlan:
    """Return the one of `uniform_plans` that fits with the least sum of `rises` (see `seed_plan`).

    Of equally good ones, and without rises, it is the one with the largest format. If none fits, it
    is the smallest.
    """
    plans = list(uniform_plans(space).values()) or [space.smallest()]

    def rise(plan: PrecisionPlan) -> float:
        if not rises:
            return 0.0
        return sum(rises[name][group] or 0.0 for group, name in enumerate(plan.formats))

    fitting = filter(space.is_feasible, reversed(plans))
    return min(fitting, key=rise, default=min(plans, key=space.plan_bytes))


def controls_of(space: PlanSpace, rises: Prior) -> list[tuple[str, PrecisionPlan]]:
    """Return what one would try of a cut without a search.

    It is the best uniform plan, and the best plan by a sensitivity. If no plan
    fits the budget, the uniform plan is over it, and alone. It is also alone if both are the same.
    `rises` are as in `seed_plan`.
    """
    name = "unpruned" if space.cut == UNPRUNED else space.cut
    plans = {best_uniform(space, rises): OF_EVERY_CUT[0]}
    if space.is_feasible(space.smallest()):
        plans.setdefault(seed_plan(rises, space), OF_EVERY_CUT[1])
    return [(f"{name}{kind}", plan) for plan, kind in plans.items()]


def finalist_positions(
    scores: Sequence[float],
    are_controls: Sequence[bool],
    confirm: int,
    can_win: Sequence[bool] | None = None,
) -> list[int]:
    """Return the trials to score on new rows, by position.

    They are the `confirm` lowest scores that `can_win`, and all controls.
    """
    allowed = [at for at in range(len(scores)) if can_win is None or can_win[at]]
    lowest = sorted(allowed, key=scores.__getitem__)[:confirm]
    controls = [at for at, is_control in enumerate(are_controls) if is_control]
    return sorted({*lowest, *controls})


def contenders(
    fresh: Sequence[float],
    are_controls: Sequence[bool],
    confirm: int,
    losses: Sequence[Sequence[float]] = (),
) -> list[int]:
    """Return which finalists to train again under further seeds, by position.

    They are the `confirm` lowest scores on fresh rows and the best control, as far as they cannot
    be told apart from the lowest: the 95 % interval of the difference of `losses` ``(finalists,
    rows)``, paired by row, has zero in it. Without losses, as in a search by accuracy, all of them
    are returned.
    """
    ranked = sorted(range(len(fresh)), key=lambda at: (fresh[at], not are_controls[at], at))
    best_controls = [at for at in ranked if are_controls[at]][:1]
    chosen = sorted({*ranked[:confirm], *best_controls})
    if not losses:
        return chosen
    lowest = losses[ranked[0]]

    def may_be_best(at: int) -> bool:
        return not measures.interval([[measures.less(losses[at], lowest)]]).excludes_zero

    return list(filter(may_be_best, chosen))


def winner_position(
    fresh: Sequence[float], are_controls: Sequence[bool], num_seeds: Sequence[int] | None = None
) -> int | None:
    """Return the position of the finalist that wins; None without finalists.

    It has the lowest score on fresh rows, a mean over training seeds; controls win ties. Only those
    with the most seeds can win (see `contenders`).
    """
    allowed = [
        at for at in range(len(fresh)) if num_seeds is None or num_seeds[at] == max(num_seeds)
    ]
    return min(allowed, key=lambda at: (fresh[at], not are_controls[at], at), default=None)


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the positions of the points on the Pareto front, by rising bytes.

    Of equal points only the first is on it.
    """
    front = []
    lowest = float("inf")
    for position in sorted(range(len(points)), key=lambda position: points[position]):
        if points[position][1] < lowest:
            front.append(position)
            lowest = points[position][1]
    return front


def random_plans(
    space: PlanSpace, plan: PrecisionPlan, count: int, seed: int
) -> list[PrecisionPlan]:
    """Draw up to `count` plans of about equal bytes uniformly from all others than `plan`.

    Their bytes are within `SAME_BYTES` of those of `plan`. The level of each group is drawn with
    probabilities ``exp(-tilt * bytes)``, so that plans of the wanted bytes are likely and plans of
    equal bytes equally likely. Rejection sampling (von Neumann 1951) then makes all plans equally
    likely. The budget is ignored. There are fewer than `count` plans if 131072 draws do not find
    enough.
    """
    if count == 0 or all(len(offered) == 1 for offered in space.offered):
        return []
    generator = np.random.default_rng(seed)
    sizes = space.table
    wanted = space.plan_bytes(plan) - space.fixed_bytes
    apart = SAME_BYTES * space.plan_bytes(plan)
    least = wanted - apart
    most = wanted + apart
    tilt = _tilt(sizes, most)
    limit = most
    if tilt < 0:  # light plans are the most frequent ones in the range
        tilt = min(_tilt(sizes, least), 0.0)
        limit = least
    chances = _chances(sizes, tilt).cumsum(axis=1)
    for group, offered in enumerate(space.offered):
        chances[group, offered[-1] :] = np.inf
    drawn: dict[PrecisionPlan, None] = {}
    for _ in range(MAX_BATCHES):
        levels = (generator.random((BATCH, len(sizes), 1)) >= chances[None, :, :-1]).sum(axis=2)
        weights = np.take_along_axis(sizes[None], levels[:, :, None], axis=2).sum(axis=(1, 2))
        kept = (weights <= most) & (weights >= least)
        kept[kept] = generator.random(int(kept.sum())) < np.exp(tilt * (weights[kept] - limit))
        for indices in levels[kept]:
            other = space.plan_of(indices)
            if other != plan:
                drawn[other] = None
            if len(drawn) == count:
                return list(drawn)
    return list(drawn)


def _chances(sizes: np.ndarray, tilt: float) -> np.ndarray:
    """Return the probability ``(groups, levels)`` to draw each level.

    It is ``exp(-tilt * bytes)`` over its sum per group.
    """
    logits = -tilt * (sizes - np.nanmin(sizes, axis=1, keepdims=True))
    weights = np.nan_to_num(np.exp(logits - np.nanmax(logits, axis=1, keepdims=True)))
    chances: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return chances


def _tilt(sizes: np.ndarray, wanted: float) -> float:
    """Find the `tilt` of `_chances` at which the expected bytes are `wanted`.

    It is found by bisection, within bounds.
    """
    range_ = (np.nanmax(sizes, axis=1) - np.nanmin(sizes, axis=1)).mean()
    if range_ == 0:  # all formats of a group have equal bytes
        return 0.0
    low = -50.0 / range_
    high = 50.0 / range_
    for _ in range(60):
        middle = (low + high) / 2
        if np.nansum(_chances(sizes, middle) * sizes) > wanted:
            low = middle
        else:
            high = middle
    return float((low + high) / 2)
