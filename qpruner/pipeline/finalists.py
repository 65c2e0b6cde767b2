"""Score finalists on fresh rows, and train those that cannot be told apart under further seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import RunConfig
from qpruner.data.measures import accuracy_name, over_questions
from qpruner.pipeline.comparison_rows import run_jobs
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import plan_of
from qpruner.runs.events import Progress
from qpruner.runs.records import GIVEN, Finalist, FreshScore, TrialRecord, digest_of
from qpruner.runs.storage import for_each, remove, write_json
from qpruner.search import choice
from qpruner.search.trial_records import checkpoint_of, trial_folder
from qpruner.training.table_rows import Candidate, confirm_seed, confirm_trial
from qpruner.wording import counted, error_text

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob

UNIT = "scoring finalists on fresh rows"
APART = 1000
"""Added to `seed` and 1 for the first further seed: the seeds that choose a winner must not judge
it afterwards.
"""


@dataclass(frozen=True)
class Scoring:
    """A finalist to score on fresh rows.

    It has the file that keeps its score, and the digest of all that the score depends on beside the
    folder of the trials.
    """

    candidate: Candidate
    file: Path
    digest: str


def score_finalists(
    stage: Stage[Any], trials: Sequence[TrialRecord], job: SearchJob
) -> list[Finalist]:
    """Score finished trials on rows that no trial has used."""
    seed = stage.config.seed
    wanted = []
    for trial in trials:
        checkpoint = checkpoint_of(job.trials, trial)
        assert checkpoint is not None, "a finished trial has a checkpoint"
        file = trial_folder(job.trials, trial.index) / "fresh.json"
        wanted.append(_scoring(stage, trial, checkpoint, seed, file, trial.checkpoint))

    finalists = []
    for trial, score in zip(trials, kept_scores(stage, wanted, trains=False), strict=True):
        control = job.control_of(plan_of(trial))
        reused = not job.owns(trial)
        finalist = Finalist(
            index=trial.index,
            origin=control or (f"{trial.origin} of another search" if reused else trial.origin),
            control=control not in (None, GIVEN),
            reused=reused,
            cut=trial.cut,
            plan=trial.plan,
            plan_bytes=trial.plan_bytes,
            fits=job.fits(trial.cut, trial.plan_bytes),
            scores={seed: score},
        )
        _tell(stage, finalist)
        finalists.append(finalist)
    return finalists


def _tell(stage: Stage[Any], finalist: Finalist) -> None:
    score = finalist.of_trial
    loss = f"selection loss {score.loss:.4f}{error_text(over_questions(score.losses).stderr, 4)}"
    text = f"finalist: trial {finalist.index} ({finalist.origin}), {loss}"
    if score.accuracy is not None:
        name = accuracy_name(stage.context.inspection.rows.metrics["search"])
        accuracy = f"{score.accuracy:.3f}{error_text(score.accuracy_stderr, 3)}"
        text += f", selection {name} {accuracy}"
    stage.notify(text)


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
        [] if settings.by_accuracy else [finalist.of_trial.losses for finalist in able],
    )
    chosen = {able[position].index for position in positions}
    seeds = further_seeds(job.config)
    if len(chosen) < 2 or not seeds:
        return list(finalists)

    stage.notify(
        f"{counted(len(chosen), 'finalist')} cannot be told apart: each is trained again under "
        f"{counted(len(seeds), 'further seed')} (`search.confirm_seeds`)"
    )
    wanted = {}
    for trial in trials:
        for seed in seeds if trial.index in chosen else ():
            folder = trial_folder(job.trials, trial.index) / f"seed-{seed}"
            depends_on = (trial.cut, trial.plan, seed)
            file = folder.with_suffix(".json")
            wanted[trial.index, seed] = _scoring(stage, trial, folder, seed, file, *depends_on)
    scores = dict(zip(wanted, kept_scores(stage, list(wanted.values()), trains=True), strict=True))

    confirmed = []
    for finalist in finalists:
        more = {seed: score for (index, seed), score in scores.items() if index == finalist.index}
        confirmed.append(finalist.model_copy(update={"scores": finalist.scores | more}))
    return confirmed


def further_seeds(config: RunConfig) -> range:
    """Return the seeds of `search.confirm_seeds`.

    No trial and no row of the final table has any of them.
    """
    first = config.seed + 1 + APART
    return range(first, first + config.search.confirm_seeds)


def _scoring(
    stage: Stage[Any], trial: TrialRecord, folder: Path, seed: int, file: Path, *depends_on: Any
) -> Scoring:
    candidate = Candidate(
        name=trial.origin,
        title=f"trial {trial.index}",
        bank=stage.context.places.bank_of(trial.cut),
        plan=trial.plan,
        folder=folder,
        seed=seed,
        cut=trial.cut,
        micro_batch_size=trial.micro_batch_size,
    )
    questions = stage.context.inspection.rows.questions["fresh"]
    digest = digest_of(*depends_on, stage.config.search.metric, questions)
    return Scoring(candidate, file, digest)


def kept_scores(stage: Stage[Any], wanted: Sequence[Scoring], trains: bool) -> list[FreshScore]:
    """Score finalists on fresh rows, after a training or not; reuse scores that are kept."""

    def read(scoring: Scoring) -> FreshScore | None:
        trials = scoring.file.parents[1]
        return stage.read_intact(scoring.file, FreshScore, trials, "the finalist is scored again")

    by_folder = {scoring.candidate.folder: scoring for scoring in wanted}
    scores = {}
    for scoring, score in zip(wanted, for_each(read, wanted), strict=True):
        if score and score.scored == scoring.digest:
            scores[scoring.candidate.folder] = score
    if trains:
        for_each(remove, list(scores))  # a killed driver may have left them
    else:
        stage.context.emit(Progress(stage.name, len(scores), len(wanted), UNIT))

    function = confirm_seed if trains else confirm_trial
    unit = "steps of finalists" if trains else UNIT
    jobs = [scoring.candidate for scoring in wanted]
    held: list[float] = []
    for job, score in run_jobs(stage, function, jobs, scores, unit, on_held=held.append):
        scoring = by_folder[job.folder]
        measured = {"scored": scoring.digest, "gpu_seconds": held[-1]}
        scores[job.folder] = score.model_copy(update=measured)
        write_json(scoring.file, scores[job.folder])
        if trains:
            remove(job.folder)
            stage.notify(f"finalist: {job.label}, selection loss {score.loss:.4f}")
        else:
            stage.context.emit(Progress(stage.name, len(scores), len(wanted), UNIT))
    return [scores[scoring.candidate.folder] for scoring in wanted]
