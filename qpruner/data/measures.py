"""Define every measure over tasks and questions, for tables, claims, comparisons and trials alike.

With the values v of n_t questions of each of T tasks, and their standard deviation s_t (n_t - 1 degrees of freedom):

    a task       mean_t = sum_q v_tq / n_t      stderr_t = s_t / sqrt(n_t)
    all tasks    mean = sum_t mean_t / T        stderr = sqrt(sum_t stderr_t^2) / T

Every task counts the same, however many questions it has. For several fine-tunes v is their mean on the question; for
two rows it is their difference on it. Rows of text are the questions of one task.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Z_95 = 1.96
ACCURACY = "accuracy"
Answers = Sequence[Sequence[float]]
"""A value a question, by task."""


class Estimate(NamedTuple):
    """A mean and its standard error, which is NaN where a task has a single question."""

    mean: float
    stderr: float


def over_questions(values: Sequence[float]) -> Estimate:
    """Average over the questions of one task."""
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Estimate(mean, math.nan)
    # `statistics.stdev` adds fractions, which takes 2 to 4 times as long.
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(squares / (count - 1) / count))


def over_tasks(tasks: Answers) -> Estimate:
    """Average the means of the tasks, unweighted."""
    each = [over_questions(values) for values in tasks]
    stderr = math.sqrt(sum(task.stderr**2 for task in each)) / len(each)
    return Estimate(statistics.fmean(task.mean for task in each), stderr)


def averaged(models: Sequence[Answers]) -> list[list[float]]:
    """Average models on each question."""
    return [[sum(values) / len(models) for values in zip(*task, strict=True)] for task in zip(*models, strict=True)]


def student_half_width(values: Sequence[float]) -> float:
    """Compute half the width of Student's 95 % interval for the mean that `values` are drawn around."""
    return _student(values) / math.sqrt(len(values))


def prediction_half_width(values: Sequence[float]) -> float:
    """Compute half the width of the 95 % interval, around the mean of `values`, for one more draw."""
    return _student(values) * math.sqrt(1 + 1 / len(values))


def accuracy_name(metrics: Mapping[str, str]) -> str:
    """Name the metric that all tasks (task -> metric) have in lm-eval; `accuracy` if they have several."""
    names = set(metrics.values())
    return names.pop() if len(names) == 1 else ACCURACY


def accuracy_in_full(metrics: Mapping[str, str]) -> str:
    """Name the metric with the tasks of each: `accuracy (acc_norm of arc_easy, piqa; acc of boolq)`."""
    name = accuracy_name(metrics)
    if name != ACCURACY or not metrics:
        return name
    tasks: dict[str, list[str]] = {}
    for task, metric in metrics.items():
        tasks.setdefault(metric, []).append(task)
    listed = (f"{metric} of {', '.join(its)}" for metric, its in tasks.items())
    return f"{name} ({'; '.join(listed)})"


def _student(values: Sequence[float]) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values)
