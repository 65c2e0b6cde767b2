"""The search stage: controls, trials under Ray Tune, and the choice among the best on fresh rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qpruner.candidates import Candidate, ConfirmationJob, confirm_trial
from qpruner.errors import StageError
from qpruner.events import Message
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import Stage, run_stage
from qpruner.plan import PrecisionPlan
from qpruner.records import BankRecord, Confirmation, SearchRecord, SensitivityRecord, TrialRecord, digest_of
from qpruner.rundir import write_json
from qpruner.search.trial_records import checkpoint_of, objective, read_trials
from qpruner.sensitivity.mutual_information import seed_plan

MUTUAL_INFORMATION_SEED = "seed-mutual-information"


def search(context: Context, banked: BankRecord, measured: SensitivityRecord) -> SearchRecord:
    """Candidate plans as parallel trials; the best few are scored again on the confirmation rows."""
    config, settings, space = context.config, context.config.search, context.space
    # What a trial's result depends on: another number of trials or slots goes on from the same ones.
    open_ended = settings.model_copy(
        update={"trials": 1, "confirm": 1, "max_concurrent": None, "resources_per_trial": None}
    )
    inputs = (
        banked.digest,
        measured.digest,
        config.training,
        config.lora,
        config.seed,
        space.budget_bytes,
        space.levels,
    )
    tasks = context.task_digest if settings.tasks else ""
    trials_digest = digest_of("trials", *inputs, open_ended, config.evaluate.batch_size, tasks)
    detail = (
        f"{settings.trials} trials of {settings.steps} steps, {settings.searcher}, "
        f"budget {space.budget_bytes / 1e6:.1f} MB"
    )
    stage = Stage("search", detail, (trials_digest, settings.trials, settings.confirm))

    def work(scratch: Path) -> dict[str, Any]:
        from qpruner.search import tune as ray_tune
        from qpruner.search.trial import Materials

        resources = context.trial_resources()
        job = ray_tune.SearchJob(
            config=context.worker_config,
            materials=Materials(context.checkpoint, context.bank, context.data),
            layout=context.layout,
            space=space,
            controls=controls(context, measured),
            priors={},
            trials=context.run_dir.trials / trials_digest,
            scratch=context.run_dir.tune,
            digest=trials_digest,
            resources=resources,
            max_concurrent=context.slots.concurrent(resources, settings.max_concurrent),
        )
        resumed = sum(1 for trial in read_trials(job.trials) if trial.rungs)
        if resumed:
            context.emit(Message("search", f"going on from {resumed} recorded trial(s)"))
        trials = ray_tune.search(job, context.emit)
        finalists = _finalists(trials, settings.confirm, job)
        confirmations = _confirm(context, finalists, job.trials)
        best = _choose(finalists, confirmations)
        write_json(scratch / "best.json", best)
        count = {name: sum(1 for trial in trials if trial.status == name) for name in ("finished", "stopped", "failed")}
        return {
            "trials_digest": trials_digest,
            "searcher": settings.searcher,
            "budget_bytes": space.budget_bytes,
            "num_trials": len(trials),
            "num_finished": count["finished"],
            "num_stopped": count["stopped"],
            "num_failed": count["failed"],
            "confirmations": confirmations,
            "best_index": best.index,
            "best_origin": best.origin,
            "best_plan": best.plan,
            "resumed": resumed,
        }

    def figures(record: SearchRecord) -> str:
        return (
            f"{record.num_finished} finished, {record.num_stopped} stopped early, {record.num_failed} failed; best: "
            f"trial {record.best_index} [{PrecisionPlan.from_dict(record.best_plan)}] ({record.best_origin})"
        )

    return run_stage(context.run_dir, stage, SearchRecord, work, figures, context.emit)


def controls(context: Context, measured: SensitivityRecord) -> list[tuple[str, PrecisionPlan]]:
    """The plans every search starts with: uniform ones inside the budget, and the mutual-information seed."""
    space = context.space
    uniform = [(f"uniform-{bits}", space.uniform(bits)) for bits in space.levels]
    seed = (MUTUAL_INFORMATION_SEED, seed_plan(measured.mutual_information_nats, space))
    return [(origin, plan) for origin, plan in [*uniform, seed] if space.is_feasible(plan)]


def _finalists(trials: list[TrialRecord], num_best: int, job: Any) -> list[TrialRecord]:
    """The best finished trials and every finished control.

    Raises:
        StageError: If no trial finished, with the first reason.
    """
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        reasons = [trial.reason for trial in trials if trial.reason]
        diverged = bool(reasons) and all("TrainingDiverged" in reason for reason in reasons)
        mend = "lower `training.learning_rate`" if diverged else "mend the cause, delete the run's trials folder"
        raise StageError(
            "search",
            f"none of {len(trials)} trials finished; the first said: {reasons[0] if reasons else 'nothing'}",
            f"{mend} and repeat the command",
        )
    ranked = sorted(finished, key=lambda trial: (objective(trial.rungs[-1], job.config), trial.index))
    chosen = {trial.index: trial for trial in [*ranked[:num_best], *(t for t in finished if t.is_control)]}
    return [chosen[index] for index in sorted(chosen)]


def _confirm(context: Context, finalists: list[TrialRecord], trials: Path) -> list[Confirmation]:
    """Loss of each finalist on rows that no trial was scored on."""
    from qpruner.execution.cluster import run_tasks

    resources, concurrent = context.task_resources(len(finalists))
    jobs = []
    for trial in finalists:
        checkpoint = checkpoint_of(trials, trial)
        assert checkpoint is not None, "a finished trial has a checkpoint"
        candidate = Candidate(trial.origin, context.checkpoint, context.bank, trial.plan, checkpoint)
        threads = int(resources.get("cpu", 1))
        jobs.append(ConfirmationJob(context.worker_config, candidate, checkpoint, context.data, threads))
    found: dict[int, Confirmation] = {}
    for position, (loss, stderr) in run_tasks(confirm_trial, jobs, resources, concurrent, fresh=False):
        index = finalists[position].index
        found[index] = Confirmation(index=index, loss=loss, stderr=stderr)
    for index in sorted(found):
        origin = next(trial.origin for trial in finalists if trial.index == index)
        text = f"confirmation: trial {index} ({origin}) loss {found[index].loss:.4f} +- {found[index].stderr:.4f}"
        context.emit(Message("search", text))
    return [found[index] for index in sorted(found)]


def _choose(finalists: list[TrialRecord], confirmations: list[Confirmation]) -> TrialRecord:
    """The finalist with the lowest confirmation loss; a control wins like any other plan."""
    best = min(confirmations, key=lambda confirmation: (confirmation.loss, confirmation.index))
    return next(trial for trial in finalists if trial.index == best.index)
