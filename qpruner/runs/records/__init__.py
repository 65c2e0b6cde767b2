"""Records of a run: small JSON files with the results of its stages.

The record of a stage is written last, so its presence shows that the files of the stage are
complete. Its `digest` identifies all inputs of the stage: while they stay the same, the stage is
skipped.
"""

from typing import Any, Literal, TypeVar

from pydantic import model_validator

from qpruner.quantization.formats import Method
from qpruner.runs.records.base import RUN_ID as RUN_ID
from qpruner.runs.records.base import Record as Record
from qpruner.runs.records.base import Recorded as Recorded
from qpruner.runs.records.base import StandardError as StandardError
from qpruner.runs.records.base import digest_of as digest_of
from qpruner.runs.records.base import flat as flat
from qpruner.runs.records.finetunes import CONFIRMATION as CONFIRMATION
from qpruner.runs.records.finetunes import SELECTION as SELECTION
from qpruner.runs.records.finetunes import VALIDATION as VALIDATION
from qpruner.runs.records.finetunes import FineTune as FineTune
from qpruner.runs.records.finetunes import Inference as Inference
from qpruner.runs.records.finetunes import InferenceSetting as InferenceSetting
from qpruner.runs.records.finetunes import RowLosses as RowLosses
from qpruner.runs.records.finetunes import Score as Score
from qpruner.runs.records.finetunes import ScoredRows as ScoredRows
from qpruner.runs.records.finetunes import TaskScore as TaskScore
from qpruner.runs.records.search import BASE as BASE
from qpruner.runs.records.search import BEST_SEARCHED as BEST_SEARCHED
from qpruner.runs.records.search import GIVEN as GIVEN
from qpruner.runs.records.search import MERGED as MERGED
from qpruner.runs.records.search import OF_EVERY_CUT as OF_EVERY_CUT
from qpruner.runs.records.search import PAPER as PAPER
from qpruner.runs.records.search import PRUNED as PRUNED
from qpruner.runs.records.search import RANDOM as RANDOM
from qpruner.runs.records.search import SEARCHED as SEARCHED
from qpruner.runs.records.search import Begun as Begun
from qpruner.runs.records.search import Finalist as Finalist
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


class PilotRecord(Record):
    """The learning rates that the pilot chose, and its fine-tunes."""

    rates: dict[Method, float]
    fine_tunes: tuple[FineTune, ...]
    """Of each method one fine-tune for each rate, scored on the validation rows."""

    @property
    def text(self) -> str:
        """The rates that were chosen, and the losses at all that were tried."""
        parts = []
        for method, rate in self.rates.items():
            tried = [
                f"{record.losses[VALIDATION].mean:.4f} at {record.learning_rate:g}"
                if record.trained_sha256
                else f"diverged at {record.learning_rate:g}"
                for record in self.fine_tunes
                if record.method == method
            ]
            parts.append(f"{rate:g} for {method} (validation loss {', '.join(tried)})")
        return f"learning rate {'; '.join(parts)}"


class FinetuneRecord(Record):
    """The fine-tune of the winner, whose adapter is part of the final model."""

    winner: FineTune


class EvalRecord(Record):
    """Scores on the held-out tasks: of models before any fine-tune, and of the winner.

    The former are the base, the pruned and the quantized model.
    """

    rows: tuple[FineTune, ...]
    text: str | None = None
    """Description of the held-out text behind `FineTune.text_loss`."""
    inference: InferenceSetting | None = None
    tested: str
    """Digest of the questions and their prompts."""

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the metric of its scores."""
        return {score.task: score.metric for score in self.rows[-1].tasks}

    @property
    def untuned(self) -> tuple[FineTune, ...]:
        """The models before any fine-tune."""
        return tuple(row for row in self.rows if row.seed is None)

    @property
    def tuned(self) -> tuple[FineTune, ...]:
        """The fine-tuned winner."""
        return tuple(row for row in self.rows if row.seed is not None)


class ComparisonRecord(Record):
    """The winner and the models compared with it, all after the same fine-tune.

    They are sorted by model, then by training seed.
    """

    rows: tuple[FineTune, ...]
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
    pilot: PilotRecord | None = None
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
    def fine_tunes(self) -> tuple[FineTune, ...]:
        """The fine-tuned models that are scored on the held-out tasks.

        These are the winner and, after stage comparison, the models compared with it.
        """
        if self.comparison:
            return self.comparison.rows
        return self.evaluate.tuned if self.evaluate else ()

    @property
    def inference(self) -> InferenceSetting | None:
        """The settings with which the memory and speed of the `fine_tunes` were measured."""
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
