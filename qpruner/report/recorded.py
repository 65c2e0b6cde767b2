"""The records of a run that its latest command made or found; others would be of an older configuration."""

from __future__ import annotations

from typing import get_args

from qpruner.runs.paths import RunDir
from qpruner.runs.records import Record, Results, RunState

KINDS: dict[str, type[Record]] = {name: get_args(field.annotation)[0] for name, field in Results.model_fields.items()}
"""Class of each stage's record, in the order of the flow."""


def read_results(run: RunDir, state: RunState) -> Results:
    """Read every such record.

    Raises:
        CorruptFile: If one cannot be read.
    """
    over = [name for name in KINDS if name in state.stages and state.stages[name].state != "running"]
    return Results.model_validate({name: run.read_record(name, KINDS[name]) for name in over})
