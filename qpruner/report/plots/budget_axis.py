"""Axes of size and score on which the plans that matter stand apart, though a few lie far off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from qpruner.report.plots.chart import Spec, quantity

UNITS = 50
"""The largest distance of a plan from the budget, in lengths that are nearly to scale beside it."""
NUM_TICKS = 6
BUDGET_PADDING = 24
"""Pixels beside the budget's line, for its name."""
REACH = 6.0
"""An axis of scores reaches as many times as far from the best as the median lies."""


def budget_axis(sizes: Sequence[float], budget: float) -> Spec:
    """Encode the field `distance`, a size less the budget, nearly to scale beside the budget and by logarithms far off.

    Most plans use the budget up; Vega has such a scale around zero.

    Args:
        sizes: In MB.
        budget: In MB.
    """
    unit = max(abs(size - budget) for size in sizes) / UNITS or 1.0
    ticks, decimals = size_ticks(sizes, budget, unit)
    axis = quantity(
        "distance",
        f"size in MB, stretched near the budget of {budget:,.1f} MB",
        values=[tick - budget for tick in ticks],
        labelExpr=f"format(datum.value + {budget}, ',.{decimals}f')",
        labelOverlap=True,
    )
    return axis | {"scale": {"type": "symlog", "constant": unit, "nice": False, "padding": BUDGET_PADDING}}


def size_ticks(sizes: Sequence[float], budget: float, unit: float) -> tuple[list[float], int]:
    """Choose sizes at equal distances on the axis, and how many decimals tell them apart."""

    def place(size: float) -> float:
        return math.copysign(math.log1p(abs(size - budget) / unit), size - budget)

    low, high = place(min(*sizes, budget)), place(max(*sizes, budget))
    if low == high:
        return [budget], 1
    places = [low + (high - low) * number / (NUM_TICKS - 1) for number in range(NUM_TICKS)]
    ticks = [budget + math.copysign(unit * math.expm1(abs(each)), each) for each in places]
    closest = min(after - before for before, after in pairwise(ticks))
    return ticks, max(1, math.ceil(-math.log10(closest)))


def score_axis(scores: Sequence[float], title: str, metric: str) -> tuple[Spec, int]:
    """Encode the field `score`, on an axis that ends before scores that would press the others together.

    Returns:
        The encoding, and how many scores lie beyond the axis; they are drawn at its end.
    """
    sign = -1 if metric == "accuracy" else 1
    costs = sorted(sign * score for score in scores)
    best, reach = costs[0], REACH * (statistics.median(costs) - costs[0])
    near = [cost for cost in costs if cost <= best + reach] if reach else costs
    axis = quantity("score", title)
    if near[-1] - best >= (costs[-1] - best) / 2:  # there is room for all
        return axis, 0
    end = near[-1] + 0.06 * (near[-1] - best)
    domain = sorted((sign * best, sign * end))
    return axis | {"scale": {"zero": False, "domain": domain, "clamp": True}}, len(costs) - len(near)


def beyond_text(number: int) -> str:
    """Tell how many scores are drawn at the end of the axis; empty for none."""
    if not number:
        return ""
    return f" {number} far worse {'score is' if number == 1 else 'scores are'} drawn at the edge."
