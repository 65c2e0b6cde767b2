"""The final table, from records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from qpruner.data import measures
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.records import (
    GIVEN,
    CandidateRecord,
    Record,
    Results,
    RowScores,
    RunState,
    SearchRecord,
    StandardError,
)
from qpruner.runs.run_dir import RunDir

BASE, PRUNED, BEST_SEED, RANDOM, SEARCHED = "base", "pruned", "best seed", "random", "searched"
UNIFORM = "uniform"
"""Origin of the rows whose groups are all at the same bits."""
MUTUAL_INFORMATION = "mutual_information"
FineTune = tuple[CandidateRecord, RowScores]
"""A row under one training seed, and what was measured of it."""


@dataclass(frozen=True)
class Row:
    """One row of the table: means over its fine-tunes, spreads as their standard deviation (None with one).

    A row's fine-tunes differ by the training seed, and in the random row by the plan besides.

    Attributes:
        name: As the fine-tune has it; `searched` is the winner's, whoever found it.
        title: As people read it.
        origin: Where the plan came from.
        seeds: Training seeds.
        plans: Bits as a bar, one character a group; several where plans are random.
        num_parameters: Without adapters.
        measured_bytes: Of the packed tensors; a mean where plans differ.
        mean_bits: Per grouped weight.
        peak_memory_bytes: The most of any fine-tune.
        validation_loss: In nats per token.
        validation_loss_spread: Over fine-tunes.
        confirmation_loss: In nats per token, on rows that no trial was scored on and that chose nothing.
        confirmation_loss_spread: Over fine-tunes.
        accuracy: Over the held-out tasks, of the metric that `EvalRecord.metrics` names.
        accuracy_spread: Over fine-tunes.
        accuracy_stderr: Over questions.
        answer_loss: Negative log-likelihood of the right answers in nats; None where a task has no choices.
        answer_loss_spread: Over fine-tunes.
        perplexity: On the held-out text; None without one.
        perplexity_spread: Over fine-tunes.
        inference_memory_bytes: The most of a generation.
        prefill_tokens_per_second: Of one sequence: median, least and most over the turns of its models.
        decode_tokens_per_second: The same of the tokens written.
    """

    name: str
    title: str
    origin: str
    seeds: tuple[int, ...]
    plans: tuple[str, ...]
    num_parameters: int
    measured_bytes: int
    mean_bits: float
    peak_memory_bytes: int
    validation_loss: float
    validation_loss_spread: float | None
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
    prefill_tokens_per_second: tuple[float, float, float] | None
    decode_tokens_per_second: tuple[float, float, float] | None


def rows(results: Results) -> list[Row]:
    """The table's rows, in the order of the fine-tunes; a seed or uniform plan that is the best seed's says so."""
    return _rows(results, fine_tunes(results))


def under_first_seed(results: Results) -> list[Row]:
    """The same rows under the first training seed alone, which every row had."""
    first = min(record.seed for record in results.candidates)
    alone = {name: [each for each in tuned if each[0].seed == first] for name, tuned in fine_tunes(results).items()}
    return _rows(results, alone)


def _rows(results: Results, by_name: dict[str, list[FineTune]]) -> list[Row]:
    found = [_row(title_of(name, results.search), tuned) for name, tuned in by_name.items()]
    best = [row.plans for row in found if row.name == BEST_SEED]
    apart = (BASE, PRUNED, BEST_SEED, RANDOM, SEARCHED)
    return [
        replace(row, title=f"{row.title} = {BEST_SEED}") if row.name not in apart and row.plans in best else row
        for row in found
    ]


def title_of(name: str, search: SearchRecord | None) -> str:
    """What people read where the records have a row's name: a plan that no search found is not called searched."""
    if name != SEARCHED or search is None:
        return name
    if search.best_origin == GIVEN:
        known = (each.origin for each in search.confirmations if each.index == search.best_index and each.control)
        return "".join(["given plan", *(f" ({origin})" for origin in known)])
    return f"winner ({search.best_origin})" if search.control_won else name


def model_title(row: RowScores, search: SearchRecord | None) -> str:
    """The same with what tells the model before any fine-tune from the row of that name."""
    title = title_of(row.name, search)
    return f"{title} (no fine-tune)" if row.seed is None else title


def fine_tunes(results: Results) -> dict[str, list[FineTune]]:
    """Row -> its fine-tunes, in the order of their records."""
    scored = [row for row in results.scores if row.seed is not None]
    found: dict[str, list[FineTune]] = {}
    for each in zip(results.candidates, scored, strict=True):
        found.setdefault(each[0].name, []).append(each)
    return found


def untuned_accuracies(results: Results) -> dict[str, float]:
    """Base and pruned model as they are before any fine-tune -> their accuracies."""
    rows = [row for row in results.scores if row.seed is None and row.name in (BASE, PRUNED)]
    return {row.name: measures.over_tasks([score.correct for score in row.scores]).mean for row in rows}


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _row(title: str, found: list[FineTune]) -> Row:
    tuned, evaluated = [record for record, _ in found], [row for _, row in found]
    correct = [[score.correct for score in row.scores] for row in evaluated]
    answer_losses = [[score.answer_loss for score in row.scores] for row in evaluated]
    perplexities = [math.exp(row.text_loss) for row in evaluated if row.text_loss is not None]
    taken = list(dict.fromkeys(row.inference for row in evaluated if row.inference))
    accuracies = [measures.over_tasks(tasks).mean for tasks in correct]
    have_choices = all(all(tasks) for tasks in answer_losses)
    answers = [measures.over_tasks(tasks).mean for tasks in answer_losses] if have_choices else []
    validation = [record.validation_loss for record in tuned]
    confirmation = [record.confirmation_loss for record in tuned]
    bars = (str(PrecisionPlan.from_dict(record.plan)) for record in tuned)
    return Row(
        name=tuned[0].name,
        title=title,
        origin=tuned[0].origin,
        seeds=tuple(dict.fromkeys(record.seed for record in tuned)),
        plans=tuple(dict.fromkeys(bars)),
        num_parameters=tuned[0].num_parameters,
        measured_bytes=round(statistics.fmean(record.measured_bytes for record in tuned)),
        mean_bits=statistics.fmean(record.mean_bits for record in tuned),
        peak_memory_bytes=max(record.peak_memory_bytes for record in tuned),
        validation_loss=statistics.fmean(validation),
        validation_loss_spread=_spread(validation),
        confirmation_loss=statistics.fmean(confirmation),
        confirmation_loss_spread=_spread(confirmation),
        accuracy=statistics.fmean(accuracies),
        accuracy_spread=_spread(accuracies),
        accuracy_stderr=measures.over_tasks(measures.averaged(correct)).stderr,
        answer_loss=statistics.fmean(answers) if answers else None,
        answer_loss_spread=_spread(answers),
        perplexity=statistics.fmean(perplexities) if perplexities else None,
        perplexity_spread=_spread(perplexities),
        inference_memory_bytes=max((each.memory_bytes for each in taken), default=None),
        prefill_tokens_per_second=_median_range([turn for each in taken for turn in each.prefill_tokens_per_second]),
        decode_tokens_per_second=_median_range([turn for each in taken for turn in each.decode_tokens_per_second]),
    )


def _median_range(values: Sequence[float]) -> tuple[float, float, float] | None:
    return (statistics.median(values), min(values), max(values)) if values else None


def read_results(run: RunDir, state: RunState) -> Results:
    """Read the records that the run's latest command made or found; others are of an older configuration.

    Raises:
        CorruptFile: If one cannot be read.
    """
    ended = [name for name in Results.model_fields if name in state.stages and state.stages[name].state != "running"]
    return Results.model_validate({name: run.read_record(name, _record_type(name)) for name in ended})


def _record_type(stage: str) -> type[Record]:
    found: type[Record] = get_args(Results.model_fields[stage].annotation)[0]
    return found
