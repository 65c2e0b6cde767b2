"""Computes the rows of a run's final table from its records."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qpruner.data import measures
from qpruner.plans.plan import plan_of
from qpruner.runs.records import SEARCHED, FineTune, Results, StandardError
from qpruner.search.roles import title_of

Speed = tuple[float, float, float]
"""Median, minimum and maximum of a row's repeated speed measurements, in tokens per second."""


@dataclass(frozen=True)
class TableRow:
    """One row of the final table: a plan, fine-tuned under one or more training seeds.

    The row `random` has several plans. Figures are means over these fine-tunes, and `..._spread` is
    their standard deviation; memory is a maximum. Losses are in nats per token, answer losses in
    nats per answer (None if a task has no choices). `accuracy_stderr` is the standard error over
    questions. Records refer to a row by its `name`, and reports show its `title`. A plan is written
    with one character per group.
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


def rows(results: Results) -> list[TableRow]:
    """Compute the rows of the final table, in the order of `by_row`."""
    return [_row(title_of(name, results.search), tuned) for name, tuned in by_row(results).items()]


def winner_row(results: Results) -> TableRow:
    """Compute the winner's row of the final table."""
    return next(row for row in rows(results) if row.name == SEARCHED)


def by_row(results: Results) -> dict[str, list[FineTune]]:
    """Group the run's fine-tunes by the name of their row, in the order of the records."""
    rows: dict[str, list[FineTune]] = {}
    for tuned in results.fine_tunes:
        rows.setdefault(tuned.name, []).append(tuned)
    return rows


def _row(title: str, tuned: Sequence[FineTune]) -> TableRow:
    first = tuned[0]
    correct = [[task.correct for task in record.tasks] for record in tuned]
    accuracy = _over_seeds([measures.over_tasks(tasks).mean for tasks in correct])
    confirmation_loss = _over_seeds([record.confirmation.mean for record in tuned])
    answer_loss = _over_seeds(answer_losses(tuned))
    perplexity = _over_seeds(perplexities(tuned))
    # Fine-tunes of the same plan share their measurement.
    timings = list(dict.fromkeys(record.inference for record in tuned if record.inference))
    assert accuracy.mean is not None and confirmation_loss.mean is not None
    return TableRow(
        name=first.name,
        title=title,
        origin=first.origin,
        cut=first.cut,
        seeds=tuple(dict.fromkeys(record.seed for record in tuned if record.seed is not None)),
        plans=tuple(dict.fromkeys(str(plan_of(record)) for record in tuned)),
        num_parameters=first.num_parameters,
        measured_bytes=round(statistics.fmean(record.measured_bytes for record in tuned)),
        mean_bits=statistics.fmean(record.mean_bits for record in tuned),
        peak_memory_bytes=max(record.peak_memory_bytes for record in tuned),
        confirmation_loss=confirmation_loss.mean,
        confirmation_loss_spread=confirmation_loss.spread,
        accuracy=accuracy.mean,
        accuracy_spread=accuracy.spread,
        accuracy_stderr=measures.over_tasks(measures.averaged(correct)).stderr,
        answer_loss=answer_loss.mean,
        answer_loss_spread=answer_loss.spread,
        perplexity=perplexity.mean,
        perplexity_spread=perplexity.spread,
        inference_memory_bytes=max((timing.memory_bytes for timing in timings), default=None),
        prefill_tokens_per_second=_speed(timing.prefill_tokens_per_second for timing in timings),
        decode_tokens_per_second=_speed(timing.decode_tokens_per_second for timing in timings),
    )


class _OverSeeds(NamedTuple):
    """Mean and standard deviation of a figure over fine-tunes, None where there are too few."""

    mean: float | None
    spread: float | None


def _over_seeds(values: Sequence[float]) -> _OverSeeds:
    return _OverSeeds(
        mean=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
    )


def answer_losses(tuned: Sequence[FineTune]) -> list[float]:
    """Return the mean answer loss over tasks of each model.

    The list is empty if one of the tasks has no choices.
    """
    losses = [[task.answer_loss for task in record.tasks] for record in tuned]
    if not all(all(tasks) for tasks in losses):
        return []
    return [measures.over_tasks(tasks).mean for tasks in losses]


def perplexities(tuned: Sequence[FineTune]) -> list[float]:
    """Return the perplexity of each model that was scored on a text."""
    return [math.exp(record.text_loss) for record in tuned if record.text_loss is not None]


def speed_text(turns: Sequence[float] | None) -> str:
    """Format speeds: the median and, in brackets, minimum and maximum; `-` if none was measured."""
    if not turns:
        return "-"
    median, least, most = map(_speed_digits, (statistics.median(turns), min(turns), max(turns)))
    return f"{median} ({least}-{most})"


def _speed_digits(speed: float) -> str:
    return f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"


def _speed(turns_by_model: Iterable[Sequence[float]]) -> Speed | None:
    turns = list(itertools.chain.from_iterable(turns_by_model))
    if not turns:
        return None
    return statistics.median(turns), min(turns), max(turns)
