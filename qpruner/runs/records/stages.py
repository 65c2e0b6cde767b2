"""Records of the stages besides the search: base and pruned model, bank, sensitivities, fine-tunes, scores on tasks."""

from __future__ import annotations

from typing import Any, ClassVar

from qpruner.runs.records.base import Record, Recorded, StandardError


class PrepareRecord(Record):
    """The base model as a local or hub checkpoint, and the encoded rows."""

    model_path: str
    converted: bool
    source_bytes: int | None = None
    """Of the .gguf file that the base's weights were expanded from."""
    num_rows: dict[str, int]


class LayerWidths(Recorded):
    """What is kept of one block, as indices into the base model; empty where the whole block went."""

    layer: int
    kept_kv_groups: tuple[int, ...]
    kept_mlp_channels: tuple[int, ...]
    """Where experts are stacked: expert * channels + channel."""
    kept_experts: tuple[int, ...] | None = None
    base_kv_groups: int
    base_mlp_channels: int
    base_experts: int | None = None
    heads_per_group: int
    base_parameters: int
    kept_parameters: int


class PruneRecord(Record):
    """The pruned checkpoint."""

    listed: ClassVar[str] = "layers"
    importance: str
    selection: str
    compensation: str
    target: str
    target_rate: float | None
    """Share of all parameters asked for; None when each block's own share was."""
    achieved_rate: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    peak_memory_bytes: int
    """Above the loaded model."""
    memory_counter: str
    dropped_blocks: tuple[int, ...]
    layers: tuple[LayerWidths, ...]
    weights: str = ""
    """Digest of its weight files: from the same inputs another kind of machine may make others."""

    @property
    def achieved(self) -> str:
        """The achieved rate in words."""
        return f"achieved {self.achieved_rate:.2%}"


class MethodScores(Recorded):
    """One sensitivity of every group."""

    unit: str
    source: str
    values: dict[int, tuple[float, ...]]
    """Bits -> predicted rise over the unquantized pruned model, a group; 0 at 16 bits."""
    seconds: float
    details: dict[str, Any]

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a group, in the order of `SensitivityRecord.groups`."""
        names = [f"at {bits} bits" for bits in self.values]
        return [dict(zip(names, of_group, strict=True)) for of_group in zip(*self.values.values(), strict=True)]


class SensitivityRecord(Record):
    """How much each group suffers at fewer bits, by every method asked for. The byte budget is not among the inputs."""

    groups: tuple[str, ...]
    methods: dict[str, MethodScores]

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a group, with every method's scores."""
        rows: list[dict[str, Any]] = [{"group": group} for group in self.groups]
        for name, method in self.methods.items():
            for row, scores in zip(rows, method.table_rows(), strict=True):
                row |= {f"{name} {column}": value for column, value in scores.items()}
        return rows


class BankRecord(Record):
    """Packed weights and adapter starts for every (group, bits)."""

    files: dict[str, str]
    """File name -> sha256."""
    bytes: int
    residual_ratio: dict[str, dict[str, float]]
    """bits -> group -> Frobenius norm of W - Q - BA over that of W - Q."""
    group_bytes: dict[str, dict[str, int]] = {}
    """bits -> group -> bytes of its packed weights, for all levels of the search."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a group."""
        rows: dict[str, dict[str, Any]] = {}
        for told in ("group_bytes", "residual_ratio"):
            for bits, by_group in getattr(self, told).items():
                for group, value in by_group.items():
                    rows.setdefault(group, {"group": group})[f"{told} at {bits} bits"] = value
        return list(rows.values())


class CandidateRecord(Record):
    """One row of the final table under one training seed, fine-tuned."""

    name: str
    origin: str
    """Where the plan came from: a searcher and its trial, a sensitivity, ..."""
    seed: int
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
    """A value a row, to pair two models by row: their mean is the loss, their spread its standard error."""
    peak_memory_bytes: int
    memory_counter: str
    adapter_sha256: str = ""


class FinetuneRecord(Record):
    """The winner's fine-tune, whose adapter the final model has."""

    listed: ClassVar[str] = "candidates"
    winner: str
    candidates: tuple[CandidateRecord, ...]


class MetricScore(Recorded):
    """A metric of an lm-eval task."""

    value: float
    stderr: StandardError
    """Of the mean over questions; null where the metric is no such mean."""


class TaskScore(Recorded):
    """An lm-eval accuracy. Per-question values are kept, in the task's order, so that rows can be paired."""

    task: str
    metric: str
    """What tables and claims use: `acc_norm` where the task reports it, then `acc`, then `exact_match`."""
    value: float
    stderr: StandardError
    num_questions: int
    correct: tuple[float, ...]
    """1 or 0 a question, by `metric`."""
    metrics: dict[str, MetricScore] = {}
    """Every metric that the task reports, by lm-eval's names (`METRIC,FILTER` where the task filters answers)."""
    answer_loss: tuple[float, ...] = ()
    """Negative log-likelihood of the right choice in nats, a question; empty where the task has no choices."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a question."""
        columns = {"correct": self.correct} | ({"answer_loss": self.answer_loss} if self.answer_loss else {})
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Inference(Recorded):
    """What a row's model takes to generate one sequence, its adapter on."""

    memory_bytes: int
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
    """One row's scores on the held-out tasks, under one training seed; without a seed, before any fine-tune."""

    digest: str
    name: str
    seed: int | None
    scores: tuple[TaskScore, ...]
    text_loss: float | None = None
    """On the held-out text, in nats per token; None without such a text."""
    inference: Inference | None = None
    gpu_seconds: float = 0.0

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
    """Scores on the held-out tasks: base, pruned and quantized before any fine-tune, and the fine-tuned winner."""

    listed: ClassVar[str] = "rows"
    rows: tuple[RowScores, ...]
    text: str | None = None
    """Which held-out text `RowScores.text_loss` is on."""
    inference: InferenceSetting | None = None
    tested: str
    """Digest of the questions and of how they are asked."""

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the metric that tables and claims use."""
        return {score.task: score.metric for score in self.rows[-1].scores}


class ComparisonRecord(Record):
    """Every row of the final table after the same fine-tune, the winner's own too, by row and then by training seed."""

    candidates: tuple[CandidateRecord, ...]
    rows: tuple[RowScores, ...]
    """In the same order."""
    inference: InferenceSetting

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a fine-tune, with its scores."""
        pairs = zip(self.candidates, self.rows, strict=True)
        return [scores.table_rows()[0] | tuned.table_rows()[0] for tuned, scores in pairs]
