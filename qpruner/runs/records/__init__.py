"""Records of a run: small JSON files with the results of its stages.

The record of a stage is written last, so its presence shows that the files of the stage are
complete. Its `digest` identifies all inputs of the stage: while they stay the same, the stage is
skipped.
"""

from typing import Any, Literal, TypeVar

from pydantic import model_validator

from qpruner.runs.records.base import RUN_ID as RUN_ID
from qpruner.runs.records.base import Record as Record
from qpruner.runs.records.base import Recorded as Recorded
from qpruner.runs.records.base import StandardError as StandardError
from qpruner.runs.records.base import digest_of as digest_of
from qpruner.runs.records.base import flat as flat
from qpruner.runs.records.search import BASE as BASE
from qpruner.runs.records.search import BEST_SEARCHED as BEST_SEARCHED
from qpruner.runs.records.search import GIVEN as GIVEN
from qpruner.runs.records.search import OF_EVERY_CUT as OF_EVERY_CUT
from qpruner.runs.records.search import PAPER as PAPER
from qpruner.runs.records.search import PRUNED as PRUNED
from qpruner.runs.records.search import RANDOM as RANDOM
from qpruner.runs.records.search import SEARCHED as SEARCHED
from qpruner.runs.records.search import Begun as Begun
from qpruner.runs.records.search import Finalist as Finalist
from qpruner.runs.records.search import FreshScore as FreshScore
from qpruner.runs.records.search import RungAgreement as RungAgreement
from qpruner.runs.records.search import RungResult as RungResult
from qpruner.runs.records.search import SearchClock as SearchClock
from qpruner.runs.records.search import SearchRecord as SearchRecord
from qpruner.runs.records.search import TrialPulse as TrialPulse
from qpruner.runs.records.search import TrialRecord as TrialRecord
from qpruner.runs.records.search import is_control as is_control
from qpruner.runs.records.serving import ServedForm as ServedForm
from qpruner.runs.records.serving import ServedRow as ServedRow
from qpruner.runs.records.serving import ServeRecord as ServeRecord
from qpruner.runs.records.serving import ServeSetting as ServeSetting

RecordType = TypeVar("RecordType", bound=Record)


class PrepareRecord(Record):
    """Where the base model is, and how many rows of data were encoded."""

    model_path: str
    converted: bool
    num_rows: dict[str, int]


class LayerWidths(Recorded):
    """The key/value groups and MLP channels that a block keeps, by their index in the base model.

    A block that is removed keeps none.
    """

    layer: int
    kept_kv_groups: tuple[int, ...]
    kept_mlp_channels: tuple[int, ...]
    base_kv_groups: int
    base_mlp_channels: int
    heads_per_group: int
    base_parameters: int
    kept_parameters: int


class CutRecord(Record):
    """A cut of the base model and how it was made."""

    importance: str
    selection: str
    compensation: str
    target: str
    """The requested share, such as `target 20.00% of all parameters`."""
    achieved_rate: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    peak_memory_bytes: int
    """Peak memory of pruning, less the memory of the loaded model."""
    memory_counter: str
    dropped_blocks: tuple[int, ...]
    layers: tuple[LayerWidths, ...]
    weights: str = ""
    """Digest of the weight files; another kind of machine may compute slightly different weights.
    """
    multiply_adds: int
    """Multiply-adds per token, of the layers in blocks and of the head."""
    loss: float
    """Loss on the rows for sensitivities right after the cut, in nats per token."""

    @property
    def achieved(self) -> str:
        """The share of all parameters that was removed, as text."""
        return f"achieved {self.achieved_rate:.2%}"


class PruneRecord(Record):
    """The cuts of the base model, and those that could not be made."""

    cuts: dict[str, CutRecord]
    """Name -> cut, the one that removes least first; `base` is the model as it was."""
    left_out: dict[str, str] = {}
    """Name of a cut that could not be made -> the reason."""


class MethodScores(Recorded):
    """The sensitivities of all groups, as found by one method (see `SensitivityRecord`)."""

    unit: str
    values: dict[str, tuple[float | None, ...]]
    """Format -> for each group, its predicted damage to the unquantized pruned model, in `unit`; 0
    in bf16.

    None if the group does not take the format.
    """
    seconds: float


class SensitivityRecord(Record):
    """How much each group of layers damages the model in each format, by every requested method."""

    groups: tuple[str, ...]
    methods: dict[str, MethodScores]


class BankRecord(Record):
    """The packed weights and initial adapters of every group in every format."""

    cut: str = "base"
    """The cut that removes least, whose entries these are."""
    left_out: dict[str, str] = {}
    """Name of a cut whose widths the formats cannot hold -> the reason."""
    files: dict[str, str]
    """File name -> sha256."""
    bytes: int
    residual_ratio: dict[str, dict[str, float]]
    """Format -> group -> norm of W - Q - BA (under GPTQ, of the outputs it makes), divided by that
    of W - Q."""
    error: dict[str, dict[str, float]] = {}
    """Format -> group -> squared norm of W - Q - BA (as above), divided by that of W."""


class CandidateRecord(Record):
    """One fine-tune, under one training seed, of a model in the run's final table."""

    name: str
    origin: str
    """Source of the plan, such as a searcher and its trial, or a sensitivity."""
    seed: int
    cut: str = "base"
    plan: dict[str, str]
    plan_bytes: int
    """Bytes of the whole quantized model with its adapter, computed from the plan."""
    measured_bytes: int
    """Bytes of the packed tensors of the model with its adapter, as measured."""
    mean_bits: float
    num_parameters: int
    steps: int
    train_loss: float
    confirmation_loss: float
    """Nats per token on the half of the `data.confirmation` rows that did not select the winner."""
    confirmation_losses: tuple[float, ...]
    """Loss of each row behind `confirmation_loss`, to compare two models row by row."""
    peak_memory_bytes: int
    memory_counter: str
    adapter_sha256: str = ""
    bank: str = ""
    """Digest of the inputs of the bank by whose Gram matrices GPTQ rounded the weights; empty
    without GPTQ."""


class FinetuneRecord(Record):
    """The fine-tune of the winner, whose adapter is part of the final model."""

    winner: str
    candidates: tuple[CandidateRecord, ...]


class TaskScore(Recorded):
    """The accuracy on an lm-eval task.

    It has the values of all questions, to compare two models question by question.
    """

    task: str
    metric: str
    """The first of `acc_norm`, `acc` and `exact_match` that the task reports; `METRIC,FILTER` if it
    filters answers."""
    value: float
    stderr: StandardError
    num_questions: int
    correct: tuple[float, ...]
    """1 or 0 for each question by `metric`, in the order of the task."""
    answer_loss: tuple[float, ...] = ()
    """Negative log-likelihood of the right choice for each question, in nats; empty if the task has
    no choices."""


class Inference(Recorded):
    """Memory and speed of a model with its adapter while it generates one sequence."""

    memory_bytes: int
    prefill_tokens_per_second: tuple[float, ...]
    """One value per turn; in every turn each model is measured once."""
    decode_tokens_per_second: tuple[float, ...]


class InferenceSetting(Recorded):
    """How the values of `Inference` were measured."""

    device: str
    prompt_tokens: int
    new_tokens: int
    memory_counter: str


class RowScores(Recorded):
    """Scores of one model on the held-out tasks."""

    digest: str
    name: str
    seed: int | None
    """The training seed; None if the model was not fine-tuned."""
    scores: tuple[TaskScore, ...]
    text_loss: float | None = None
    """Loss on the held-out text, in nats per token; None if there is no such text."""
    inference: Inference | None = None
    gpu_seconds: float = 0.0


class EvalRecord(Record):
    """Scores on the held-out tasks: of models before any fine-tune, and of the winner.

    The former are the base, the pruned and the quantized model.
    """

    rows: tuple[RowScores, ...]
    text: str | None = None
    """Description of the held-out text behind `RowScores.text_loss`."""
    inference: InferenceSetting | None = None
    tested: str
    """Digest of the questions and their prompts."""

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the metric of its scores."""
        return {score.task: score.metric for score in self.rows[-1].scores}


class ComparisonRecord(Record):
    """The winner and the models compared with it, all after the same fine-tune.

    They are sorted by model, then by training seed.
    """

    candidates: tuple[CandidateRecord, ...]
    rows: tuple[RowScores, ...]
    """Scores of `candidates`, in the same order."""
    inference: InferenceSetting | None = None


class StageState(Recorded):
    """The progress of a stage in the latest command."""

    state: Literal["running", "done", "recorded"]
    """`recorded`: skipped, because an earlier command recorded the stage."""
    started: float
    """Unix seconds."""
    seconds: float | None = None
    done: int | None = None
    total: int | None = None
    text: str = ""
    """The present step, or the main results once the stage is done."""


class SearchState(Recorded):
    """The settings of the search that the latest command runs."""

    trials_digest: str
    search: str
    """Digest of the search, as in `TrialRecord.search`."""
    metric: Literal["loss", "accuracy"]
    metrics: dict[str, str] = {}
    budget_bytes: int
    may_win: tuple[str, ...] = ()
    """Cuts whose plans may win (see `quantize.budget.flops_fraction`); empty: all."""
    max_trials: int
    steps: int
    slots: int | None = None
    """Trials that can run at once; None if no trial had to run."""


class RunState(Recorded):
    """`run.json`: the state of the latest command on a run folder, for other processes to read."""

    config: dict[str, Any]
    flow: tuple[str, ...]
    """The stages that the configuration asks for, in order."""
    asked: tuple[str, ...]
    """Those stages of `flow` that the command runs."""
    until: str
    """The last stage that the command runs."""
    command: str
    folder: str
    environment: dict[str, str]
    """Versions of Python and of packages, and a description of the machine."""
    host: str
    pid: int
    started: float
    updated: float
    """When this file was last written, in Unix seconds."""
    outcome: Literal["running", "done", "failed", "interrupted"]
    error: str | None = None
    resumed: int = 0
    """Number of earlier commands on this folder that did not finish."""
    stages: dict[str, StageState] = {}
    search: SearchState | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Take the stages that began for `flow` and `asked`, which older runs did not record."""
        begun = tuple(fields.get("stages", ()))
        return {"flow": begun, "asked": begun, **fields}

    @property
    def compares(self) -> bool:
        """Whether the command also fine-tunes the models that the winner is compared with.

        The key `finetune.compare` asks for this.
        """
        return "comparison" in self.flow


MARK = "qpruner_export.json"
"""File name of the `ExportRecord` in the folder of an export."""


class ExportRecord(Recorded):
    """Identifies the final model that an export was made from."""

    final: dict[str, str]
    """File name -> sha256, for the files that differ between final models."""


class Results(Recorded):
    """The records of all stages in the order of the flow; None for stages that have not run."""

    prepare: PrepareRecord | None = None
    prune: PruneRecord | None = None
    bank: BankRecord | None = None
    sensitivity: SensitivityRecord | None = None
    search: SearchRecord | None = None
    finetune: FinetuneRecord | None = None
    evaluate: EvalRecord | None = None
    comparison: ComparisonRecord | None = None
    serve: ServeRecord | None = None

    def get(self, kind: type[RecordType]) -> RecordType:
        """Return the record of this class, which its stage has made."""
        return next(record for _, record in self if isinstance(record, kind))

    @property
    def left_out(self) -> dict[str, str]:
        """Name of a cut that cannot be made, or not be packed -> the reason."""
        pruning = self.prune.left_out if self.prune else {}
        packing = self.bank.left_out if self.bank else {}
        return {**pruning, **packing}

    @property
    def candidates(self) -> tuple[CandidateRecord, ...]:
        """The fine-tuned models: the winner and, after stage comparison, those compared with it."""
        record = self.comparison or self.finetune
        return record.candidates if record else ()

    @property
    def scores(self) -> tuple[RowScores, ...]:
        """Scores on the held-out tasks.

        Models without a fine-tune come first, then the `candidates`.
        """
        rows = self.evaluate.rows if self.evaluate else ()
        if self.comparison is None:
            return rows
        return (*(row for row in rows if row.seed is None), *self.comparison.rows)

    @property
    def inference(self) -> InferenceSetting | None:
        """The settings with which the memory and speed of the `candidates` were measured."""
        record = self.comparison or self.evaluate
        return record.inference if record else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each recorded stage took."""
        seconds = {name: record.seconds for name, record in self if record}
        return seconds | ({"search": self.search.total_seconds} if self.search else {})

    @property
    def gpu_seconds(self) -> dict[str, float]:
        """GPU seconds that each recorded stage used."""
        seconds = {name: record.gpu_seconds for name, record in self if record}
        return seconds | ({"search": self.search.total_gpu_seconds} if self.search else {})
