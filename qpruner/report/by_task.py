"""Accuracies by held-out task, before any fine-tune and after: what a plot of each task and the table of all show."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from qpruner.data.measures import Z_95, averaged, over_tasks
from qpruner.report.results import model_title
from qpruner.runs.records import Results, TaskScore
from qpruner.wording import counted

CAPTION = "Accuracy on each held-out task; in brackets its 95 % interval over questions"


@dataclass(frozen=True)
class Accuracy:
    """A row's accuracy on one task.

    Attributes:
        row: The row's title.
        is_before: Whether it is that of the model before any fine-tune.
        value: Mean over training seeds.
        low: Of the 95 % interval over questions; the value itself where there is one question.
        high: The same at the other end.
        num_seeds: Training seeds.
        num_questions: Of the task.
    """

    row: str
    is_before: bool
    value: float
    low: float
    high: float
    num_seeds: int
    num_questions: int


def accuracies(results: Results) -> dict[tuple[str, str], list[Accuracy]]:
    """Task and metric -> every row's accuracy, in the order of the rows."""
    scores: dict[tuple[str, str], dict[str, list[TaskScore]]] = {}
    before: set[str] = set()
    for row in results.scores:
        title = model_title(row, results.search)
        if row.seed is None:
            before.add(title)
        for score in row.scores:
            scores.setdefault((score.task, score.metric), {}).setdefault(title, []).append(score)
    return {
        task: [_accuracy(title, of_row, title in before) for title, of_row in rows.items()]
        for task, rows in scores.items()
    }


def table(results: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The same for screen readers, paper and copying: headings and cells."""
    found = accuracies(results)
    headings = [
        f"{task} {metric} ({counted(rows[0].num_questions, 'question')})" for (task, metric), rows in found.items()
    ]
    body: dict[str, list[str]] = {}
    for rows in found.values():
        for each in rows:
            body.setdefault(each.row, []).append(f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})")
    return ("row", *headings), [(row, *cells) for row, cells in body.items()]


def _accuracy(title: str, scores: list[TaskScore], is_before: bool) -> Accuracy:
    value = statistics.fmean(score.value for score in scores)
    stderr = over_tasks(averaged([[score.correct] for score in scores])).stderr
    half_width = 0.0 if math.isnan(stderr) else Z_95 * stderr
    return Accuracy(
        row=title,
        is_before=is_before,
        value=value,
        low=max(0.0, value - half_width),
        high=min(1.0, value + half_width),
        num_seeds=len(scores),
        num_questions=scores[0].num_questions,
    )
