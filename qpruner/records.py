"""What the stages leave behind: small JSON records of plain data.

A record vouches for the files of its stage and carries the figures that the report shows. `digest` is the digest of
everything the stage depended on; a stage whose record has the digest it would use now is skipped.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of every record."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    seconds: float


class PrepareRecord(Record):
    """The base model as a local or hub checkpoint, and the encoded rows."""

    model_path: str
    converted: bool
    num_rows: dict[str, int]


class LayerWidths(BaseModel):
    """What is kept of one block, as indices into the base model; empty where the whole block went."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


class SensitivityRecord(Record):
    """Mutual information of each group with the prediction, in nats, less its shuffled-label baseline."""

    estimator: str
    source: str
    bias: str
    num_positions: int
    num_classes: int
    groups: tuple[str, ...]
    mutual_information_nats: tuple[float, ...]
    raw_nats: tuple[float, ...]
    baseline_nats: tuple[float, ...]


class BankRecord(Record):
    """Packed weights and adapter starts for every (group, bits)."""

    files: dict[str, str]
    """File name -> sha256."""
    bytes: int
    residual_ratio: dict[str, dict[str, float]]
    """bits -> group -> Frobenius norm of W - Q - BA over that of W - Q."""


def is_control(origin: str) -> bool:
    """Whether a plan of this origin is a control: a uniform plan or a seed, not a searcher's proposal."""
    return origin.startswith(("uniform-", "seed-"))


class RungResult(BaseModel):
    """A trial's score at one rung."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    loss: float
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    train_loss: float | None = None


class TrialRecord(BaseModel):
    """One plan's life in the search. `index` counts suggestions from 0; records, not Tune's snapshot, are the truth."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    digest: str
    origin: str
    """`uniform-4`, `seed-mutual-information`, ... for controls; the searcher's name otherwise."""
    plan: dict[str, int]
    plan_bytes: int
    mean_bits: float
    status: Literal["running", "finished", "stopped", "failed"]
    rungs: tuple[RungResult, ...] = ()
    reason: str | None = None
    seconds: float = 0.0
    kills: int = 0
    """Times that Ray killed workers for memory while this trial ran."""

    @property
    def is_control(self) -> bool:
        return is_control(self.origin)


class Confirmation(BaseModel):
    """A finished trial scored again on the confirmation rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    loss: float
    stderr: float


class SearchRecord(Record):
    """The outcome of the search; the trials' own records lie under `trials/<trials_digest>/`."""

    trials_digest: str
    searcher: str
    budget_bytes: int
    num_trials: int
    num_finished: int
    num_stopped: int
    num_failed: int
    confirmations: tuple[Confirmation, ...]
    best_index: int
    best_origin: str
    best_plan: dict[str, int]
    resumed: int
    """Trials that an earlier, interrupted run had already recorded."""


class CandidateRecord(Record):
    """One row of the final table, fine-tuned."""

    name: str
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
    peak_memory_bytes: int
    memory_counter: str


class FinetuneRecord(Record):
    """The winner's adapter and, with `finetune.compare`, the other rows'."""

    winner: str
    candidates: tuple[CandidateRecord, ...]


class TaskScore(BaseModel):
    """An lm-eval accuracy. Per-question values are kept, in the task's order, so that rows can be paired."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    task: str
    metric: str
    value: float
    stderr: float
    num_questions: int
    correct: tuple[float, ...]
    """1 or 0 a question."""
    answer_loss: tuple[float, ...] = ()
    """Negative log-likelihood of the right choice in nats, a question; empty where the task has no choices."""


class EvalRecord(Record):
    """Accuracies of every row on the held-out tasks: before any fine-tune, and after."""

    # The standard error of a single question is NaN.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    scores: dict[str, tuple[TaskScore, ...]]


class Results(BaseModel):
    """Every record of a run; None for stages that have not run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prepare: PrepareRecord
    prune: PruneRecord | None = None
    sensitivity: SensitivityRecord | None = None
    bank: BankRecord | None = None
    search: SearchRecord | None = None
    finetune: FinetuneRecord | None = None
    evaluate: EvalRecord | None = None


def digest_of(*parts: Any) -> str:
    """A sha256 over canonical JSON; the first 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be part of a digest")
