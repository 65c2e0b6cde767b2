"""What the stages leave behind: small JSON records of plain data.

A record vouches for the files of its stage and carries the figures that the report shows. `digest` is the digest of
everything the stage depended on; a stage whose record has the digest it would use now is skipped.
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
    """Where a stage of the latest command stands."""

    state: Literal["running", "done", "recorded"]
    """`recorded`: there was nothing to do."""
    started: float
    """Unix seconds."""
    seconds: float | None = None
    done: int | None = None
    total: int | None = None
    text: str = ""
    """Its present steps, or what came out."""


class SearchState(Recorded):
    """What the latest command's search is about."""

    trials_digest: str
    search: str
    """As `TrialRecord.search`."""
    beside: str | None = None
    """Of the search without the given plan, which that plan is shown beside."""
    metric: Literal["loss", "accuracy"]
    metrics: dict[str, str] = {}
    pareto: bool = False
    budget_bytes: int
    max_trials: int
    steps: int
    slots: int | None = None
    """Trials at once; None where no trial had to run."""


class RunState(Recorded):
    """`run.json`: what the latest command on a run folder is doing or did, for who looks at it from elsewhere."""

    config: dict[str, Any]
    until: str
    """The last stage it was asked for."""
    command: str
    folder: str
    environment: dict[str, str]
    """Versions of Python and packages, and the machine."""
    host: str
    pid: int
    started: float
    updated: float
    """The last sign of life, in Unix seconds."""
    outcome: Literal["running", "done", "failed", "interrupted"]
    error: str | None = None
    resumed: int = 0
    """Earlier commands on the folder that did not come to their end."""
    stages: dict[str, StageState] = {}
    search: SearchState | None = None

    @property
    def asked_stages(self) -> list[str]:
        """The stages that were asked for, in the order of the flow."""
        names = [*Results.model_fields, "report"]  # which leaves no record
        asked = names[: names.index(self.until) + 1]
        return [name for name in asked if name != "comparison" or self.compares]

    @property
    def compares(self) -> bool:
        """Whether every row of the final table is fine-tuned."""
        return bool(self.config.get("finetune", {}).get("compare"))


MARK = "qpruner_export.json"
"""Name of an `ExportRecord` in the export's folder."""


class ExportRecord(Recorded):
    """Which final model an export was made of."""

    final: dict[str, str]
    """File name -> sha256 of what differs between final models."""


class Results(Recorded):
    """Every record of a run in the order of the flow, a field a stage; None for stages that have not run."""

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
        """The fine-tunes of the final table: every row's, or without a comparison the winner's."""
        record = self.comparison or self.finetune
        return record.candidates if record else ()

    @property
    def scores(self) -> tuple[RowScores, ...]:
        """The models as they are before any fine-tune, then the `candidates`, on the held-out tasks."""
        rows = self.evaluate.rows if self.evaluate else ()
        if self.comparison is None:
            return rows
        return (*(row for row in rows if row.seed is None), *self.comparison.rows)

    @property
    def inference(self) -> InferenceSetting | None:
        """How memory and speed of the `candidates` were measured."""
        record = self.comparison or self.evaluate
        return record.inference if record else None

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage took that has run."""
        taken = {name: record.seconds for name, record in self if record}
        return taken | ({"search": self.search.total_seconds} if self.search else {})

    @property
    def gpu_seconds(self) -> dict[str, float]:
        """What each stage held GPUs for that has run."""
        held = {name: record.gpu_seconds for name, record in self if record}
        return held | ({"search": self.search.total_gpu_seconds} if self.search else {})

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a stage that has run, with what it took."""
        return [
            {"stage": name, "seconds": seconds, "gpu_seconds": self.gpu_seconds[name]}
            for name, seconds in self.seconds.items()
        ]
