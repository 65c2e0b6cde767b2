"""Choose a search's finalists, score them on fresh rows, and choose the winner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qpruner.data.measures import accuracy_name
from qpruner.errors import CorruptFile, StageError
from qpruner.plans.pareto import hypervolume, non_dominated
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.events import Message, Progress
from qpruner.runs.records import (
    GIVEN,
    Confirmation,
    FreshScore,
    FrontPoint,
    KeptScore,
    TrialRecord,
    digest_of,
)
from qpruner.runs.storage import for_each, quarantine, read_json, write_json
from qpruner.search.choice import finalist_positions, winner_position
from qpruner.search.trial_records import (
    SETTING_REMEDIES,
    checkpoint_of,
    fresh_path,
    objective,
)
from qpruner.training.table_rows import Candidate, CandidateJob, confirm_trial
from qpruner.wording import counted, error_text

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob
    from qpruner.pipeline.context import Context

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
    settings = job.config.search
    scores = [objective(trial.rungs[-1], job.config) for trial in finished]
    chosen = finalist_positions(
        scores, [job.control_of(plan_of(trial)) is not None for trial in finished], settings.confirm
    )
    if settings.pareto:
        weighed = [(trial.plan_bytes, score) for trial, score in zip(finished, scores, strict=True)]
        chosen += non_dominated(weighed)
    return [finished[position] for position in sorted(set(chosen))]


def finalists_beside(trials: Sequence[TrialRecord], given: PrecisionPlan, job: SearchJob) -> list[TrialRecord]:
    """Choose the trial of the given plan, and every control that a search has finished to compare it with.

    Raises:
        StageError: If the given plan's trial did not finish.
    """
    tried = choose_finalists([trial for trial in trials if plan_of(trial) == given], job)
    controls = [trial for trial in trials if trial.status == "finished" and job.control_of(plan_of(trial))]
    return sorted({trial.index: trial for trial in (*tried, *controls)}.values(), key=lambda trial: trial.index)


def confirm(
    context: Context, finalists: Sequence[TrialRecord], scores: Sequence[KeptScore], job: SearchJob
) -> list[Confirmation]:
    """Report the finalists with their scores on fresh rows."""
    confirmations = []
    for trial, score in zip(finalists, scores, strict=True):
        control, reused = job.control_of(plan_of(trial)), not job.owns(trial)
        each = Confirmation(
            index=trial.index,
            origin=control or (f"{trial.origin} of another search" if reused else trial.origin),
            control=control not in (None, GIVEN),
            reused=reused,
            **score.model_dump(exclude={"digest", "gpu_seconds"}),
        )
        text = (
            f"finalist: trial {each.index} ({each.origin}), selection loss {each.loss:.4f}{error_text(each.stderr, 4)}"
        )
        if each.accuracy is not None:
            name = accuracy_name(context.inspection.metrics["search"])
            text += f", selection {name} {each.accuracy:.3f}{error_text(each.accuracy_stderr, 3)}"
        context.emit(Message("search", text))
        confirmations.append(each)
    return confirmations


def fresh_scores(context: Context, finalists: Sequence[TrialRecord], job: SearchJob) -> list[KeptScore]:
    """Score each finalist on fresh rows; scores of an earlier command are reused."""
    from qpruner.cluster.tasks import run_tasks

    paths = [fresh_path(job.trials, trial.index) for trial in finalists]
    # Which rows there are is told by the folder of trials, as all that they were trained on.
    asked = (context.config.search.metric, context.inspection.questions["fresh"])
    digests = [digest_of(trial.checkpoint, *asked) for trial in finalists]
    found: dict[int, KeptScore] = {}
    for position, kept in enumerate(for_each(_kept_or_error, paths)):
        if isinstance(kept, CorruptFile):
            where = quarantine(paths[position], job.trials)
            context.emit(Message("search", f"warning: {kept}; set aside in {where}, that finalist is scored again"))
        elif kept and kept.digest == digests[position]:
            found[position] = kept
    context.emit(Progress("search", len(found), len(finalists), FINALISTS))
    left = [position for position in range(len(finalists)) if position not in found]
    if left:
        jobs, resources, concurrent = _confirmation_jobs(context, [finalists[position] for position in left], job)
        held: list[float] = []
        for number, score in run_tasks(
            confirm_trial,
            jobs,
            resources,
            concurrent,
            fresh=False,
            check_node=context.check_node,
            on_held=held.append,
        ):
            position = left[number]
            kept_score = KeptScore(**score.model_dump(), digest=digests[position], gpu_seconds=held[-1])
            write_json(paths[position], kept_score)
            found[position] = kept_score
            context.emit(Progress("search", len(found), len(finalists), FINALISTS))
    return [found[position] for position in range(len(finalists))]


def _kept_or_error(path: Path) -> KeptScore | CorruptFile | None:
    try:
        return read_json(path, KeptScore)
    except CorruptFile as error:
        return error


def _confirmation_jobs(
    context: Context, finalists: Sequence[TrialRecord], job: SearchJob
) -> tuple[list[CandidateJob], dict[str, float], int]:
    """Make a job for each finalist; return them, the resources of each, and how many run at once."""
    resources, concurrent = context.task_resources(len(finalists))
    jobs = []
    for trial in finalists:
        checkpoint = checkpoint_of(job.trials, trial)
        assert checkpoint is not None, "a finished trial has a checkpoint"
        seed = context.config.seed
        title = f"trial {trial.index}"
        candidate = Candidate(trial.origin, title, context.checkpoint, context.bank, trial.plan, checkpoint, seed)
        threads = int(resources.get("cpu", 1))
        jobs.append(CandidateJob(context.worker_config, candidate, context.data, threads))
    return jobs, resources, concurrent


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
