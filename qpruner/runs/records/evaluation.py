"""Records of the final table: fine-tunes, and scores on the held-out tasks."""

from __future__ import annotations

from typing import Any

from qpruner.runs.records.base import Record, Recorded, StandardError


class CandidateRecord(Record):
    """One row of the final table under one training seed, fine-tuned."""

    name: str
    origin: str
    """Where the plan came from: a searcher and its trial, a sensitivity, ..."""
    seed: int
    """Of data order and dropout."""
    plan: dict[str, int]
    plan_bytes: int
    """By the formula."""
    measured_bytes: int
    """Of the packed tensors."""
    mean_bits: float
    num_parameters: int
    steps: int
    train_loss: float
    validation_loss: float
    confirmation_loss: float
    """On the half of the confirmation rows that chose nothing, in nats per token."""
    confirmation_losses: tuple[float, ...] = ()
    """What each of these rows says of it, so that two models can be paired by row: no losses of rows, but values whose
    mean is the loss and whose spread its standard error, although rows have more and fewer tokens; they may lie below
    zero."""
    peak_memory_bytes: int
    memory_counter: str
    adapter_sha256: str = ""
    """Of its weights."""


class FinetuneRecord(Record):
    """The winner's fine-tune, whose adapter the final model has."""

    winner: str
    candidates: tuple[CandidateRecord, ...]

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a fine-tune."""
        return [row for each in self.candidates for row in each.table_rows()]


class MetricScore(Recorded):
    """A metric of an lm-eval task."""

    value: float
    """As lm-eval aggregates it."""
    stderr: StandardError
    """Of the mean over questions; null where the metric is no such mean, too."""


class TaskScore(Recorded):
    """An lm-eval accuracy. Per-question values are kept, in the task's order, so that rows can be paired."""

    task: str
    metric: str
    """The one that tables and claims use: `acc_norm` where the task reports it, then `acc`, then `exact_match`; in a
    trial the one that `search.metric` names."""
    value: float
    stderr: StandardError
    num_questions: int
    correct: tuple[float, ...]
    """1 or 0 a question, by `metric`."""
    metrics: dict[str, MetricScore] = {}
    """Every metric that the task reports, by lm-eval's names (`METRIC,FILTER` where the task filters answers)."""
    answer_loss: tuple[float, ...] = ()
    """Negative log-likelihood of the right choice in nats, a question (its tokens added up, no mean); empty where the
    task has no choices."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a question."""
        columns = {"correct": self.correct} | ({"answer_loss": self.answer_loss} if self.answer_loss else {})
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Inference(Recorded):
    """What a row's model takes to use, its adapter on, in a generation of one sequence."""

    memory_bytes: int
    """At the highest point."""
    prefill_tokens_per_second: tuple[float, ...]
    """In each turn; the rows took turns."""
    decode_tokens_per_second: tuple[float, ...]


class InferenceSetting(Recorded):
    """How `Inference` was measured."""

    device: str
    prompt_tokens: int
    new_tokens: int
    memory_counter: str


class RowScores(Recorded):
    """One row's scores on the held-out tasks, under one training seed.

    Without a seed: before any fine-tune, with quantized layers and their adapter start.
    """

    digest: str
    name: str
    seed: int | None
    scores: tuple[TaskScore, ...]
    text_loss: float | None = None
    """On the held-out text, in nats per token; None without such a text."""
    inference: Inference | None = None
    """Of fine-tuned rows."""
    gpu_seconds: float = 0.0
    """Seconds that the scoring held GPUs, times how many."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row, with every metric of each task and its standard error."""
        [row] = super().table_rows()
        del row["scores"]
        for score in self.scores:
            used = {score.metric: MetricScore(value=score.value, stderr=score.stderr)}
            for name, each in (used | score.metrics).items():
                row |= {f"{score.task} {name}": each.value, f"{score.task} {name}_stderr": each.stderr}
        return [row]


class EvalRecord(Record):
    """Accuracies on the held-out tasks: base, pruned and quantized before any fine-tune, and the fine-tuned winner."""

    rows: tuple[RowScores, ...]
    text: str | None = None
    """Which held-out text `RowScores.text_loss` is on."""
    inference: InferenceSetting | None = None
    tested: str = ""
    """Digest of the questions and of how they are asked."""

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the metric that tables and claims use."""
        return {score.task: score.metric for score in self.rows[-1].scores}

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a model and training seed that was scored."""
        return [row for each in self.rows for row in each.table_rows()]


class ComparisonRecord(Record):
    """Every row of the final table after the same fine-tune, the winner's own too, by row and then by training seed."""

    candidates: tuple[CandidateRecord, ...]
    rows: tuple[RowScores, ...]
    """Their scores on the held-out tasks, in the same order."""
    inference: InferenceSetting
    """Of all rows, which took turns: the winner's figures stand beside those measured in the same minutes."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a fine-tune, with its scores."""
        pairs = zip(self.candidates, self.rows, strict=True)
        return [scores.table_rows()[0] | tuned.table_rows()[0] for tuned, scores in pairs]
