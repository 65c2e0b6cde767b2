"""The report stage: write `report.html`, `report.md` and `results.json` from the records."""

import logging
from pathlib import Path
from typing import Any

from qpruner.pipeline.stage import Stage
from qpruner.runs.records import Record
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import display_name, read_text

WRITTEN = "report.html, report.md and results.json"


class Report(Stage[Record]):
    """Write every file of the report.

    This stage keeps no record and is never skipped, because writing is fast.
    """

    name = "report"

    def detail(self) -> str:
        return WRITTEN

    def run(self, scratch: Path) -> dict[str, Any]:
        from qpruner.export.card import missing_keys, missing_remark
        from qpruner.report.files import CARD, write_report

        run_dir = self.context.run_dir
        write_report(run_dir)
        remark = missing_remark(missing_keys(read_text(run_dir.root / CARD) or ""))
        if remark:
            self.notify(remark)
        return {}

    def summary(self, record: Record) -> str:
        return WRITTEN


def report_unfinished(run_dir: RunDir) -> str:
    """Write the report of an unfinished run.

    Return a message with its path, or a warning if writing fails.
    """
    from qpruner.report.files import write_report

    try:
        return f"{display_name(write_report(run_dir))} has the run so far"
    except Exception as error:
        logging.getLogger(__name__).exception("no report of the unfinished run could be written")
        return (
            f"warning: no report of the run so far could be written: {error}; "
            "`qpruner report` writes it again"
        )
