"""Score finalists on fresh rows, and train those that cannot be told apart under further seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import RunConfig
from qpruner.pipeline.stage import Stage
from qpruner.pipeline.tuning import make_job, score_all, tune_all
from qpruner.plans.plan import plan_of
from qpruner.runs.records import GIVEN, SELECTION, Finalist, TrialRecord, digest_of
from qpruner.search import choice
from qpruner.search.trial_records import checkpoint_of
from qpruner.training.checkpoints import TRAINED_WEIGHTS
from qpruner.training.jobs import FineTuneJob, Scoring
from qpruner.wording import counted

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob

UNIT = "scoring finalists on fresh rows"
APART = 1000
"""Added to `seed` and 1 for the first further seed: the seeds that choose a winner must not judge
it afterwards.
"""


def score_finalists(
    stage: Stage[Any], trials: Sequence[TrialRecord], job: SearchJob
) -> list[Finalist]:
    """Score finished trials on rows that no trial has used."""
    jobs = [_trial_job(stage, trial, job) for trial in trials]
    scores = score_all(stage, jobs, UNIT)
    return [
        Finalist(
            index=trial.index,
            control=job.control_of(plan_of(trial)) not in (None, GIVEN),
            reused=not job.owns(trial),
            fits=job.fits(trial.cut, trial.plan_bytes),
            fine_tunes=(score,),
        )
        for trial, score in zip(trials, scores, strict=True)
    ]


def _trial_job(stage: Stage[Any], trial: TrialRecord, job: SearchJob) -> FineTuneJob:
    """Make the job that scores the last checkpoint of a finished trial."""
    checkpoint = checkpoint_of(job.trials, trial)
    assert checkpoint is not None, "a finished trial has a checkpoint"
    # Another session may leave another checkpoint of the same trial.
    of_trial = finalist_job(stage, trial, stage.config.seed, job, trial.checkpoint)
    last = trial.rungs[-1]
    known = {
        "steps": last.step,
        "train_loss": last.train_loss,
        "peak_memory_bytes": trial.peak_memory_bytes or 0,
        "memory_counter": trial.memory_counter or "",
        "trained_sha256": trial.checkpoint[TRAINED_WEIGHTS[of_trial.record.method]],
    }
    return replace(of_trial, record=of_trial.record.model_copy(update=known), trained=checkpoint)


def finalist_job(
    stage: Stage[Any],
    trial: TrialRecord,
    seed: int,
    job: SearchJob,
    checkpoint: Mapping[str, str] | None = None,
) -> FineTuneJob:
    """Make the job that trains the plan of a trial as long as a trial, and scores it.

    If the trial itself is scored, `checkpoint` has the sha256 of its files.
    """
    config = stage.context.worker_config
    search = config.search
    training = config.training
    if trial.micro_batch_size:
        training = training.model_copy(update={"micro_batch_size": trial.micro_batch_size})
    questions = stage.context.inspection.rows.questions["fresh"]
    digest = digest_of(search.metric, questions, checkpoint)
    scoring = Scoring(digest=digest, rows=SELECTION)
    if search.by_accuracy:
        assert search.limit is not None
        context = stage.context
        # The files of the user's own tasks may have changed.
        asked = (context.task_digest("search"), context.inspection.rows.metrics["search"])
        scoring = replace(
            scoring,
            digest=digest_of(digest, *asked),
            tasks=search.tasks,
            limit=search.limit,
            skip=search.limit,  # the questions after those of the trials
            metric=search.named_metric,
        )
    plan = plan_of(trial)
    control = job.control_of(plan)
    searched = trial.origin if job.owns(trial) else f"{trial.origin} of another search"
    origin = control or searched
    made = make_job(
        stage.context,
        plan,
        seed,
        scoring,
        name=origin,
        title=f"finalist trial {trial.index} ({origin})",
        origin=origin,
        config=config.model_copy(update={"finetune": config.trial_finetune, "training": training}),
        tunes_rounding=False,
    )
    return replace(made, survives_divergence=True)


def with_further_seeds(
    stage: Stage[Any],
    finalists: Sequence[Finalist],
    trials: Sequence[TrialRecord],
    job: SearchJob,
) -> list[Finalist]:
    """Train and score the `choice.contenders` in the budget under `search.confirm_seeds` seeds.

    `trials` are those of the finalists, in the same order. All finalists are returned.
    """
    settings = job.config.search
    able = [finalist for finalist in finalists if finalist.fits]
    positions = choice.contenders(
        [finalist.mean.cost(settings.metric) for finalist in able],
        [finalist.control for finalist in able],
        settings.confirm,
        [] if settings.by_accuracy else [finalist.losses[stage.config.seed] for finalist in able],
    )
    chosen = {able[position].index for position in positions}
    seeds = further_seeds(job.config)
    if len(chosen) < 2 or not seeds:
        return list(finalists)

    stage.notify(
        f"{counted(len(chosen), 'finalist')} cannot be told apart: each is trained again under "
        f"{counted(len(seeds), 'further seed')} (`search.confirm_seeds`)"
    )
    contenders = [trial for trial in trials if trial.index in chosen]
    jobs = [finalist_job(stage, trial, seed, job) for trial in contenders for seed in seeds]
    tuned = tune_all(stage, jobs)
    jobs = [replace(job, record=record) for job, record in zip(jobs, tuned, strict=True)]
    tuned = score_all(stage, jobs, UNIT)  # those whose questions have changed since
    more = {
        trial.index: tuple(tuned[place * len(seeds) : (place + 1) * len(seeds)])
        for place, trial in enumerate(contenders)
    }
    return [
        finalist.model_copy(
            update={"fine_tunes": finalist.fine_tunes + more.get(finalist.index, ())}
        )
        for finalist in finalists
    ]


def further_seeds(config: RunConfig) -> range:
    """Return the seeds of `search.confirm_seeds`.

    No trial and no row of the final table has any of them.
    """
    first = config.seed + 1 + APART
    return range(first, first + config.search.confirm_seeds)
