"""Writes a run's report: `report.html`, `report.md` with its pictures, `results.json`, and the final model's card."""

from __future__ import annotations

from pathlib import Path

import yaml

from qpruner.report import markdown, page, tensorboard
from qpruner.report.card import base_card, model_card
from qpruner.report.importance_map import PICTURE
from qpruner.report.plots import charts
from qpruner.report.results_json import summary_of, summary_text
from qpruner.report.snapshot import Snapshot, read_snapshot
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import exists, fetch_file, publish_folder, published_folders, write_text

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
    plots = charts(run)
    scratch = run_dir.scratch(PICTURES)
    for plot in plots:
        (scratch / f"{plot.name}.png").write_bytes(plot.png())
    has_map = _copy_importance_map(run, run_dir, scratch)
    importance = (scratch / PICTURE).read_bytes() if has_map else None
    publish_folder(scratch, run_dir.root / PICTURES)
    config = yaml.safe_dump(run.state.config, sort_keys=False)
    write_text(run_dir.root / "results.json", summary_text(summary_of(run)))
    write_text(run_dir.root / "report.md", markdown.render(run, plots, PICTURES, config, has_map))
    if run.is_whole and run_dir.root / "final" in published_folders(run_dir.root):
        write_text(run_dir.root / CARD, model_card(run, base_card(run, run_dir)))
    if run.is_whole:
        tensorboard.write_result(run_dir.root, run.results)
    target = run_dir.root / "report.html"
    write_text(target, page.render(run, plots, config, importance))
    return target


def _copy_importance_map(run: Snapshot, run_dir: RunDir, folder: Path) -> bool:
    """Put what pruning drew of every unit beside the plots; whether there is one."""
    drawn = run_dir.stage("prune") / PICTURE
    if run.results.prune is None or not exists(drawn):
        return False
    fetch_file(drawn, folder / PICTURE)
    return True
