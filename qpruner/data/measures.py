"""Define means, standard errors and intervals over tasks and questions, for trials and for the report alike.

A task with n values v of standard deviation s has the mean of v and stderr ``s / sqrt(n)``. Over T tasks, which have
the same weight: the mean of means, and ``sqrt(sum stderr^2) / T``. For several fine-tunes v is their mean for a
question, for a comparison the difference. Rows of text are the questions of a single task.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Z_95 = 1.96
ACCURACY = "accuracy"
Answers = Sequence[Sequence[float]]  # for each task, one value per question


class Estimate(NamedTuple):
    """A mean and its standard error, which is NaN if a task has only one question."""

    mean: float
    stderr: float


def over_questions(values: Sequence[float]) -> Estimate:
    """Average over the questions of one task."""
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Estimate(mean, math.nan)
    # `statistics.stdev` uses exact fractions, which takes 2 to 4 times as long.
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(squares / (count - 1) / count))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """Average ours minus theirs, question by question; None without the values of both, or for a single question."""
    if not len(ours) == len(theirs) > 1:
        return None
    return over_questions([one - other for one, other in zip(ours, theirs, strict=True)])


def over_tasks(tasks: Answers) -> Estimate:
    """Average the means of all tasks with equal weights."""
    each = [over_questions(values) for values in tasks]
    stderr = math.sqrt(sum(task.stderr**2 for task in each)) / len(each)
    return Estimate(statistics.fmean(task.mean for task in each), stderr)


def averaged(models: Sequence[Answers]) -> list[list[float]]:
    """Average the values of several models for each question."""
    return [[sum(values) / len(models) for values in zip(*task, strict=True)] for task in zip(*models, strict=True)]


def half_width(values: Sequence[float], of_next: bool = False) -> float:
    """Compute half of Student's 95 % interval around the mean of `values`, for the true mean or the next value."""
    from scipy.stats import t

    spread = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values)
    return spread * math.sqrt(1 + 1 / len(values)) if of_next else spread / math.sqrt(len(values))


def accuracy_name(metrics: Mapping[str, str]) -> str:
    """Return the metric of all tasks (task -> metric in lm-eval), or `accuracy` if they have different metrics."""
    names = set(metrics.values())
    return names.pop() if len(names) == 1 else ACCURACY


def accuracy_in_full(metrics: Mapping[str, str]) -> str:
    """Return the metric, with tasks if they differ in it: `accuracy (acc_norm of arc_easy, piqa; acc of boolq)`."""
    name = accuracy_name(metrics)
    if name != ACCURACY or not metrics:
        return name
    tasks: dict[str, list[str]] = {}
    for task, metric in metrics.items():
        tasks.setdefault(metric, []).append(task)
    listed = (f"{metric} of {', '.join(its)}" for metric, its in tasks.items())
    return f"{name} ({'; '.join(listed)})"
