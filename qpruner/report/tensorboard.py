"""Shows a search in TensorBoard: `tensorboard --logdir RUN` compares its trials.

HParams has a row a trial that is over; Scalars its curves, and the best so far beside the controls; Images the front as
it grows; Text the configuration and the final table. All of it is made from the records by `event_files`, as the search
runs and again when it is lost.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from qpruner.config.schema import RunConfig
from qpruner.report.search_progress import in_order_of_end, shown_together
from qpruner.runs import events
from qpruner.runs.records import Results, SearchRecord, SearchState, TrialRecord
from qpruner.runs.run_dir import RunDir

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
RESULT = "result"


class Board:
    """Follows a search's events and keeps its TensorBoard files in the run folder `root`."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        from qpruner.report import event_files  # loads torch

        self._files = event_files
        self._run, self._folder, self._config = RunDir(root, create=False), root / FOLDER, config
        self._search: SearchState | None = None
        self._trials: dict[int, TrialRecord] = {}

    def listen(self, event: events.Event) -> None:
        """Write what an event shows; a full disk stops no search, and the next command writes what is missing."""
        try:
            self._listen(event)
        except OSError as error:
            logger.warning(
                "TensorBoard's files could not be written: %s; repeat the command, and it writes what is missing", error
            )

    def _listen(self, event: events.Event) -> None:
        match event:
            case events.SearchPlanned(search, trials):
                self._search, self._trials = search, {trial.index: trial for trial in trials}
                self._drop_others(search)
                for trial in trials:
                    self._files.write_trial(self._folder, search, trial)
                self._write_curves(search)
            case events.StageStarted(stage) if stage not in ("comparison", "report"):
                # Of what an earlier command ended with; this one's follows once the winner is done.
                shutil.rmtree(self._folder / RESULT, ignore_errors=True)
            case events.TrialChanged(trial) if self._search:
                self._trials[trial.index] = trial
                self._files.write_trial(self._folder, self._search, trial)
                if trial.is_over:
                    over = self._write_curves(self._search)
                    if len(over) % self._files.picture_every(self._config) == 0:
                        self._files.write_picture(self._folder, self._search, over, None)
            case events.StageFinished("search") | events.StageSkipped("search") if self._search:
                record = self._run.read_record("search", SearchRecord)
                over = self._write_curves(self._search)
                self._files.write_picture(self._folder, self._search, over, record.best_index if record else None)

    def _drop_others(self, search: SearchState) -> None:
        """Delete what an earlier search on this folder left and this one does not compare with."""
        trials = self._trials.values()
        kept = {self._files.run_name(trial) for trial in trials}
        kept |= {self._files.control_name(trial) for trial in shown_together(search, trials)}
        for folder in (*self._folder.glob("trial-*"), *self._folder.glob("control-*")):
            if folder.name not in kept:
                shutil.rmtree(folder)
        for picture in self._folder.glob("pictures/*"):
            if not picture.name.endswith((search.search, search.beside or search.search)):
                picture.unlink()

    def _write_curves(self, search: SearchState) -> list[TrialRecord]:
        """Write what all trials show together; returns those that are over, in the order of their ends."""
        over = in_order_of_end(shown_together(search, self._trials.values()))
        listed = in_order_of_end(self._trials.values())[:1]
        self._files.write_curves(self._folder, search, over, listed, self._config)
        return over


def write_result(root: Path, results: Results) -> None:
    """Write the claim and the final table as a text."""
    from qpruner.report import event_files, markdown, sections

    table = "\n\n".join(markdown.parts_text(sections.measured(results)))
    event_files.write_events(root / FOLDER / RESULT, [event_files.text("final table", table)])
