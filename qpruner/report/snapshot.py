"""Reads a run from its folder, finished or not, for reports and commands such as `qpruner status`.

The run's state file and its lock show whether the latest command is still running.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from qpruner.errors import UserError
from qpruner.plans.plan import UNPRUNED, PrecisionPlan, plan_of
from qpruner.runs.lock import Driver, Holder, driver_of
from qpruner.runs.records import GIVEN, Results, RunState, TrialRecord
from qpruner.runs.run_dir import STATE, RunDir
from qpruner.runs.storage import children
from qpruner.search.progress import best_of, fits
from qpruner.search.trial_records import read_trials
from qpruner.wording import counted

if TYPE_CHECKING:
    import pandas

STATUSES = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "running": "begun",
}
RUNNING = "running"
CUT_OFF = "cut off"  # outcome of a command whose process ended without recording its outcome
GONE = "most likely gone"  # outcome of a command on another machine whose heartbeat has stopped


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment: the state and records of its latest command, and its trials.

    `driver` is the process that holds the run's lock, if any. `trials` includes those of searches
    with another budget or searcher, which share the folder; `own_trials` leaves them out.
    """

    run_dir: RunDir
    state: RunState
    driver: Driver | None
    results: Results
    trials: tuple[TrialRecord, ...]

    def __repr__(self) -> str:
        recorded = ", ".join(name for name, record in self.results if record is not None)
        return (
            f"<{type(self).__name__} of the run {self.name!r}: "
            f"{counted(len(self.trials), 'trial')}; {recorded}>"
        )

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return Path(self.run_dir.place).name

    @property
    def process(self) -> Holder | RunState:
        """The living process that holds the lock; without one, the process of `state`.

        A living process may run a newer command than the one in `state`.
        """
        return self.driver.holder if self.driver and self.driver.state == "alive" else self.state

    @property
    def outcome(self) -> str:
        """The recorded outcome or, without one, `RUNNING`, `CUT_OFF` or `GONE`.

        `CUT_OFF` means that the process died, `GONE` that no heartbeat comes from its machine.
        """
        is_newer = (self.process.host, self.process.pid) != (self.state.host, self.state.pid)
        if self.state.outcome != RUNNING and not is_newer:
            return self.state.outcome
        if self.driver is None:
            return CUT_OFF
        return {"alive": RUNNING, "silent": GONE}.get(self.driver.state, CUT_OFF)

    @property
    def last_sign(self) -> float:
        """Unix seconds of the driver's last heartbeat or, without a lock, of the last state."""
        return self.driver.beat if self.driver else self.state.updated

    @property
    def is_complete(self) -> bool:
        """Whether the winner is fine-tuned and evaluated, if not yet compared with others."""
        return self.results.evaluate is not None

    @property
    def how_to_compare(self) -> str | None:
        """How to compare the winner with other plans.

        It is None if `finetune.compare` is set, or the run is not finished.
        """
        if not self.is_complete or self.state.until != "report" or self.state.compares:
            return None
        return (
            "To compare the winner with the base, the controls and random plans after the same "
            f"fine-tune, run `{self.state.command} --set finetune.compare=true`; the winner's own "
            "fine-tune is kept."
        )

    @property
    def plan(self) -> PrecisionPlan | None:
        """The plan of the winner or, before the search is over, of the best finished trial.

        Notebooks draw it as a bar.
        """
        if record := self.results.search:
            return plan_of(record.winner)
        return plan_of(self.best_trial) if self.best_trial else None

    @property
    def best_plan(self) -> dict[str, str] | None:
        """`plan` as a mapping of groups to formats."""
        return self.plan.as_dict() if self.plan else None

    @property
    def best_cut(self) -> str:
        """The cut of `plan`; `base` is the model before pruning."""
        return self.plan.cut if self.plan else UNPRUNED

    @property
    def best_trial(self) -> TrialRecord | None:
        """The winner's trial or, before the search is over, the best finished one in the budget."""
        if self.results.search:
            best = self.results.search.best_index
            return next((trial for trial in self.trials if trial.index == best), None)
        search = self.state.search
        if search is None:
            return None
        finished = [trial for trial in self.own_trials if trial.status == "finished"]
        return best_of([trial for trial in finished if fits(trial, search)], search.metric)

    @property
    def best_title(self) -> str:
        """The title of the best trial in reports: `winner`, `given plan` or `best so far`."""
        if self.results.search is None:
            return "best so far"
        return "given plan" if self.results.search.winner.origin == GIVEN else "winner"

    @property
    def own_trials(self) -> list[TrialRecord]:
        """The trials of this search, without those of searches with another budget or searcher."""
        search = self.state.search
        if search is None:
            return []
        return [trial for trial in self.trials if trial.search == search.search]

    @property
    def metric(self) -> str:
        """The measure by which the search scores trials: `loss` or `accuracy`."""
        return self.state.search.metric if self.state.search else "loss"

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per trial, with the columns of `qpruner trials --json`."""
        import pandas

        from qpruner.report.run_views import trial_row

        return pandas.DataFrame([trial_row(self, trial) for trial in self.trials])

    @property
    def standing(self) -> str:
        """How far the run has come, in one or two sentences."""
        if self.missing is None:
            if not self.state.resumed:
                return "Finished."
            times = counted(self.state.resumed, "time")
            return f"Finished; resumed {times} after a command that did not finish."
        running = [name for name, stage in self.state.stages.items() if stage.state == "running"]
        stage = f" in stage {running[0]}" if running else ""
        match self.outcome:
            case "failed":
                cause = self.state.error or ""
                if running:
                    cause = cause.removeprefix(f"stage `{running[0]}` failed: ")
                return f"Failed{stage}: {cause}"
            case "interrupted":
                return f"Interrupted{stage}; repeat the command to resume."
            case "done":
                return f"Ended after stage {self.state.until}, as asked."
            case "running":
                process = f"{self.process.host} (process {self.process.pid})"
                return (
                    f"Unfinished{stage}: it was running on {process} when this was written; "
                    "`qpruner status` shows whether it still is."
                )
        return f"Unfinished{stage}: its process is {self.outcome}; repeat the command to resume."

    @property
    def missing(self) -> str | None:
        """A sentence that lists the stages without a record; None if every stage has a record."""
        results = dict(self.results)
        names = [name for name in self.state.flow if name in results and results[name] is None]
        return f"There is no result yet from: {', '.join(names)}." if names else None


def read_snapshot(run: RunDir) -> Snapshot:
    """Read a run's folder.

    Raises `UserError` if it holds no run, and `CorruptFile` if a record cannot be read.
    """
    # The lock is read first, because a command writes its last state before it releases the lock.
    driver = driver_of(run.root)
    state = run.read_state(RunState)
    if state is None:
        raise UserError(_no_run(run, driver))
    records = {}
    for name, field in Results.model_fields.items():
        stage = state.stages.get(name)
        # The record of a stage that the command has not reached is of an older configuration.
        if stage and stage.state != "running":
            records[name] = run.read_record(name, get_args(field.annotation)[0])
    trials = read_trials(run.trials / state.search.trials_digest) if state.search else []
    return Snapshot(
        run_dir=run,
        state=state,
        driver=driver,
        results=Results.model_validate(records),
        trials=tuple(trials),
    )


def _no_run(run: RunDir, driver: Driver | None) -> str:
    """Say why a folder is not a run, and which folder to name instead."""
    if driver and driver.state == "alive":
        holder = driver.holder
        return (
            f"{run.place} has no {STATE} yet: a command is starting there (process {holder.pid} on "
            f"{holder.host}, since {holder.since}); try again soon"
        )
    what = "does not exist or is empty"
    if children(run.root):
        what = f"is not a run folder, because it has no {STATE}"
    return (
        f"{run.place} {what}: name the folder that a configuration of `qpruner run` calls `output`"
    )


def driver_text(run: RunDir) -> str | None:
    """Describe the living process that works on a run; None if there is none."""
    driver = driver_of(run.root)
    if driver is None or driver.state != "alive":
        return None
    return f"process {driver.holder.pid} on {driver.holder.host} works on {run.place}"


def warning_of_driver(run: RunDir) -> str | None:
    """Return a warning that a running command may replace the run's models.

    Returns None if no command is running.
    """
    driver = driver_text(run)
    return driver and f"warning: {driver} and may replace its models meanwhile"
