"""Writes every file of a run's report: `report.html`, `report.md`, `results.json`, pictures, card and TensorBoard's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qpruner.report import html, markdown, tensorboard
from qpruner.report.card import base_card, model_card
from qpruner.report.plots.chart import Chart
from qpruner.report.plots.model import IMPORTANCE_FILE, load_importance
from qpruner.report.results_json import summary_of, summary_text
from qpruner.report.sections import sections
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import exists, fetch_file, published_folders, storage_at, write_text

CARD = "final/README.md"
PICTURES = "pictures"
"""Folder of the plots that `report.md` shows, all of them, so that both can be taken elsewhere."""


def write_report(run_dir: RunDir) -> Path:
    """Write every file anew from what is recorded, whole or not; returns the page.

    Raises:
        UserError: If the folder holds no run.
        CorruptFile: If a record cannot be read.
        OSError: If a file cannot be written.
    """
    run = read_snapshot(run_dir)
    scratch = run_dir.scratch(PICTURES)
    importances = _importances(run_dir, scratch) if run.results.prune else {}
    listed = sections(run, yaml.safe_dump(run.state.config, sort_keys=False), importances)
    for plot in (part for section in listed for part in section.parts if isinstance(part, Chart)):
        (scratch / f"{plot.name}.png").write_bytes(plot.png())
    storage_at(run_dir.root / PICTURES).publish(scratch)
    write_text(run_dir.root / "results.json", summary_text(summary_of(run)))
    write_text(run_dir.root / "report.md", markdown.render(run, listed, PICTURES))
    if run.is_whole:
        if run_dir.root / "final" in published_folders(run_dir.root):
            write_text(run_dir.root / CARD, model_card(run, base_card(run)))
        tensorboard.write_result(run_dir.root, run.results)
    target = run_dir.root / "report.html"
    write_text(target, html.render(run, listed))
    return target


def _importances(run_dir: RunDir, scratch: Path) -> dict[str, Any]:
    """Read the importance of every unit from the prune stage, by way of a folder for scratch files."""
    kept = run_dir.stage("prune") / IMPORTANCE_FILE
    if not exists(kept):
        return {}
    fetch_file(kept, scratch / IMPORTANCE_FILE)
    found = load_importance(scratch)
    (scratch / IMPORTANCE_FILE).unlink()
    return found
