"""Computes what `qpruner status`, `trials`, `plan` and `compare` show of a run.

It needs no heavy imports.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from qpruner.data import measures
from qpruner.data.measures import accuracy_in_full
from qpruner.errors import UserError
from qpruner.plans.plan import formats_text, plan_of
from qpruner.report.claim import finalists
from qpruner.report.results import by_row, winner_row
from qpruner.report.snapshot import RUNNING, Snapshot
from qpruner.report.statistics import (
    Difference,
    differences,
    differences_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    seeds_of,
)
from qpruner.runs.records import SEARCHED, Finalist, Results, TrialRecord, flat
from qpruner.search.progress import score_title, search_progress
from qpruner.search.trial_records import read_pulse
from qpruner.wording import counted

ENDS: tuple[Literal["finished", "stopped", "failed", "running"], ...] = (
    "finished",
    "stopped",
    "failed",
    "running",
)
"""The states in which trials are counted."""


def status(run: Snapshot, now: float) -> dict[str, Any]:
    """Return what `qpruner status` shows: stages with state and time, and the search.

    `now` is in Unix seconds.
    """
    return {
        "run": run.run_dir.storage.address,
        "outcome": run.outcome,
        "error": run.state.error,
        "host": run.process.host,
        "pid": run.process.pid,
        "started": run.state.started,
        "command": run.state.command,
        "folder": run.state.folder,
        "seconds_since_sign_of_life": max(0.0, now - run.last_sign),
        "stages": [_stage_status(run, name, now) for name in run.state.asked],
        "left_out": run.results.left_out,
        "search": _search_status(run),
        "to_compare": run.how_to_compare,
    }


def _stage_status(run: Snapshot, name: str, now: float) -> dict[str, Any]:
    """Return the state and time of a stage; `now` is in Unix seconds."""
    status: dict[str, Any] = {
        "stage": name,
        "state": "waiting",
        "seconds": None,
        "steps": None,
        "text": "",
    }
    stage = run.state.stages.get(name)
    if stage is None:
        return status
    status |= {"state": stage.state, "seconds": stage.seconds, "text": stage.text}
    if stage.state == "running":
        # After the command has ended, no stage runs.
        last = now if run.outcome == RUNNING else run.state.updated
        status |= {"state": run.outcome, "seconds": last - stage.started}
        if stage.total:
            status["steps"] = f"{stage.done}/{stage.total}"
    elif name == "search" and run.results.search:
        status["seconds"] = run.results.search.total_seconds
    return status


def _search_status(run: Snapshot) -> dict[str, Any] | None:
    search = run.state.search
    record = run.results.search
    if search is None:
        return None
    progress = search_progress(search, run.trials)
    best = progress.best
    control = progress.best_control
    failed = [trial for trial in progress.trials if trial.status == "failed"]
    return {
        **search.model_dump(),
        "score_title": score_title(search),
        **{name: progress.count(name) for name in ENDS},
        "trials": len(progress.trials),
        "under_way": [trial_row(run, trial) for trial in progress.running],
        "failures": [trial_row(run, trial) for trial in failed],
        "reused": len(run.trials) - len(progress.trials),
        "seconds_left": progress.seconds_left,
        "best": trial_row(run, best) if best else None,
        "best_control": trial_row(run, control) if control else None,
        "winner": record.best_index if record else None,
        "control_won": record.winner.control if record else None,
        "finalists": list(map(finalist_row, finalists(record))) if record else [],
    }


def finalist_row(finalist: Finalist) -> dict[str, Any]:
    """Return a finalist with the means of its scores over training seeds."""
    return {
        **finalist.model_dump(exclude={"fine_tunes"}),
        "origin": finalist.origin,
        "cut": finalist.cut,
        "plan_bytes": finalist.plan_bytes,
        **finalist.mean.model_dump(),
        "seeds": list(finalist.losses),
    }


def trial_row(run: Snapshot, trial: TrialRecord) -> dict[str, Any]:
    """Return a trial as a flat row: figures of its last rung, then the format of every group."""
    search = run.state.search
    record = run.results.search
    assert search
    last = trial.rungs[-1] if trial.rungs else None
    step = last.step if last else 0
    if not trial.is_over:
        pulse = read_pulse(run.run_dir.trials / search.trials_digest, trial.index)
        step = max(step, pulse.step if pulse else 0)
    return {
        "trial": trial.index,
        "winner": "yes" if record and trial.index == record.best_index else None,
        "from": trial.origin,
        "cut": trial.cut,
        "status": trial.status,
        "bytes": trial.plan_bytes,
        "mean_bits": trial.mean_bits,
        "plan": str(plan_of(trial)),
        "step": step,  # may be later than the last rung
        "rung": last.step if last else None,
        "loss": last.loss if last else None,
        "accuracy": last.accuracy if last else None,
        "train_loss": last.train_loss if last else None,
        "seconds": trial.seconds,
        "gpu_seconds": trial.gpu_seconds,
        "search": "this" if trial.search == search.search else "another",
        "failure": trial.failure,
        "reason": trial.reason,
        **{f"format {group}": name for group, name in trial.plan.items()},
    }


def winner(run: Snapshot) -> TrialRecord:
    """Return the trial that won the search, or that of the plan that the user gave (`--plan`).

    Raises `UserError` before the search is over.
    """
    if run.results.search:
        return trial(run, run.results.search.best_index)
    raise UserError(
        f"the search of {run.run_dir.place} is not over, so there is no winner yet: `qpruner "
        "status` shows the progress, and `qpruner plan --trial NUMBER` prints any plan"
    )


def trial(run: Snapshot, index: int) -> TrialRecord:
    """Return the trial whose number is `index`; raise `UserError` if there is none."""
    for trial in run.trials:
        if trial.index == index:
            return trial
    raise UserError(
        f"{run.run_dir.place} has no trial {index}, only {counted(len(run.trials), 'trial')}: "
        "`qpruner trials` lists them"
    )


def summary(run: Snapshot) -> dict[str, Any]:
    """Collect the figures of a run that `qpruner compare` shows."""
    config = run.state.config
    search = run.state.search
    record = run.results.search
    statuses = [trial.status for trial in run.own_trials]
    control = search_progress(search, run.trials).best_control if search else None
    facts: dict[str, Any] = {
        "run": run.run_dir.storage.address,
        "outcome": run.outcome,
        "model": config["model"]["source"],
        "searcher": record.searcher if record else config["search"]["searcher"],
        "metric": config["search"]["metric"],
        "budget_bytes": search.budget_bytes if search else None,
        **{name: statuses.count(name) for name in ENDS},
        "best_control": control.rungs[-1].value(search.metric) if search and control else None,
    }
    if record is None:
        return facts
    chosen = trial(run, record.best_index)
    fresh = record.winner
    mean_losses = [fmean(losses) for losses in zip(*fresh.losses.values(), strict=True)]
    facts |= {
        "winner": record.best_index,
        "from": record.winner.origin,
        "cut": record.winner.cut,
        "bytes": chosen.plan_bytes,
        "mean_bits": chosen.mean_bits,
        "formats": formats_text(chosen.plan),
        "validation_loss": chosen.rungs[-1].loss,
        "selection_loss": fresh.mean.loss,
        "selection_stderr": measures.over_questions(mean_losses).stderr,
        "search_hours": record.total_seconds / 3600,
        "search_gpu_hours": record.total_gpu_seconds / 3600,
        "run_hours": sum(run.results.seconds.values()) / 3600,
        "run_gpu_hours": sum(run.results.gpu_seconds.values()) / 3600,
    }
    return facts | _final(run.results)


def _final(results: Results) -> dict[str, float | str | None]:
    """Return the winner's figures after its fine-tune; empty before it is evaluated."""
    if not results.evaluate:
        return {}
    row = winner_row(results)
    return {
        "final_confirmation_loss": row.confirmation_loss,
        "test_metric": accuracy_in_full(results.evaluate.metrics),
        "test_accuracy": row.accuracy,
        "test_accuracy_spread": row.accuracy_spread,
        "test_accuracy_stderr": row.accuracy_stderr,
        "test_answer_loss": row.answer_loss,
        "perplexity": row.perplexity,
    }


def differing_settings(runs: Sequence[Snapshot]) -> dict[str, list[Any]]:
    """Return the settings that differ between runs: key -> one value per run, None if unset."""
    settings = [flat(_by_place(run.state.config)) for run in runs]
    differing = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(settings)):
        values = [of_run.get(key) for of_run in settings]
        if key != "output" and any(value != values[0] for value in values):
            differing[key] = values
    return differing


def _by_place(setting: Any) -> Any:
    """Turn lists of mappings into mappings by position, so that `data.train.0.limit` is one key."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        setting = {f"{place}": item for place, item in enumerate(setting)}
    if not isinstance(setting, dict):
        return setting
    return {key: _by_place(value) for key, value in setting.items()}


@dataclass(frozen=True)
class Against:
    """The figures of one run's fine-tuned winner minus those of another's.

    `seeds` are the training seeds that both runs have. `no_figures` says why nothing can be
    compared.
    """

    seeds: tuple[int, ...]
    more_bytes: float | None
    no_figures: str | None
    differences: tuple[Difference, ...] = ()


def against(run: Results, other: Results) -> Against:
    """Compare the fine-tuned winners of two runs, paired by training seed and shared data row."""
    if run.evaluate is None or other.evaluate is None:
        return Against((), None, "one of the runs has no final table yet")
    assert run.prepare and other.prepare
    pairs = paired(by_row(run)[SEARCHED], by_row(other)[SEARCHED])
    measured: dict[str, Sequence[measures.Answers]] = {}
    if pairs and run.evaluate.tested == other.evaluate.tested:
        measured |= over_questions(pairs)
    if pairs and run.prepare.digest == other.prepare.digest:
        measured |= over_confirmation_rows(pairs)
    if not measured:
        return Against(
            (),
            None,
            "the runs share no training seed, or neither test questions nor confirmation rows",
        )
    *_, decisive = measured  # the loss on confirmation rows, if both have them
    return Against(seeds_of(pairs), more_bytes(pairs), None, differences(pairs, measured, decisive))


def against_text(against: Against) -> str:
    """Describe the differences between two runs in one line."""
    if against.no_figures:
        return f"nothing to compare, {against.no_figures}"
    differences = differences_text(against.seeds, against.differences)
    return f"{against.more_bytes:+.2%} bytes, {differences}"
