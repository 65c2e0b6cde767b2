"""Score finalists on fresh rows; train those that cannot be told apart under further seeds before
one of them wins."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import RunConfig
from qpruner.data.measures import over_questions
from qpruner.pipeline.comparison_rows import run_jobs
from qpruner.pipeline.stage import Stage
from qpruner.runs.events import Progress
from qpruner.runs.records import Confirmation, FreshScore, KeptScore, TrialRecord, digest_of
from qpruner.runs.storage import for_each, remove, write_json
from qpruner.search import choice
from qpruner.search.trial_records import trial_folder
from qpruner.training.table_rows import Candidate, confirm_seed, confirm_trial
from qpruner.wording import counted

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob

FINALISTS = "scoring finalists on fresh rows"
APART = 1000
"""Added to `seed` and 1 for the first further seed: the seeds that choose a winner must not judge
it afterwards."""


def with_further_seeds(
    stage: Stage[Any],
    confirmations: Sequence[Confirmation],
    trials: Mapping[int, TrialRecord],
    job: SearchJob,
) -> tuple[list[Confirmation], float]:
    """Score the `choice.contenders` among the finalists in the budget under `search.confirm_seeds`
    further seeds.

    Return all finalists, and the GPU seconds that training and scoring used.
    """
    settings, config = job.config.search, job.config
    able = [at for at, each in enumerate(confirmations) if each.fits]
    fitting = [confirmations[at] for at in able]
    scores, are_controls = (
        [each.cost(settings.metric) for each in fitting],
        [each.control for each in fitting],
    )
    losses = [] if settings.by_accuracy else [each.losses[config.seed] for each in fitting]
    chosen = [able[at] for at in choice.contenders(scores, are_controls, settings.confirm, losses)]
    if len(chosen) < 2 or not settings.confirm_seeds:
        return list(confirmations), 0.0
    seeds = further_seeds(config)
    stage.notify(
        f"{counted(len(chosen), 'finalist')} cannot be told apart: each is trained again under "
        f"{counted(len(seeds), 'further seed')} (`search.confirm_seeds`)"
    )
    wanted = {}
    for trial, seed in itertools.product((trials[confirmations[at].index] for at in chosen), seeds):
        folder = trial_folder(job.trials, trial.index) / f"seed-{seed}"
        wanted[folder.with_suffix(".json")] = (
            candidate_of(stage, trial, folder, seed),
            (trial.cut, trial.plan, seed),
        )
    found = kept_scores(stage, wanted, trains=True)
    confirmed, left = list(confirmations), iter(found)
    for at in chosen:
        confirmed[at] = _averaged(
            confirmations[at], dict(zip(seeds, itertools.islice(left, len(seeds)), strict=True))
        )
    return confirmed, sum(each.gpu_seconds for each in found)


def further_seeds(config: RunConfig) -> range:
    """Return the training seeds `search.confirm_seeds`, which neither a trial nor a row of the
    final table has."""
    return range(config.seed + 1 + APART, config.seed + 1 + APART + config.search.confirm_seeds)


def candidate_of(stage: Stage[Any], trial: TrialRecord, folder: Path, seed: int) -> Candidate:
    """Describe a finalist as a job for `run_jobs`."""
    about = (
        trial.origin,
        f"trial {trial.index}",
        stage.context.bank_of(trial.cut),
        trial.plan,
        folder,
        seed,
    )
    return Candidate(*about, cut=trial.cut, micro_batch_size=trial.micro_batch_size)


def _averaged(finalist: Confirmation, more: Mapping[int, KeptScore]) -> Confirmation:
    """Add the scores under further seeds to a finalist, whose own scores become means over all of
    its seeds."""
    losses = finalist.losses | {seed: score.losses for seed, score in more.items()}
    scores: list[FreshScore] = [finalist, *more.values()]
    update: dict[str, Any] = {
        "loss": fmean(score.loss for score in scores),
        "stderr": over_questions([fmean(row) for row in zip(*losses.values(), strict=True)]).stderr,
        "losses": losses,
    }
    for name in ("accuracy", "accuracy_stderr") if finalist.accuracy is not None else ():
        update[name] = fmean(getattr(score, name) or 0.0 for score in scores)
    return finalist.model_copy(update=update)


def kept_scores(
    stage: Stage[Any],
    wanted: Mapping[Path, tuple[Candidate, tuple[Any, ...]]],
    trains: bool = False,
) -> list[KeptScore]:
    """Score candidates on fresh rows, after a training or not, and keep each score in its file in a
    trial's folder.

    A score that an earlier command kept is reused if it depends on the same: the values beside the
    candidate, metric and questions. The name of the trials folder is a digest of what else the
    scores depend on.
    """
    context, files = stage.context, {job.folder: file for file, (job, _) in wanted.items()}
    asked = (context.config.search.metric, context.inspection.questions["fresh"])
    digests = {job.folder: digest_of(*inputs, *asked) for job, inputs in wanted.values()}

    def read(file: Path) -> KeptScore | None:
        return stage.read_intact(file, KeptScore, file.parents[1], "the finalist is scored again")

    kept = zip(files, for_each(read, list(wanted)), strict=True)
    found = {folder: score for folder, score in kept if score and score.digest == digests[folder]}
    jobs, held = [job for job, _ in wanted.values()], list[float]()
    if trains:
        for_each(remove, list(found))  # a killed driver may have left them
    else:
        context.emit(Progress(stage.name, len(found), len(files), FINALISTS))
    function, unit = (confirm_seed, "steps of finalists") if trains else (confirm_trial, FINALISTS)
    for job, score in run_jobs(stage, function, jobs, found, unit, on_held=held.append):
        found[job.folder] = KeptScore(
            **score.model_dump(), digest=digests[job.folder], gpu_seconds=held[-1]
        )
        write_json(files[job.folder], found[job.folder])
        if trains:
            remove(job.folder)
            stage.notify(f"finalist: {job.label}, selection loss {score.loss:.4f}")
        else:
            context.emit(Progress(stage.name, len(found), len(files), FINALISTS))
    return [found[folder] for folder in files]
