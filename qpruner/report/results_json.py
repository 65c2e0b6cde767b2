"""Writes `results.json`: every figure of a run, with a JSON schema (`qpruner schema --results`)."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qpruner.report.claim import Comparison, claim, comparisons
from qpruner.report.results import Row, rows, under_first_seed
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import Results, RunState, TrialRecord
from qpruner.wording import without_nan

FORMAT: Literal[1] = 1


class Summary(BaseModel):
    """A run's figures, whole or not. What a stage that has not run would tell is null or empty."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal[1] = FORMAT
    """Of this file; another number where a field changed its meaning or went."""
    standing: str
    """How far the run is, in a sentence."""
    claim: str | None
    """What the searched plan lost against the base and the pruned model, and what can be said of it at equal bytes."""
    comparisons: tuple[Comparison, ...]
    """The differences behind the claim."""
    first_seed_table: tuple[Row, ...]
    """The rows of `table` under the first training seed alone, which every row had."""
    table: tuple[Row, ...]
    """The final table; losses in nats per token, means over training seeds."""
    records: Results
    """What every stage recorded."""
    trials: tuple[TrialRecord, ...]
    """Every trial, in order of suggestion."""
    state: RunState
    """What the run's latest command did."""
    config: dict[str, Any]
    """The configuration, every key."""
    environment: dict[str, str]
    """Versions and hardware."""


def summary_of(run: Snapshot) -> Summary:
    """Collect everything that the run's folder holds."""
    return Summary(
        standing=run.standing,
        claim=claim(run.results) if run.is_whole else None,
        comparisons=tuple(comparisons(run.results)) if run.is_whole else (),
        table=tuple(rows(run.results)) if run.is_whole else (),
        first_seed_table=tuple(under_first_seed(run.results)) if run.is_whole else (),
        records=run.results,
        trials=run.trials,
        state=run.state,
        config=run.state.config,
        environment=run.state.environment,
    )


def summary_text(summary: Summary) -> str:
    """Return the file's text."""
    return json.dumps(without_nan(summary.model_dump(mode="json")), indent=2, allow_nan=False) + "\n"


def summary_schema() -> str:
    """Return the JSON schema of `results.json`."""
    schema = Summary.model_json_schema(mode="serialization")
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:qpruner:results:{FORMAT}"}
    return json.dumps(about | schema, indent=2, sort_keys=True) + "\n"
