"""The records of a run that its latest command made or found; others would be of an older configuration."""

from __future__ import annotations

from qpruner.runs.paths import RunDir
from qpruner.runs.records import (
    BankRecord,
    ComparisonRecord,
    EvalRecord,
    FinetuneRecord,
    PrepareRecord,
    PruneRecord,
    Record,
    Results,
    RunState,
    SearchRecord,
    SensitivityRecord,
)

KINDS: dict[str, type[Record]] = {
    "prepare": PrepareRecord,
    "prune": PruneRecord,
    "bank": BankRecord,
    "sensitivity": SensitivityRecord,
    "search": SearchRecord,
    "finetune": FinetuneRecord,
    "evaluate": EvalRecord,
    "comparison": ComparisonRecord,
}


def read_results(run: RunDir, state: RunState) -> Results:
    """Every such record.

    Raises:
        CorruptFile: If one cannot be read.
    """
    over = [name for name in KINDS if name in state.stages and state.stages[name].state != "running"]
    return Results.model_validate({name: run.read_record(name, KINDS[name]) for name in over})
