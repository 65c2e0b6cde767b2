"""Means, standard errors and intervals over tasks and questions."""

import math

import numpy as np
import pytest
from scipy import stats

from qpruner.data.measures import (
    accuracy_in_full,
    accuracy_name,
    averaged,
    interval,
    over_questions,
    over_tasks,
    prediction_interval,
)


def test_every_task_has_the_same_weight() -> None:
    tasks = [[1.0] * 90 + [0.0] * 10, [0.0, 1.0, 0.0, 0.0]]
    found = over_tasks(tasks)
    assert found.mean == pytest.approx((0.9 + 0.25) / 2)
    variances = [np.var(values, ddof=1) / len(values) for values in tasks]
    assert found.stderr == pytest.approx(math.sqrt(sum(variances)) / 2)

    # Seeds are averaged for each question.
    assert averaged([[[0.0, 1.0], [2.0]], [[1.0, 1.0], [4.0]]]) == [[0.5, 1.0], [3.0]]


def test_one_question_has_no_standard_error() -> None:
    assert over_questions([1.0]).mean == 1.0
    assert math.isnan(over_questions([1.0]).stderr)
    # The mean over tasks has none either.
    assert math.isnan(over_tasks([[1.0, 0.0], [1.0]]).stderr)


def test_prediction_intervals_hold_95_percent_of_draws() -> None:
    draws = np.random.default_rng(0).normal(0, 2, (5000, 5))
    held = []
    for *known, new in draws.tolist():
        mean, half_width = prediction_interval(known)
        assert half_width
        held.append(abs(new - mean) < half_width)
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)


def test_of_one_seed_the_interval_is_students_over_questions() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1, 9)
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert interval([[differences.tolist()]]) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert interval([[[0.1]]]) == (0.1, None)
    assert not interval([[[0.1, 0.1]]]).excludes_zero
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(1 - 0.05 / 15)
    # Six plans make 15 pairs.
    assert interval([[differences.tolist()]], 15).half_width == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("num_rows", [2, 4, 8, 32, 182])
@pytest.mark.parametrize("of_seed", [0.0, 0.005, 0.03])
def test_intervals_hold_the_true_difference(num_seeds: int, num_rows: int, of_seed: float) -> None:
    """Rows, seeds and single questions each shift a difference at random; the interval of one seed
    lacks its shift."""
    generator = np.random.default_rng(num_seeds * num_rows)
    number = 800
    held = 0
    shift = of_seed if num_seeds > 1 else 0.0
    for _ in range(number):
        rows = generator.normal(0, 0.067, (1, num_rows))
        seeds = generator.normal(0, shift, (num_seeds, 1))
        drawn = rows + seeds + generator.normal(0, 0.043, (num_seeds, num_rows))
        mean, half_width = interval([[of_rows] for of_rows in drawn.tolist()])
        assert half_width
        held += abs(mean) < half_width
    assert 0.93 <= held / number <= 0.985


def test_accuracy_is_named_after_the_metric_of_its_tasks() -> None:
    assert accuracy_name({"arc": "acc_norm", "piqa": "acc_norm"}) == "acc_norm"
    mixed = {"arc": "acc_norm", "boolq": "acc", "piqa": "acc_norm"}
    assert accuracy_name(mixed) == "accuracy"
    assert accuracy_in_full(mixed) == "accuracy (acc_norm of arc, piqa; acc of boolq)"
    assert accuracy_in_full({}) == "accuracy"
