"""Reads a run from its folder, whole or not: what every report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpruner.errors import UserError
from qpruner.plans.plan import PrecisionPlan
from qpruner.report.claim import how_to_compare
from qpruner.report.liveness import RUNNING, Liveness, read_liveness
from qpruner.report.results import read_results
from qpruner.report.search_progress import best_of, score_title, shown_together
from qpruner.report.statistics import MarginalEffects, marginal_effects
from qpruner.report.worker_intervals import WorkerInterval, worker_intervals
from qpruner.runs.lock import Driver
from qpruner.runs.records import GIVEN, Results, RunState, SensitivityRecord, TrialRecord
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import read_trials
from qpruner.wording import counted

if TYPE_CHECKING:
    import pandas

STATUSES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running"}


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        name: Of its folder.
        state: What its latest command did.
        results: Records of the stages that this command made or found; others are of an older configuration.
        trials: Every trial that the search knew, in order of suggestion.
        effects: What the trials show of each group, or why they show nothing.
        driver: The process that the run's lock names; None where nobody holds it.
    """

    name: str
    state: RunState
    results: Results
    trials: tuple[TrialRecord, ...]
    effects: MarginalEffects | str
    driver: Driver | None = None

    def __repr__(self) -> str:
        recorded = ", ".join(name for name, record in self.results if record is not None)
        return f"<{type(self).__name__} of the run {self.name!r}: {counted(len(self.trials), 'trial')}; {recorded}>"

    @property
    def is_whole(self) -> bool:
        """Whether the winner is fine-tuned and evaluated; a comparison may be still to come."""
        return self.results.evaluate is not None

    @property
    def lacks_comparison(self) -> bool:
        """Whether the comparison that `finetune.compare` asks for is missing."""
        return self.state.compares and self.results.comparison is None

    @property
    def how_to_compare(self) -> str | None:
        """How the comparison is added to a finished run that was asked for none; None for another run."""
        is_finished = self.is_whole and self.state.until == "report" and not self.state.compares
        return how_to_compare(self.state.command) if is_finished else None

    @property
    def best_plan(self) -> dict[str, int] | None:
        """The search's winner; until there is one, the plan of the best finished trial."""
        if self.results.search:
            return self.results.search.best_plan
        return self.best_trial.plan if self.best_trial else None

    @property
    def plan(self) -> PrecisionPlan | None:
        """`best_plan` as a notebook shows it, a cell a group."""
        return PrecisionPlan.from_dict(self.best_plan) if self.best_plan else None

    @property
    def best_trial(self) -> TrialRecord | None:
        """The winner; until there is one, the finished trial with the best last score."""
        if self.results.search:
            best = self.results.search.best_index
            return next((trial for trial in self.trials if trial.index == best), None)
        return best_of((trial for trial in self.own_trials if trial.status == "finished"), self.metric)

    @property
    def own_trials(self) -> list[TrialRecord]:
        """The trials without those that a search with another budget or searcher left."""
        return [trial for trial in self.trials if self.state.search and trial.search == self.state.search.search]

    @property
    def shown_together(self) -> list[TrialRecord]:
        """The trials that best-so-far compares; beside a plan that was given those of the search, too."""
        return shown_together(self.state.search, self.trials) if self.state.search else []

    @property
    def is_given(self) -> bool:
        """Whether the plan was given, not searched for."""
        return self.results.search is not None and self.results.search.best_origin == GIVEN

    @property
    def statuses(self) -> dict[str, str]:
        """Every status of a trial in words; what no command works on has begun, and does not run."""
        return STATUSES if self.is_running else {**STATUSES, "running": "begun"}

    @property
    def sensitivity(self) -> SensitivityRecord | None:
        """The sensitivities; None where none was measured."""
        record = self.results.sensitivity
        return record if record and record.methods else None

    @property
    def worker_intervals(self) -> list[WorkerInterval]:
        """When workers had trials for this search."""
        return worker_intervals(self.trials, self.state.search.search) if self.state.search else []

    @property
    def metric(self) -> str:
        """What the search scores trials by: `loss` or `accuracy`."""
        return self.state.search.metric if self.state.search else "loss"

    @property
    def metric_title(self) -> str:
        """What the scores are called, with their unit."""
        search = self.state.search
        return score_title(search) if search and search.metric != "loss" else "validation loss (nats per token)"

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the trials, one a row, as `TrialRecord.to_dataframe` has it."""
        import pandas

        return pandas.DataFrame([row for trial in self.trials for row in trial.table_rows()])

    def _repr_html_(self) -> str:
        from qpruner.report.html import notebook_view

        return notebook_view(self)

    @property
    def is_running(self) -> bool:
        """Whether the latest command still works on the run."""
        return Liveness(self.state, self.driver).outcome == RUNNING

    @property
    def standing(self) -> str:
        """How far the run is, in a sentence; in two where the winner is done and its comparison is not."""
        if not self.is_whole:
            return self._unfinished
        if self.lacks_comparison:
            return f"The winner is finished, its comparison is not. {self._unfinished}"
        times = self.state.resumed
        return "Finished" + (
            f"; resumed {counted(times, 'time')} after a command that did not come to its end." if times else "."
        )

    @property
    def _unfinished(self) -> str:
        """How the latest command ended before its last stage, or where it is."""
        at_work = next((name for name, stage in self.state.stages.items() if stage.state == "running"), None)
        stage = f" in stage {at_work}" if at_work else ""
        outcome = Liveness(self.state, self.driver).outcome
        match outcome:
            case "failed":
                cause = (self.state.error or "").removeprefix(f"stage `{at_work}` failed: ")
                return f"Failed{stage}: {cause}"
            case "interrupted":
                return f"Interrupted{stage}; the same command goes on from here."
            case "done":
                return f"Ended after stage {self.state.until}, as asked."
            case "running":
                process = f"it was running on {self.state.host} (process {self.state.pid}) when this was written"
                return f"Unfinished{stage}: {process}; `qpruner status` tells whether it still is."
        return f"Unfinished{stage}: its process is {outcome}; repeat the command to go on from here."

    @property
    def missing(self) -> str | None:
        """The stages that an unfinished run has no record of, in a sentence; some may have figures already."""
        asked = [name for name in Results.model_fields if name != "comparison" or self.lacks_comparison]
        names = [name for name in asked if getattr(self.results, name) is None]
        return f"There is no result yet of: {', '.join(names)}." if names else None


def read_snapshot(run: RunDir) -> Snapshot:
    """Read a run's folder.

    Raises:
        UserError: If no command has worked on it.
        CorruptFile: If a record cannot be read.
    """
    liveness = read_liveness(run)
    if liveness is None:
        raise UserError(f"{run.place} holds no run: it has no run.json; give a folder that `qpruner run` wrote")
    state = liveness.state
    results = read_results(run, state)
    trials = read_trials(run.trials / state.search.trials_digest) if state.search else []
    return Snapshot(Path(run.place).name, state, results, tuple(trials), marginal_effects(trials), liveness.driver)
