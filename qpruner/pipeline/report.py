"""The report stage: `report.html`, `report.md` and `results.json` from the records."""

from __future__ import annotations

import logging
import time

from qpruner.export.card_metadata import lacking, told_lacking
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import explained
from qpruner.report.files import CARD, write_report
from qpruner.runs.events import Message, StageFinished, StageStarted
from qpruner.runs.records import Results
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name, read_text


def report(context: Context, results: Results) -> Results:
    """Write every file; cheap, so it is done anew each time."""
    # A copied run folder keeps these words: the names alone stay true.
    files = "report.html, report.md and results.json"
    context.emit(StageStarted("report", files))
    started = time.monotonic()
    with explained("report"):
        write_report(context.run_dir)
        remark = told_lacking(lacking(read_text(context.run_dir.root / CARD) or ""))
    if remark:
        context.emit(Message("report", remark))
    context.emit(StageFinished("report", time.monotonic() - started, files))
    return results


def report_unfinished(run_dir: RunDir) -> str:
    """Write the report of a run that ended before its last stage; what keeps it from being written must not hide why.

    Returns:
        Where it is, or that there is none, for a person.
    """
    try:
        return f"{display_name(write_report(run_dir))} has the run so far"
    except Exception as error:
        logging.getLogger(__name__).exception("no report of the unfinished run could be written")
        return f"warning: no report of the run so far could be written: {error}; `qpruner report` writes it anew"
