"""A run folder as other shells and machines see it: what `qpruner status`, `trials`, `plan` and `compare` tell.

Everything comes from the files of the run (`run.json`, the records, the trials' records); nothing is computed and
nothing heavy imported, so that a look costs no more than reading them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.data.measures import accuracy_in_full
from qpruner.errors import UserError
from qpruner.report import results as table
from qpruner.report.claim import how_to_compare
from qpruner.report.liveness import RUNNING, Liveness, read_liveness
from qpruner.report.results import SEARCHED, read_results
from qpruner.report.search_progress import (
    SearchProgress,
    bar,
    best_of,
    best_so_far,
    control_name,
    in_order_of_end,
    score,
    score_title,
    search_progress,
)
from qpruner.runs.lock import driver_of
from qpruner.runs.records import (
    GIVEN,
    BankRecord,
    Results,
    RunState,
    SearchRecord,
    StageState,
    TrialRecord,
    flat,
)
from qpruner.runs.run_dir import LOG, STATE, RunDir
from qpruner.runs.storage import children, exists, for_each
from qpruner.search.trial_records import read_pulse, read_trials
from qpruner.wording import counted

MOST_RUNS = 10
"""Runs that are named where a folder of runs is taken for one."""


@dataclass(frozen=True)
class RunView:
    """A run folder, read when asked, and whether its latest command still works on it."""

    run_dir: RunDir
    liveness: Liveness

    @property
    def state(self) -> RunState:
        """Of its latest command."""
        return self.liveness.state

    @cached_property
    def results(self) -> Results:
        """The records of its latest command."""
        return read_results(self.run_dir, self.state)

    @cached_property
    def trials(self) -> list[TrialRecord]:
        """Every trial of the search's folder, in order of suggestion; none before the search."""
        search = self.state.search
        return read_trials(self.run_dir.trials / search.trials_digest) if search else []

    @cached_property
    def progress(self) -> SearchProgress | None:
        """How the search stands; None before it."""
        return search_progress(self.state.search, self.trials) if self.state.search else None

    @cached_property
    def search(self) -> SearchRecord | None:
        """The outcome of the present search; None while it runs."""
        record = self.run_dir.read_record("search", SearchRecord)
        state = self.state.stages.get("search")
        return record if state and state.state != "running" else None

    @property
    def could_compare(self) -> bool:
        """Whether the run is finished and was asked for no comparison."""
        stage = self.state.stages.get("report")
        return bool(stage and stage.state == "done") and not self.state.compares

    @property
    def outcome(self) -> str:
        """How the latest command ended, or `running`, also where another one has taken the run up since."""
        return RUNNING if self.liveness.successor else self.liveness.outcome


def view(root: str | Path) -> RunView:
    """Look at a run folder.

    Raises:
        UserError: If it is none, or none yet.
    """
    run_dir = RunDir(root, create=False)
    liveness = read_liveness(run_dir)
    if liveness is None:
        driver = driver_of(run_dir.root)
        if driver and driver.state == "alive":
            process = f"process {driver.holder.pid} on {driver.holder.host}, since {driver.holder.since}"
            raise UserError(f"{root} has no {STATE} yet: a command is starting there ({process}); look again soon")
        raise UserError(_no_run(run_dir, str(root)))
    return RunView(run_dir, liveness)


def _no_run(run_dir: RunDir, named: str) -> str:
    """Tell why a place is no run, and what to name instead."""
    names = children(run_dir.root)
    are_runs = for_each(_may_be_run, [run_dir.root / name for name in names])
    runs = [name for name, is_run in zip(names, are_runs, strict=True) if is_run]
    remedy = "name the `output` of a configuration that `qpruner run` was given"
    if runs:
        return f"{named} is no run folder, but has the {_listed(runs)}: name one of them"
    if LOG in names:
        return (
            f"{named} has no {STATE} yet, only {LOG}: a command that has just started looks at its input first, so "
            "look again soon; if none works on it, that file tells why the last one ended"
        )
    if names or run_dir.root.is_dir():
        return f"{named} is no run folder, it has no {STATE}: {remedy}"
    return f"{named} does not exist or is empty: {remedy}"


def _may_be_run(folder: Path) -> bool:
    try:
        return exists(folder / STATE)
    except OSError:  # a folder that may not be entered, a link that loops
        return False


def _listed(runs: Sequence[str]) -> str:
    """List the first few: `runs a, b`."""
    more = f" and {len(runs) - MOST_RUNS} more" if len(runs) > MOST_RUNS else ""
    return f"{'runs' if len(runs) > 1 else 'run'} {', '.join(runs[:MOST_RUNS])}{more}"


def status(run: RunView, now: float) -> dict[str, Any]:
    """Report the stages with state and time, and the search; `now` is in Unix seconds."""
    stages: list[dict[str, Any]] = []
    for name in run.state.asked_stages:
        state = run.state.stages.get(name)
        if state is None:
            stages.append({"stage": name, "state": "waiting", "seconds": None, "steps": None, "text": ""})
            continue
        is_running = state.state == "running"
        # What the command left unfinished when it ended is running no more.
        shown = run.liveness.outcome if is_running else state.state
        end = now if shown == RUNNING else run.state.updated
        steps = f"{state.done}/{state.total}" if state.total and is_running else None
        seconds = end - state.started if is_running else _taken(run, name, state)
        stages.append({"stage": name, "state": shown, "seconds": seconds, "steps": steps, "text": state.text})
    worker = run.liveness.successor or run.state
    return {
        "run": run.run_dir.address,
        "outcome": run.outcome,
        "error": run.state.error,
        "host": worker.host,
        "pid": worker.pid,
        "started": run.state.started,
        "command": run.state.command,
        "folder": run.state.folder,
        "has_begun": run.liveness.successor is None,
        "seconds_since_sign_of_life": max(0.0, now - run.liveness.last_sign),
        "stages": stages,
        "search": _search_status(run),
        "to_compare": how_to_compare(run.state.command) if run.could_compare else None,
    }


def _taken(run: RunView, name: str, state: StageState) -> float | None:
    """Return the seconds of a stage that is over: of a search those of all its sessions."""
    return run.search.total_seconds if name == "search" and run.search else state.seconds


def _search_status(run: RunView) -> dict[str, Any] | None:
    search, now = run.state.search, run.progress
    if search is None or now is None:
        return None
    return {
        **search.model_dump(),
        "score_title": score_title(search),
        **{name: now.count(name) for name in ("finished", "stopped", "failed", "running")},
        # What the command left unfinished when it ended waits for nothing.
        "waiting": now.waiting if run.liveness.outcome == RUNNING else 0,
        "starting": now.starting if run.liveness.outcome == RUNNING else 0,
        "trials": len(now.trials),
        "under_way": [trial_row(run, trial) for trial in now.running],
        "failures": [trial_row(run, trial) for trial in now.trials if trial.status == "failed"],
        "reused": len(now.others),
        "seconds_left": now.seconds_left,
        "best": trial_row(run, now.best) if now.best else None,
        "best_control": trial_row(run, now.best_control) if now.best_control else None,
        "control_name": control_name(now.best_control) if now.best_control else None,
        "best_so_far": best_so_far(in_order_of_end(now.trials), search.metric),
        "winner": run.search.best_index if run.search else None,
        "control_won": run.search.control_won if run.search else None,
        "confirmations": [each.model_dump(exclude={"losses"}) for each in run.search.confirmations]
        if run.search
        else [],
    }


def trial_row(run: RunView, trial: TrialRecord) -> dict[str, Any]:
    """Return a trial as a flat row: figures of its last rung, then the bits of every group.

    The step of a trial that runs is where it is now, also between two rungs.
    """
    last = trial.rungs[-1] if trial.rungs else None
    assert run.state.search
    pulse = None if trial.is_over else read_pulse(run.run_dir.trials / run.state.search.trials_digest, trial.index)
    return {
        "trial": trial.index,
        "winner": "yes" if run.search and trial.index == run.search.best_index else None,
        "from": trial.origin,
        "status": trial.status,
        "bytes": trial.plan_bytes,
        "mean_bits": trial.mean_bits,
        "plan": bar(trial),
        "step": max(last.step if last else 0, pulse.step if pulse else 0),
        "rung": last.step if last else None,
        "loss": last.loss if last else None,
        "accuracy": last.accuracy if last else None,
        "train_loss": last.train_loss if last else None,
        "seconds": trial.seconds,
        "gpu_seconds": trial.gpu_seconds,
        "search": "this" if trial.search == run.state.search.search else "another",
        "failure": trial.failure,
        "reason": trial.reason,
        **{f"bits {group}": bits for group, bits in trial.plan.items()},
    }


def winner(run: RunView) -> TrialRecord:
    """Return the trial whose plan the search returned.

    Raises:
        UserError: If the search is not over, or the plan that was given not scored.
    """
    given = run.state.config["search"].get("plan")
    if run.search is None and given is not None:
        raise UserError(
            f"{run.run_dir.place} was given a plan ({given}), which is not scored yet, and searches for none: "
            "`qpruner status` shows where it is, and `--trial NUMBER` prints the plan of a trial that the folder has"
        )
    if run.search is None:
        raise UserError(
            f"the search of {run.run_dir.place} is not over, so there is no winner yet: `qpruner status` shows where "
            "it is, and `--trial NUMBER` prints the plan of one of its trials"
        )
    return trial(run, run.search.best_index)


def trial(run: RunView, index: int) -> TrialRecord:
    """Find a trial by its number.

    Raises:
        UserError: If there is none.
    """
    found = next((each for each in run.trials if each.index == index), None)
    if found is None:
        raise UserError(
            f"{run.run_dir.place} has no trial {index}, only {counted(len(run.trials), 'trial')}: `qpruner trials` "
            "lists them"
        )
    return found


def budget_bytes(run: RunView) -> int | None:
    """Return what a plan of the latest search may take; None before there is one."""
    return run.state.search.budget_bytes if run.state.search else None


def group_bytes(run: RunView) -> dict[str, dict[str, int]]:
    """Return bytes by bits and group; empty where there is no bank, or one of an older qpruner."""
    banked = run.run_dir.read_record("bank", BankRecord)
    return banked.group_bytes if banked else {}


def summary(run: RunView) -> dict[str, Any]:
    """Collect what stands beside other runs."""
    config, now, record = run.state.config, run.progress, run.search
    facts: dict[str, Any] = {
        "run": run.run_dir.address,
        "outcome": run.outcome,
        "model": config["model"]["source"],
        "searcher": record.searcher if record else config["search"]["searcher"],
        "metric": config["search"]["metric"],
        "budget_bytes": budget_bytes(run),
        **{name: now.count(name) if now else 0 for name in ("finished", "stopped", "failed", "running")},
        "best_control": _best_control(run),
    }
    if record is None:
        return facts
    results = run.results
    chosen = trial(run, record.best_index)
    fresh = next(each for each in record.confirmations if each.index == record.best_index)
    facts |= {
        "winner": record.best_index,
        "from": record.best_origin,
        "bytes": chosen.plan_bytes,
        "mean_bits": chosen.mean_bits,
        "plan": bar(chosen),
        "validation_loss": chosen.rungs[-1].loss,
        "selection_loss": fresh.loss,
        "selection_stderr": fresh.stderr,
        **({} if record.hypervolume is None else {"hypervolume": record.hypervolume}),
        "search_hours": record.total_seconds / 3600,
        "search_gpu_hours": record.total_gpu_seconds / 3600,
        "run_hours": sum(results.seconds.values()) / 3600,
        "run_gpu_hours": sum(results.gpu_seconds.values()) / 3600,
    }
    return facts | _final(results)


def _best_control(run: RunView) -> float | None:
    """Return the score of the best control, also of another search that a given plan was compared with."""
    metric = run.state.config["search"]["metric"]
    finished = [each for each in run.progress.trials if each.status == "finished"] if run.progress else []
    controls = [each for each in finished if each.is_control and not each.is_given]
    if run.search:
        # By their plan: a control may have run first as a plan that was given, or as one that another search found.
        confirmed = [each for each in run.search.confirmations if each.control and each.origin != GIVEN]
        controls = [trial(run, each.index) for each in confirmed]
    best = best_of(controls, metric)
    return score(best.rungs[-1], metric) if best else None


def _final(results: Results) -> dict[str, float | str | None]:
    """Return figures of the searched row after its fine-tune, where the latest command came that far."""
    tuned = [each for each in results.candidates if each.name == SEARCHED]
    if not tuned:
        return {}
    facts: dict[str, float | str | None] = {
        "final_validation_loss": statistics.fmean(each.validation_loss for each in tuned),
        "final_confirmation_loss": statistics.fmean(each.confirmation_loss for each in tuned),
    }
    if results.evaluate:
        row = next(each for each in table.rows(results) if each.name == SEARCHED)
        facts["test_metric"] = accuracy_in_full(results.evaluate.metrics)
        facts["test_accuracy"] = row.accuracy
        facts["test_accuracy_spread"] = row.accuracy_spread
        facts["test_accuracy_stderr"] = row.accuracy_stderr
        facts["test_answer_loss"] = row.answer_loss
        facts["perplexity"] = row.perplexity
        facts["inference_memory_bytes"] = row.inference_memory_bytes
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            turns = getattr(row, name)
            facts[name] = turns[0] if turns else None
    return facts


def differing_settings(runs: Sequence[RunView]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs: key -> a value a run, None where it is unset."""
    settings = [flat(_by_place(run.state.config)) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each if key != "output")
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _by_place(setting: Any) -> Any:
    """Turn lists of mappings into mappings by place: `data.train.0.limit` is a key of its own."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        setting = {f"{place}": item for place, item in enumerate(setting)}
    return {key: _by_place(value) for key, value in setting.items()} if isinstance(setting, dict) else setting
