"""An axis of sizes that is nearly to scale beside the budget, which most plans use up, and presses together what is far
from it: by logarithms of how far that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

UNITS = 50
"""The largest distance of a plan from the budget, in lengths that are nearly to scale beside it."""
NUM_TICKS = 6


@dataclass(frozen=True)
class BudgetAxis:
    """The axis.

    Attributes:
        budget: In MB.
        unit: How many MB at the budget are nearly to scale.
    """

    budget: float
    unit: float

    def along(self, size: float) -> float:
        """Where a size stands."""
        return math.copysign(math.log1p(abs(size - self.budget) / self.unit), size - self.budget)

    def back(self, place: float) -> float:
        """The size that stands there."""
        return self.budget + math.copysign(self.unit * math.expm1(abs(place)), place)

    def ticks(self, sizes: Sequence[float]) -> tuple[list[float], int]:
        """Sizes at equal distances from the least to the most, those of the budget included, and how many decimals tell
        them apart."""
        low, high = self.along(min(*sizes, self.budget)), self.along(max(*sizes, self.budget))
        if low == high:
            return [self.budget], 1
        ticks = [self.back(low + (high - low) * number / (NUM_TICKS - 1)) for number in range(NUM_TICKS)]
        closest = min(after - before for before, after in pairwise(ticks))
        return ticks, max(1, math.ceil(-math.log10(closest)))


def budget_axis(sizes: Sequence[float], budget: float) -> BudgetAxis:
    """The axis of plans of these sizes."""
    furthest = max(abs(size - budget) for size in sizes)
    return BudgetAxis(budget, furthest / UNITS or 1.0)
