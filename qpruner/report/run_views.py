"""Computes what `qpruner status`, `trials`, `plan` and `compare` show of a run.

It needs no heavy imports.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qpruner.data import measures
from qpruner.data.measures import accuracy_in_full
from qpruner.errors import UserError
from qpruner.plans.plan import formats_text, plan_of
from qpruner.report.claim import finalists
from qpruner.report.results import by_row, rows
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


def status(run: Snapshot, now: float) -> dict[str, Any]:
    """Return what `qpruner status` shows: stages with state and time, and the search.

    `now` is in Unix seconds.
    """
    stages: list[dict[str, Any]] = []
    for name in run.state.asked:
        if (state := run.state.stages.get(name)) is None:
            stages.append(
                {"stage": name, "state": "waiting", "seconds": None, "steps": None, "text": ""}
            )
            continue
        is_running = state.state == "running"
        shown = run.outcome if is_running else state.state  # a command that ended runs no stage
        steps = f"{state.done}/{state.total}" if state.total and is_running else None
        recorded = (
            run.results.search.total_seconds
            if name == "search" and run.results.search
            else state.seconds
        )
        seconds = (
            (now if shown == RUNNING else run.state.updated) - state.started
            if is_running
            else recorded
        )
        stages.append(
            {"stage": name, "state": shown, "seconds": seconds, "steps": steps, "text": state.text}
        )
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
        "stages": stages,
        "left_out": run.results.left_out,
        "search": _search_status(run),
        "to_compare": run.how_to_compare,
    }


def _search_status(run: Snapshot) -> dict[str, Any] | None:
    search, record = run.state.search, run.results.search
    if search is None:
        return None
    now = search_progress(search, run.trials)
    return {
        **search.model_dump(),
        "score_title": score_title(search),
        **{name: now.count(name) for name in ("finished", "stopped", "failed", "running")},
        "trials": len(now.trials),
        "under_way": [trial_row(run, trial) for trial in now.running],
        "failures": [trial_row(run, trial) for trial in now.trials if trial.status == "failed"],
        "reused": len(run.trials) - len(now.trials),
        "seconds_left": now.seconds_left,
        "best": trial_row(run, now.best) if now.best else None,
        "best_control": trial_row(run, now.best_control) if now.best_control else None,
        "winner": record.best_index if record else None,
        "control_won": record.control_won if record else None,
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
    last = trial.rungs[-1] if trial.rungs else None
    search, record = run.state.search, run.results.search
    assert search
    pulse = (
        None
        if trial.is_over
        else read_pulse(run.run_dir.trials / search.trials_digest, trial.index)
    )
    return {
        "trial": trial.index,
        "winner": "yes" if record and trial.index == record.best_index else None,
        "from": trial.origin,
        "cut": trial.cut,
        "status": trial.status,
        "bytes": trial.plan_bytes,
        "mean_bits": trial.mean_bits,
        "plan": str(plan_of(trial)),
        # may be later than the last rung
        "step": max(last.step if last else 0, pulse.step if pulse else 0),
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
    """Return the winner's trial, or that of a given plan (`--plan`).

    Raises `UserError` before the search is over.
    """
    if run.results.search:
        return trial(run, run.results.search.best_index)
    raise UserError(
        f"the search of {run.run_dir.place} is not over, so there is no winner yet: `qpruner "
        "status` shows the progress, and `qpruner plan --trial NUMBER` prints any plan"
    )


def trial(run: Snapshot, index: int) -> TrialRecord:
    """Return the trial with a number; raise `UserError` if there is none."""
    if (found := next((each for each in run.trials if each.index == index), None)) is None:
        raise UserError(
            f"{run.run_dir.place} has no trial {index}, only {counted(len(run.trials), 'trial')}: "
            "`qpruner trials` lists them"
        )
    return found


def summary(run: Snapshot) -> dict[str, Any]:
    """Collect the figures of a run that `qpruner compare` shows."""
    config, search, record = run.state.config, run.state.search, run.results.search
    statuses = [trial.status for trial in run.own_trials]
    control = search_progress(search, run.trials).best_control if search else None
    facts: dict[str, Any] = {
        "run": run.run_dir.storage.address,
        "outcome": run.outcome,
        "model": config["model"]["source"],
        "searcher": record.searcher if record else config["search"]["searcher"],
        "metric": config["search"]["metric"],
        "budget_bytes": search.budget_bytes if search else None,
        **{name: statuses.count(name) for name in ("finished", "stopped", "failed", "running")},
        "best_control": control.rungs[-1].value(search.metric) if search and control else None,
    }
    if record is None:
        return facts
    chosen = trial(run, record.best_index)
    fresh = record.winner
    mean_losses = [fmean(losses) for losses in zip(*fresh.losses.values(), strict=True)]
    facts |= {
        "winner": record.best_index,
        "from": record.best_origin,
        "cut": record.best_cut,
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
    row = next(each for each in rows(results) if each.name == SEARCHED)
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
    keys = dict.fromkeys(key for each in settings for key in each if key != "output")
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {
        key: found for key, found in values.items() if any(value != found[0] for value in found)
    }


def _by_place(setting: Any) -> Any:
    """Turn lists of mappings into mappings by position, so that `data.train.0.limit` is one key."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        setting = {f"{place}": item for place, item in enumerate(setting)}
    return (
        {key: _by_place(value) for key, value in setting.items()}
        if isinstance(setting, dict)
        else setting
    )


@dataclass(frozen=True)
class Against:
    """The figures of one run's fine-tuned winner minus those of another's.

    They are taken over the training seeds that both runs have. `no_figures` says why nothing can be
    compared.
    """

    seeds: tuple[int, ...]
    more_bytes: float | None
    no_figures: str | None
    differences: tuple[Difference, ...] = ()


def against(run: Results, other: Results) -> Against:
    """Compare the fine-tuned winners of two runs on the data that both share.

    The comparison is paired by training seed and data row.
    """
    if (
        run.finetune is None
        or other.finetune is None
        or run.evaluate is None
        or other.evaluate is None
    ):
        return Against((), None, "one of the runs has no final table yet")
    pairs = paired(by_row(run)[SEARCHED], by_row(other)[SEARCHED])
    prepared = [each.prepare.digest if each.prepare else None for each in (run, other)]
    measured = (
        dict(over_questions(pairs))
        if pairs and run.evaluate.tested == other.evaluate.tested
        else {}
    )
    if pairs and prepared[0] == prepared[1]:
        measured |= over_confirmation_rows(pairs)
    if not measured:
        return Against(
            (),
            None,
            "the runs share no training seed, or neither test questions nor confirmation rows",
        )
    *_, decisive = measured  # the loss on confirmation rows, if both have them
    return Against(seeds_of(pairs), more_bytes(pairs), None, differences(pairs, measured, decisive))


def against_text(found: Against) -> str:
    """Describe the differences between two runs in one line."""
    if found.no_figures:
        return f"nothing to compare, {found.no_figures}"
    return f"{found.more_bytes:+.2%} bytes, {differences_text(found.seeds, found.differences)}"
