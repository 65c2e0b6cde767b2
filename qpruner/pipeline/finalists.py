"""Choose a search's finalists, score them on fresh rows, and choose the winner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qpruner.data.measures import accuracy_name
from qpruner.errors import StageError
from qpruner.plans.pareto import hypervolume, non_dominated
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.events import Progress
from qpruner.runs.records import GIVEN, Confirmation, FreshScore, FrontPoint, KeptScore, TrialRecord, digest_of
from qpruner.runs.storage import for_each, write_json
from qpruner.search.choice import finalist_positions, winner_position
from qpruner.search.trial_records import SETTING_REMEDIES, checkpoint_of, fresh_path, objective
from qpruner.training.table_rows import Candidate, ConfirmationJob, confirm_trial
from qpruner.wording import counted, error_text

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob
    from qpruner.pipeline.context import Context
    from qpruner.pipeline.stage import Stage

FINALISTS = "scoring finalists on fresh rows"
REMEDY = "mend the cause, delete the folders of those trials in the run's `trials`"
"""What to do when all trials failed and no word is known for the reason, or there are several."""


def plan_of(trial: TrialRecord) -> PrecisionPlan:
    """Return the plan of a trial."""
    return PrecisionPlan.from_dict(trial.plan)


def may_win(trial: TrialRecord, job: SearchJob) -> bool:
    """Whether a trial may win: a plan that was given in place of an earlier search may not."""
    return not trial.is_given or job.control_of(plan_of(trial)) is not None


def choose_finalists(trials: Sequence[TrialRecord], job: SearchJob) -> list[TrialRecord]:
    """Choose the best finished trials and every finished control; for a front, all trials that could be on it.

    Raises:
        StageError: If no trial finished, with the first reason.
    """
    if not trials:
        cause = "its hours were over before any machine took a trial"
        raise StageError("search", cause, "see why none came (`ray status`), allow more hours, then repeat the command")
    finished = sorted((trial for trial in trials if trial.status == "finished"), key=lambda trial: trial.index)
    if not finished:
        reasons = [trial.reason for trial in trials if trial.reason]
        kinds = {trial.failure for trial in trials}
        mend = SETTING_REMEDIES.get(kinds.pop() or "", REMEDY) if len(kinds) == 1 else REMEDY
        raise StageError(
            "search",
            f"none of {counted(len(trials), 'trial')} finished; the first said: {reasons[0] if reasons else 'nothing'}",
            f"{mend} and repeat the command",
        )
    scores = [objective(trial.rungs[-1], job.config) for trial in finished]
    are_controls = [job.control_of(plan_of(trial)) is not None for trial in finished]
    chosen = finalist_positions(scores, are_controls, job.config.search.confirm)
    if job.config.search.pareto:
        chosen += non_dominated([(trial.plan_bytes, score) for trial, score in zip(finished, scores, strict=True)])
    return [finished[position] for position in sorted(set(chosen))]


def finalists_beside(trials: Sequence[TrialRecord], given: PrecisionPlan, job: SearchJob) -> list[TrialRecord]:
    """Choose the trial of the given plan, and every control that a search has finished to compare it with."""
    tried = choose_finalists([trial for trial in trials if plan_of(trial) == given], job)
    controls = [trial for trial in trials if trial.status == "finished" and job.control_of(plan_of(trial))]
    return sorted({trial.index: trial for trial in (*tried, *controls)}.values(), key=lambda trial: trial.index)


def confirm(stage: Stage[Any], finalists: Sequence[TrialRecord], job: SearchJob) -> tuple[list[Confirmation], float]:
    """Score the finalists on fresh rows and report them; return them and the GPU seconds."""
    confirmations, scores = [], _fresh_scores(stage, finalists, job)
    for trial, score in zip(finalists, scores, strict=True):
        control, reused = job.control_of(plan_of(trial)), not job.owns(trial)
        each = Confirmation(
            index=trial.index,
            origin=control or (f"{trial.origin} of another search" if reused else trial.origin),
            control=control not in (None, GIVEN),
            reused=reused,
            **score.model_dump(exclude={"digest", "gpu_seconds"}),
        )
        text = f"finalist: trial {each.index} ({each.origin}), selection loss {each.loss:.4f}"
        text += error_text(each.stderr, 4)
        if each.accuracy is not None:
            name = accuracy_name(stage.context.inspection.metrics["search"])
            text += f", selection {name} {each.accuracy:.3f}{error_text(each.accuracy_stderr, 3)}"
        stage.tell(text)
        confirmations.append(each)
    return confirmations, sum(score.gpu_seconds for score in scores)


def _fresh_scores(stage: Stage[Any], finalists: Sequence[TrialRecord], job: SearchJob) -> list[KeptScore]:
    """Score each finalist on fresh rows; scores of an earlier command are reused."""
    context, paths = stage.context, [fresh_path(job.trials, trial.index) for trial in finalists]
    # Which rows there are is told by the folder of trials, as all that they were trained on.
    asked = (context.config.search.metric, context.inspection.questions["fresh"])
    digests = [digest_of(trial.checkpoint, *asked) for trial in finalists]
    kept = for_each(lambda path: stage.read_intact(path, KeptScore, job.trials, "that finalist is scored again"), paths)
    found = {at: score for at, score in enumerate(kept) if score and score.digest == digests[at]}
    context.emit(Progress(stage.name, len(found), len(finalists), FINALISTS))
    left = [position for position in range(len(finalists)) if position not in found]
    if left:
        resources, concurrent = context.task_resources(len(left))
        jobs = [_confirmation_job(context, finalists[at], job, int(resources.get("cpu", 1))) for at in left]
        held: list[float] = []
        for number, score in context.run_tasks(confirm_trial, jobs, resources, concurrent, on_held=held.append):
            position = left[number]
            found[position] = KeptScore(**score.model_dump(), digest=digests[position], gpu_seconds=held[-1])
            write_json(paths[position], found[position])
            context.emit(Progress(stage.name, len(found), len(finalists), FINALISTS))
    return [found[position] for position in range(len(finalists))]


def _confirmation_job(context: Context, trial: TrialRecord, job: SearchJob, threads: int) -> ConfirmationJob:
    checkpoint, title = checkpoint_of(job.trials, trial), f"trial {trial.index}"
    assert checkpoint is not None, "a finished trial has a checkpoint"
    seed = context.config.seed
    candidate = Candidate(trial.origin, title, context.checkpoint, context.bank, trial.plan, checkpoint, seed)
    return ConfirmationJob(context.worker_config, candidate, checkpoint, context.data, threads)


def best_of(confirmations: Sequence[Confirmation], job: SearchJob) -> Confirmation | None:
    """Return the best on fresh rows; a control wins a tie."""
    scores = [objective(each, job.config) for each in confirmations]
    position = winner_position(scores, [each.control for each in confirmations])
    return None if position is None else confirmations[position]


def front_of(
    confirmations: Sequence[Confirmation], trials: dict[int, TrialRecord], job: SearchJob
) -> tuple[FrontPoint, ...]:
    """List the confirmed plans that no plan of fewer or equal bytes beats, by bytes."""
    weighed = [(trials[each.index].plan_bytes, objective(each, job.config)) for each in confirmations]
    return tuple(
        FrontPoint(
            index=each.index,
            origin=each.origin,
            plan=trials[each.index].plan,
            plan_bytes=trials[each.index].plan_bytes,
            **each.model_dump(include=set(FreshScore.model_fields)),
        )
        for each in (confirmations[position] for position in non_dominated(weighed))
    )


def hypervolume_of(front: Sequence[FrontPoint], job: SearchJob) -> float:
    """Compute the hypervolume of a front, from its smallest plan to the budget."""
    points = [(point.plan_bytes, objective(point, job.config)) for point in front]
    return hypervolume(points, points[0], job.space.budget_bytes)
