"""The Pareto front of two figures to be minimized, such as a plan's bytes and its loss, and its hypervolume."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]
"""Bytes, and what is minimized beside them."""


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
