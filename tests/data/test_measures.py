"""Means, standard errors and intervals over tasks and questions."""

import math

import numpy as np
import pytest
from scipy import stats

from qpruner.data.measures import accuracy_in_full, accuracy_name, averaged, half_width, over_questions, over_tasks


def test_every_task_has_the_same_weight() -> None:
    tasks = [[1.0] * 90 + [0.0] * 10, [0.0, 1.0, 0.0, 0.0]]
    found = over_tasks(tasks)
    assert found.mean == pytest.approx((0.9 + 0.25) / 2)
    variances = [np.var(values, ddof=1) / len(values) for values in tasks]
    assert found.stderr == pytest.approx(math.sqrt(sum(variances)) / 2)

    assert averaged([[[0.0, 1.0], [2.0]], [[1.0, 1.0], [4.0]]]) == [[0.5, 1.0], [3.0]], "averaged per question"


def test_one_question_has_no_standard_error() -> None:
    assert over_questions([1.0]).mean == 1.0 and math.isnan(over_questions([1.0]).stderr)
    assert math.isnan(over_tasks([[1.0, 0.0], [1.0]]).stderr), "the mean over tasks has none either"


def test_prediction_intervals_hold_95_percent_of_draws() -> None:
    draws = np.random.default_rng(0).normal(0, 2, (5000, 5))
    held = [abs(new - np.mean(known)) < half_width(known, of_next=True) for *known, new in draws.tolist()]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)
    low, high = stats.ttest_1samp(draws[0], 0.0).confidence_interval(0.95)
    assert half_width(draws[0].tolist()) == pytest.approx((high - low) / 2)


def test_accuracy_is_named_after_the_metric_of_its_tasks() -> None:
    assert accuracy_name({"arc": "acc_norm", "piqa": "acc_norm"}) == "acc_norm"
    mixed = {"arc": "acc_norm", "boolq": "acc", "piqa": "acc_norm"}
    assert accuracy_name(mixed) == "accuracy"
    assert accuracy_in_full(mixed) == "accuracy (acc_norm of arc, piqa; acc of boolq)"
    assert accuracy_in_full({}) == "accuracy"
