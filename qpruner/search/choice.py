"""Choose the controls that a search has to beat, its finalists, its winner, a Pareto front, and
random plans.

The replays in `benchmarks/` call these functions too, so they choose plans as a run does.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from qpruner.data import measures
from qpruner.plans.plan import EMBEDDINGS, HEAD, UNPRUNED, PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.runs.records import OF_EVERY_CUT
from qpruner.search.searchers import Prior

SAME_BYTES = 0.01  # plans whose bytes differ by at most this share count as equal bytes
BATCH, MAX_BATCHES = 1024, 128
SCALE = 1e3  # largest gain given to the solver, far above its absolute tolerance of 1e-6
BEST_FIRST = ("kl", "second_order", "fisher", "loss", "first_order", "mutual_information")
"""Sensitivities that may choose the plans of controls: the first that is measured does. See
docs/results.md, Search."""
Point = tuple[float, float]  # the bytes of a plan and its score; both are minimized


def seed_plan(values: Prior, space: PlanSpace) -> PrecisionPlan:
    """Return the plan in the budget with the smallest predicted rise of the loss, by an exact
    knapsack.

    `values` maps formats to the predicted rise of every group, in any unit; None counts as that of
    the group's smallest format. Bytes that are left go to formats that are predicted no worse.
    """
    gains = np.zeros((len(space.groups), len(space.levels)))
    for group, offered in enumerate(space.offered):
        of_levels = np.array([values[space.levels[at]][group] for at in offered], dtype=float)
        gains[group, offered] = np.nan_to_num(of_levels[0] - of_levels)
    largest = gains.max() or np.abs(gains).max() or 1.0
    scaled = gains.clip(min=-largest) * (
        SCALE / largest
    )  # much worse is as bad as worse: the smallest format is there
    return _with_left_over(space, space.best_by_gain(scaled.tolist()), gains)


def _with_left_over(space: PlanSpace, plan: PrecisionPlan, gains: np.ndarray) -> PrecisionPlan:
    """Raise groups, level by level, as far as bytes are left and the gains ``(groups, levels)`` get
    no smaller."""
    indices, left = list(space.indices_of(plan)), space.budget_bytes - space.plan_bytes(plan)
    for level, group in itertools.product(range(len(space.levels)), range(len(space.groups))):
        sizes, current = space.group_bytes[group], indices[group]
        more = (sizes[level] or 0) - (
            sizes[current] or 0
        )  # a level that is not offered has no more bytes
        if 0 < more <= left and gains[group, level] >= gains[group, current]:
            indices[group], left = level, left - more
    return space.plan_of(indices)


def uniform_plans(space: PlanSpace) -> dict[str, PrecisionPlan]:
    """Map each format that all groups of blocks are offered to the plan with all of them in it,
    smallest first.

    If they share no format, map each format of any block; blocks that do not take it get their next
    larger one. Embeddings and head have the largest of their formats with which the plan fits the
    budget; if none fits, the smallest.
    """
    outside = [at for at, name in enumerate(space.groups) if name in (EMBEDDINGS, HEAD)]
    inside = [offered for at, offered in enumerate(space.offered) if at not in outside]
    of_any = sorted({at for offered in inside for at in offered})
    common = [at for at in of_any if all(at in offered for offered in inside)]
    plans: dict[PrecisionPlan, str] = {}
    for name in (space.levels[at] for at in common or of_any):
        plans.setdefault(_with_outside(space, space.uniform(name), outside), name)
    return {name: plan for plan, name in plans.items()}


def _with_outside(
    space: PlanSpace, uniform: PrecisionPlan, outside: Sequence[int]
) -> PrecisionPlan:
    plans = []
    for chosen in itertools.product(*(space.offered[at] for at in outside)):
        indices = dict(enumerate(space.indices_of(uniform))) | dict(
            zip(outside, chosen, strict=True)
        )
        plans.append(space.plan_of(indices.values()))
    fitting = filter(
        space.is_feasible, reversed(plans)
    )  # of equal bytes the last format counts as the largest
    return max(fitting, key=space.plan_bytes, default=min(plans, key=space.plan_bytes))


def best_uniform(space: PlanSpace, rises: Prior | None = None) -> PrecisionPlan:
    """Return the one of `uniform_plans` that fits with the least sum of `rises` (see `seed_plan`).

    Of equally good ones, and without rises, it is the one with the largest format. If none fits, it
    is the smallest.
    """
    plans = list(uniform_plans(space).values()) or [space.smallest()]

    def rise(plan: PrecisionPlan) -> float:
        return sum(rises[name][at] or 0.0 for at, name in enumerate(plan.formats)) if rises else 0.0

    return min(
        filter(space.is_feasible, reversed(plans)),
        key=rise,
        default=min(plans, key=space.plan_bytes),
    )


def controls_of(space: PlanSpace, rises: Prior) -> list[tuple[str, PrecisionPlan]]:
    """Return what one would try of a cut without a search: its best uniform plan, and its best plan
    by a sensitivity.

    `rises` are as in `seed_plan`. If no plan fits the budget, the uniform plan is over it, and
    alone; so it is if both are the same.
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
    """Return the trials to score on new rows, by position: the `confirm` lowest that `can_win`, and
    all controls."""
    ranked = sorted(
        (at for at in range(len(scores)) if can_win is None or can_win[at]), key=scores.__getitem__
    )
    return sorted({*ranked[:confirm], *(at for at, control in enumerate(are_controls) if control)})


def contenders(
    fresh: Sequence[float],
    are_controls: Sequence[bool],
    confirm: int,
    losses: Sequence[Sequence[float]] = (),
) -> list[int]:
    """Return which finalists to train again under further seeds, by position, before one of them
    wins.

    They are the `confirm` lowest scores on fresh rows and the best control, as far as they cannot
    be told apart from the lowest: the 95 % interval of the difference of `losses` ``(finalists,
    rows)``, paired by row, has zero in it. Without losses, as in a search by accuracy, all of them
    are returned.
    """
    ranked = sorted(range(len(fresh)), key=lambda at: (fresh[at], not are_controls[at], at))
    chosen = {*ranked[:confirm], *[at for at in ranked if are_controls[at]][:1]}
    if losses:
        lowest = losses[ranked[0]]
        chosen = {
            at
            for at in chosen
            if not measures.interval([[measures.less(losses[at], lowest)]]).excludes_zero
        }
    return sorted(chosen)


def winner_position(
    fresh: Sequence[float], are_controls: Sequence[bool], num_seeds: Sequence[int] | None = None
) -> int | None:
    """Return which finalist wins: the lowest score on fresh rows, a mean over training seeds;
    controls win ties.

    Only those with the most seeds can win (see `contenders`). None without finalists.
    """
    allowed = [
        at for at in range(len(fresh)) if num_seeds is None or num_seeds[at] == max(num_seeds)
    ]
    return min(allowed, key=lambda at: (fresh[at], not are_controls[at], at), default=None)


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the positions of the points on the Pareto front, by rising bytes; of equal points only
    the first."""
    front, lowest = [], float("inf")
    for position in sorted(range(len(points)), key=lambda position: points[position]):
        if points[position][1] < lowest:
            front.append(position)
            lowest = points[position][1]
    return front


def random_plans(
    space: PlanSpace, plan: PrecisionPlan, count: int, seed: int
) -> list[PrecisionPlan]:
    """Draw up to `count` plans uniformly from all others whose bytes are within `SAME_BYTES` of
    those of `plan`.

    The level of each group is drawn with probabilities ``exp(-tilt * bytes)``, so that plans of the
    wanted bytes are likely and plans of equal bytes equally likely. Rejection sampling (von Neumann
    1951) then makes all plans equally likely. The budget is ignored. There are fewer than `count`
    plans if 131072 draws do not find enough.
    """
    if count == 0 or all(len(offered) == 1 for offered in space.offered):
        return []
    generator = np.random.default_rng(seed)
    sizes = np.array(space.group_bytes, dtype=float)  # NaN where a level is not offered
    wanted, apart = space.plan_bytes(plan) - space.fixed_bytes, SAME_BYTES * space.plan_bytes(plan)
    least, most = wanted - apart, wanted + apart
    tilt = _tilt(sizes, most)
    limit = most
    if tilt < 0:  # light plans are the most frequent ones in the range
        tilt, limit = min(_tilt(sizes, least), 0.0), least
    chances = _chances(sizes, tilt).cumsum(axis=1)
    for group, offered in enumerate(space.offered):
        chances[group, offered[-1] :] = np.inf
    found: dict[PrecisionPlan, None] = {}
    for _ in range(MAX_BATCHES):
        levels = (generator.random((BATCH, len(sizes), 1)) >= chances[None, :, :-1]).sum(axis=2)
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
    """Return the probability ``(groups, levels)`` to draw each level: ``exp(-tilt * bytes)`` over
    its sum per group."""
    logits = -tilt * (sizes - np.nanmin(sizes, axis=1, keepdims=True))
    weights = np.nan_to_num(np.exp(logits - np.nanmax(logits, axis=1, keepdims=True)))
    chances: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return chances


def _tilt(sizes: np.ndarray, wanted: float) -> float:
    """Find by bisection, within bounds, the `tilt` of `_chances` at which the expected bytes are
    `wanted`."""
    range_ = (np.nanmax(sizes, axis=1) - np.nanmin(sizes, axis=1)).mean()
    if range_ == 0:  # all formats of a group have equal bytes
        return 0.0
    low, high = -50.0 / range_, 50.0 / range_
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.nansum(_chances(sizes, middle) * sizes) > wanted else (low, middle)
        )
    return float((low + high) / 2)
