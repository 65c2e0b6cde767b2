"""Computes the figures of a run from its records: the rows of the final table and the accuracy on each task."""

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
    TaskScore,
)
from qpruner.runs.run_dir import RunDir

BASE, PRUNED, BEST_SEED, RANDOM, SEARCHED = "base", "pruned", "best seed", "random", "searched"
UNIFORM = "uniform"
"""Origin of the rows whose groups are all at the same bits."""
MUTUAL_INFORMATION = "mutual_information"
FineTune = tuple[CandidateRecord, RowScores]
"""A row under one training seed, and what was measured of it."""
Turns = tuple[float, float, float]
"""Median, least and most over the turns of a row's models."""


@dataclass(frozen=True)
class Row:
    """One row of the final table: means over its fine-tunes, and their standard deviation (None with one) as spread.

    Fine-tunes of a row differ by the training seed, those of the random row by the plan, too. Losses are in nats per
    token, answer losses in nats per answer (None where a task has no choices); the standard error of the accuracy is
    over questions. The name is the records', the title people's; a plan is a bar of a character a group.
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
    prefill_tokens_per_second: Turns | None
    decode_tokens_per_second: Turns | None


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


def rows(results: Results) -> list[Row]:
    """Compute the rows in the order of the fine-tunes; the title of a plan that is the best seed's says so."""
    return _rows(results, fine_tunes(results))


def under_first_seed(results: Results) -> list[Row]:
    """Compute the same rows under the first training seed alone, which every row had."""
    first = min(record.seed for record in results.candidates)
    alone = {name: [each for each in tuned if each[0].seed == first] for name, tuned in fine_tunes(results).items()}
    return _rows(results, alone)


def beside_base(results: Results) -> tuple[list[Row], str]:
    """Return the rows searched, base and pruned that exist, under the seed that each had; and that seed in words.

    The words are empty where no row had several seeds.
    """
    alike = {row.name: row for row in under_first_seed(results)}
    found = [alike[name] for name in (SEARCHED, BASE, PRUNED) if name in alike]
    several = any(len(row.seeds) > 1 for row in rows(results))
    return found, f" under training seed {found[0].seeds[0]}" if several else ""


def title_of(name: str, search: SearchRecord | None) -> str:
    """Return a row's name for people: a plan that no search found is not called searched."""
    if name != SEARCHED or search is None:
        return name
    if search.best_origin == GIVEN:
        known = (each.origin for each in search.confirmations if each.index == search.best_index and each.control)
        return "".join(["given plan", *(f" ({origin})" for origin in known)])
    return f"winner ({search.best_origin})" if search.control_won else name


def model_title(row: RowScores, search: SearchRecord | None) -> str:
    """Return the same, and tell a model before any fine-tune from the row of that name."""
    title = title_of(row.name, search)
    return f"{title} (no fine-tune)" if row.seed is None else title


def fine_tunes(results: Results) -> dict[str, list[FineTune]]:
    """Group the fine-tunes by row, in the order of their records."""
    scored = [row for row in results.scores if row.seed is not None]
    found: dict[str, list[FineTune]] = {}
    for each in zip(results.candidates, scored, strict=True):
        found.setdefault(each[0].name, []).append(each)
    return found


def untuned_accuracies(results: Results) -> dict[str, float]:
    """Return the accuracies of base and pruned model before any fine-tune."""
    untuned = [row for row in results.scores if row.seed is None and row.name in (BASE, PRUNED)]
    return {row.name: measures.over_tasks([score.correct for score in row.scores]).mean for row in untuned}


def _rows(results: Results, by_name: dict[str, list[FineTune]]) -> list[Row]:
    found = [_row(title_of(name, results.search), tuned) for name, tuned in by_name.items()]
    best = [row.plans for row in found if row.name == BEST_SEED]
    apart = (BASE, PRUNED, BEST_SEED, RANDOM, SEARCHED)
    return [
        replace(row, title=f"{row.title} = {BEST_SEED}") if row.name not in apart and row.plans in best else row
        for row in found
    ]


def _row(title: str, found: list[FineTune]) -> Row:
    tuned, evaluated = [record for record, _ in found], [row for _, row in found]
    correct = [[score.correct for score in row.scores] for row in evaluated]
    answer_losses = [[score.answer_loss for score in row.scores] for row in evaluated]
    have_choices = all(all(tasks) for tasks in answer_losses)
    taken = list(dict.fromkeys(row.inference for row in evaluated if row.inference))
    validation, validation_spread = _mean_spread([record.validation_loss for record in tuned])
    confirmation, confirmation_spread = _mean_spread([record.confirmation_loss for record in tuned])
    accuracy, accuracy_spread = _mean_spread([measures.over_tasks(tasks).mean for tasks in correct])
    answers = [measures.over_tasks(tasks).mean for tasks in answer_losses] if have_choices else []
    perplexities = [math.exp(row.text_loss) for row in evaluated if row.text_loss is not None]
    answer_loss, answer_loss_spread = _mean_spread(answers) if answers else (None, None)
    perplexity, perplexity_spread = _mean_spread(perplexities) if perplexities else (None, None)
    return Row(
        name=tuned[0].name,
        title=title,
        origin=tuned[0].origin,
        seeds=tuple(dict.fromkeys(record.seed for record in tuned)),
        plans=tuple(dict.fromkeys(str(PrecisionPlan.from_dict(record.plan)) for record in tuned)),
        num_parameters=tuned[0].num_parameters,
        measured_bytes=round(statistics.fmean(record.measured_bytes for record in tuned)),
        mean_bits=statistics.fmean(record.mean_bits for record in tuned),
        peak_memory_bytes=max(record.peak_memory_bytes for record in tuned),
        validation_loss=validation,
        validation_loss_spread=validation_spread,
        confirmation_loss=confirmation,
        confirmation_loss_spread=confirmation_spread,
        accuracy=accuracy,
        accuracy_spread=accuracy_spread,
        accuracy_stderr=measures.over_tasks(measures.averaged(correct)).stderr,
        answer_loss=answer_loss,
        answer_loss_spread=answer_loss_spread,
        perplexity=perplexity,
        perplexity_spread=perplexity_spread,
        inference_memory_bytes=max((each.memory_bytes for each in taken), default=None),
        prefill_tokens_per_second=_median_range([turn for each in taken for turn in each.prefill_tokens_per_second]),
        decode_tokens_per_second=_median_range([turn for each in taken for turn in each.decode_tokens_per_second]),
    )


def _mean_spread(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _median_range(values: Sequence[float]) -> Turns | None:
    return (statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class TaskAccuracy:
    """A row's accuracy on one task: the mean over training seeds and its 95 % interval over questions."""

    row: str
    is_before: bool
    value: float
    low: float
    high: float
    num_seeds: int
    num_questions: int


def task_accuracies(results: Results) -> dict[tuple[str, str], list[TaskAccuracy]]:
    """Return every row's accuracy by task and metric, before any fine-tune and after, in the order of the rows."""
    scores: dict[tuple[str, str], dict[tuple[str, bool], list[TaskScore]]] = {}
    for row in results.scores:
        title = model_title(row, results.search), row.seed is None
        for score in row.scores:
            scores.setdefault((score.task, score.metric), {}).setdefault(title, []).append(score)
    return {task: [_accuracy(*title, found) for title, found in by_row.items()] for task, by_row in scores.items()}


def _accuracy(row: str, is_before: bool, scores: list[TaskScore]) -> TaskAccuracy:
    value = statistics.fmean(score.value for score in scores)
    stderr = measures.over_tasks(measures.averaged([[score.correct] for score in scores])).stderr
    half_width = 0.0 if math.isnan(stderr) else measures.Z_95 * stderr
    low, high = max(0.0, value - half_width), min(1.0, value + half_width)
    return TaskAccuracy(row, is_before, value, low, high, len(scores), scores[0].num_questions)
