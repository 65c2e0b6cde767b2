"""Computes the rows of a run's final table from its records."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.data import measures
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.records import (
    CandidateRecord,
    Results,
    RowScores,
    StandardError,
)
from qpruner.search.roles import title_of

# the record of one fine-tune, and the scores of its model
FineTune = tuple[CandidateRecord, RowScores]
Speed = tuple[float, float, float]
"""Median, minimum and maximum of a row's repeated speed measurements, in tokens per second."""


@dataclass(frozen=True)
class Row:
    """One row of the final table: a plan, fine-tuned under one or more training seeds.

    The row `random` has several plans. Figures are means over these fine-tunes with their standard
    deviations, `..._spread`; memory is a maximum. Losses are in nats per token, answer losses in
    nats per answer (None if a task has no choices). `accuracy_stderr` is the standard error over
    questions. Records use `name`, reports use `title`. Each plan has one character per group.
    """

    name: str
    title: str
    origin: str
    cut: str
    seeds: tuple[int, ...]
    plans: tuple[str, ...]
    num_parameters: int
    measured_bytes: int
    mean_bits: float
    peak_memory_bytes: int
    confirmation_loss: float
    confirmation_loss_spread: float | None
    accuracy: float
    accuracy_spread: float | None
    accuracy_stderr: StandardError
    answer_loss: float | None
    answer_loss_spread: float | None
    perplexity: float | None
    perplexity_spread: float | None
    inference_memory_bytes: int | None
    prefill_tokens_per_second: Speed | None
    decode_tokens_per_second: Speed | None


def rows(results: Results) -> list[Row]:
    """Compute the rows of the final table, in the order of `fine_tunes`."""
    return [
        _row(title_of(name, results.search), tuned) for name, tuned in fine_tunes(results).items()
    ]


def fine_tunes(results: Results) -> dict[str, list[FineTune]]:
    """Group the run's fine-tunes by the name of their row.

    Rows and fine-tunes keep the order of the records.
    """
    scored = [row for row in results.scores if row.seed is not None]
    by_name: dict[str, list[FineTune]] = {}
    for each in zip(results.candidates, scored, strict=True):
        by_name.setdefault(each[0].name, []).append(each)
    return by_name


def _row(title: str, found: list[FineTune]) -> Row:
    tuned, evaluated = [record for record, _ in found], [row for _, row in found]
    correct = [[score.correct for score in row.scores] for row in evaluated]
    answer_losses = [[score.answer_loss for score in row.scores] for row in evaluated]
    have_choices = all(all(tasks) for tasks in answer_losses)
    timings = list(dict.fromkeys(row.inference for row in evaluated if row.inference))
    spread: dict[str, Any] = {}
    for name, values in {
        "confirmation_loss": [record.confirmation_loss for record in tuned],
        "accuracy": [measures.over_tasks(tasks).mean for tasks in correct],
        "answer_loss": [measures.over_tasks(tasks).mean for tasks in answer_losses]
        if have_choices
        else [],
        "perplexity": [math.exp(row.text_loss) for row in evaluated if row.text_loss is not None],
    }.items():
        spread[name] = statistics.fmean(values) if values else None
        spread[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    return Row(
        name=tuned[0].name,
        title=title,
        origin=tuned[0].origin,
        cut=tuned[0].cut,
        seeds=tuple(dict.fromkeys(record.seed for record in tuned)),
        plans=tuple(
            dict.fromkeys(str(PrecisionPlan.from_dict(record.plan, record.cut)) for record in tuned)
        ),
        num_parameters=tuned[0].num_parameters,
        measured_bytes=round(statistics.fmean(record.measured_bytes for record in tuned)),
        mean_bits=statistics.fmean(record.mean_bits for record in tuned),
        peak_memory_bytes=max(record.peak_memory_bytes for record in tuned),
        accuracy_stderr=measures.over_tasks(measures.averaged(correct)).stderr,
        inference_memory_bytes=max((each.memory_bytes for each in timings), default=None),
        prefill_tokens_per_second=_speed(
            [turn for each in timings for turn in each.prefill_tokens_per_second]
        ),
        decode_tokens_per_second=_speed(
            [turn for each in timings for turn in each.decode_tokens_per_second]
        ),
        **spread,
    )


def speed_text(turns: Sequence[float] | None) -> str:
    """Format speeds: the median and, in brackets, minimum and maximum; `-` if none was measured."""
    if not turns:
        return "-"
    figures = (statistics.median(turns), min(turns), max(turns))
    median, least, most = (f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in figures)
    return f"{median} ({least}-{most})"


def _speed(values: Sequence[float]) -> Speed | None:
    return (statistics.median(values), min(values), max(values)) if values else None
