"""Records of a run: small JSON files with the results of its stages.

The record of a stage is written last, so its presence shows that the files of the stage are complete. Its `digest`
identifies all inputs of the stage: while they stay the same, the stage is skipped.
"""

from __future__ import annotations

from typing import Any, Literal

from qpruner.runs.records.base import RUN_ID as RUN_ID
from qpruner.runs.records.base import Record as Record
from qpruner.runs.records.base import Recorded as Recorded
from qpruner.runs.records.base import StandardError as StandardError
from qpruner.runs.records.base import digest_of as digest_of
from qpruner.runs.records.base import flat as flat
from qpruner.runs.records.search import GIVEN as GIVEN
from qpruner.runs.records.search import Begun as Begun
from qpruner.runs.records.search import Confirmation as Confirmation
from qpruner.runs.records.search import FinalistScore as FinalistScore
from qpruner.runs.records.search import FreshScore as FreshScore
from qpruner.runs.records.search import FrontPoint as FrontPoint
from qpruner.runs.records.search import KeptScore as KeptScore
from qpruner.runs.records.search import RungResult as RungResult
from qpruner.runs.records.search import SearchClock as SearchClock
from qpruner.runs.records.search import SearchRecord as SearchRecord
from qpruner.runs.records.search import TrialPulse as TrialPulse
from qpruner.runs.records.search import TrialRecord as TrialRecord
from qpruner.runs.records.stages import BankRecord as BankRecord
from qpruner.runs.records.stages import CandidateRecord as CandidateRecord
from qpruner.runs.records.stages import ComparisonRecord as ComparisonRecord
from qpruner.runs.records.stages import EvalRecord as EvalRecord
from qpruner.runs.records.stages import FinetuneRecord as FinetuneRecord
from qpruner.runs.records.stages import Inference as Inference
from qpruner.runs.records.stages import InferenceSetting as InferenceSetting
from qpruner.runs.records.stages import LayerWidths as LayerWidths
from qpruner.runs.records.stages import MethodScores as MethodScores
from qpruner.runs.records.stages import MetricScore as MetricScore
from qpruner.runs.records.stages import PrepareRecord as PrepareRecord
from qpruner.runs.records.stages import PruneRecord as PruneRecord
from qpruner.runs.records.stages import RowScores as RowScores
from qpruner.runs.records.stages import SensitivityRecord as SensitivityRecord
from qpruner.runs.records.stages import TaskScore as TaskScore


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
    beside: str | None = None
    """If the user gave a plan: digest of the search without that plan, whose trials are shown for comparison."""
    metric: Literal["loss", "accuracy"]
    metrics: dict[str, str] = {}
    pareto: bool = False
    budget_bytes: int
    max_trials: int
    steps: int
    slots: int | None = None
    """Trials that can run at once; None if no trial had to run."""


class RunState(Recorded):
    """`run.json`: the state of the latest command on a run folder, for other processes to read."""

    config: dict[str, Any]
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

    @property
    def asked_stages(self) -> list[str]:
        """The stages that the command runs, in the order of the flow."""
        names = [*Results.model_fields, "report"]  # the report has no record
        asked = names[: names.index(self.until) + 1]
        return [name for name in asked if name != "comparison" or self.compares]

    @property
    def compares(self) -> bool:
        """Whether the command also fine-tunes the models that the winner is compared with (`finetune.compare`)."""
        return bool(self.config.get("finetune", {}).get("compare"))


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

    @property
    def candidates(self) -> tuple[CandidateRecord, ...]:
        """The fine-tuned models: the winner and, after stage comparison, the models that it is compared with."""
        record = self.comparison or self.finetune
        return record.candidates if record else ()

    @property
    def scores(self) -> tuple[RowScores, ...]:
        """Scores on the held-out tasks: first of the models without a fine-tune, then of the `candidates`."""
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

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row per recorded stage, with its seconds and GPU seconds."""
        rows = zip(self.seconds, self.seconds.values(), self.gpu_seconds.values(), strict=True)
        return [{"stage": name, "seconds": seconds, "gpu_seconds": used} for name, seconds, used in rows]
