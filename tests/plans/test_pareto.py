"""Fronts of plans by bytes and score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume

from qpruner.plans.pareto import Point, hypervolume, non_dominated


def sloping(seed: int) -> list[Point]:
    """Points of which larger ones are better in the mean."""
    return [(size, 6.0 - size + noise) for size, noise in np.random.default_rng(seed).uniform(0, 5, (12, 2)).tolist()]


def points_of(seed: int) -> list[Point]:
    """Points on a small grid, some of them equal in one figure or both."""
    return [(float(size), float(score)) for size, score in np.random.default_rng(seed).integers(0, 6, (20, 2))]


@pytest.mark.parametrize("seed", range(3))
def test_a_front_holds_what_none_of_fewer_or_equal_bytes_beats(seed: int) -> None:
    points = points_of(seed)

    def beats(one: Point, other: Point) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    expected = {point for point in points if not any(beats(other, point) for other in points)}
    found = [points[position] for position in non_dominated(points)]
    assert found == sorted(expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [4.0, 5.0, 8.0])
def test_the_hypervolume_is_botorchs(seed: int, budget: float) -> None:
    """Which maximizes, and asks for a corner instead of the smallest plan."""
    points = sloping(seed)
    smallest = min(points)
    corner = torch.tensor([-budget, -smallest[1]], dtype=torch.float64)
    area = Hypervolume(corner).compute(-torch.tensor(points, dtype=torch.float64))
    assert area > 0.1
    assert hypervolume(points, smallest, budget) == pytest.approx(area / (budget - smallest[0]))
