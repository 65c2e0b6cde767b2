"""Writes all files of a run's report: `report.html`, `report.md`, `results.json`, plots, card."""

import itertools
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qpruner.report import html
from qpruner.report.card import model_card
from qpruner.report.claim import RowComparison, claim, comparisons, finalist_differences
from qpruner.report.content import report_md
from qpruner.report.plots.chart import Chart
from qpruner.report.results import TableRow, rows
from qpruner.report.sections import sections
from qpruner.report.snapshot import Snapshot, read_snapshot
from qpruner.report.statistics import Difference
from qpruner.runs.records import Results, RunState, TrialRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import published_folders, storage_at, write_text
from qpruner.wording import without_nan

CARD = "final/README.md"
PICTURES = "pictures"
"""Name of the folder with the plots of `report.md`, which are to be copied together with that file.
"""


def write_report(run_dir: RunDir) -> Path:
    """Write all report files from the run's records, also of an unfinished run.

    Returns the path of `report.html`.
    """
    run = read_snapshot(run_dir)
    listed = sections(run)
    scratch = run_dir.scratch(PICTURES)
    for part in itertools.chain.from_iterable(section.parts for section in listed):
        if isinstance(part, Chart):
            (scratch / f"{part.name}.png").write_bytes(part.png())
    storage_at(run_dir.root / PICTURES).publish(scratch)
    write_text(run_dir.root / "results.json", summary_text(run))
    write_text(run_dir.root / "report.md", report_md(run, listed, PICTURES))
    if run.is_complete and run_dir.root / "final" in published_folders(run_dir.root):
        write_text(run_dir.root / CARD, model_card(run))
    target = run_dir.root / "report.html"
    write_text(target, html.render(run, listed))
    return target


class Summary(BaseModel):
    """All figures of a run, also of an unfinished one.

    Figures of stages that have not run are null or empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal[5] = 5
    """Version of this file's format. It changes when a field is removed or changes its meaning."""
    standing: str
    """How far the run has come, in one or two sentences."""
    claim: str | None
    """How the winner compares with what users would do instead, and with random plans of equal
    bytes."""
    comparisons: tuple[RowComparison, ...]
    """The comparisons behind the claim: of the winner with its rival and with random plans."""
    table: tuple[TableRow, ...]
    """The final table: means over training seeds, with losses in nats per token."""
    finalist_differences: dict[int, Difference | None]
    """Trial number of each of `records.search.finalists`, the winner first -> the winner's loss
    less its own, as trials on the fresh rows that chose the winner; null for the winner itself.
    """
    records: Results
    """The records of all stages."""
    trials: tuple[TrialRecord, ...]
    """All trials in the search's folder, in the order in which they were suggested."""
    state: RunState
    """The state of the run's latest command, with its configuration, software versions and
    hardware."""


def summary_text(run: Snapshot) -> str:
    """Return the content of `results.json`: all records and figures of the run."""
    results = run.results
    is_complete = run.is_complete
    summary = Summary(
        standing=run.standing,
        claim=claim(results) if is_complete else None,
        comparisons=tuple(comparisons(results)) if is_complete else (),
        table=tuple(rows(results)) if is_complete else (),
        finalist_differences=finalist_differences(results.search) if results.search else {},
        records=results,
        trials=run.trials,
        state=run.state,
    )
    content = without_nan(summary.model_dump(mode="json"))
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def summary_schema() -> str:
    """Return the JSON schema of `results.json`, which `qpruner schema --results` prints."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:qpruner:results:4",
        **Summary.model_json_schema(mode="serialization"),
    }
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
