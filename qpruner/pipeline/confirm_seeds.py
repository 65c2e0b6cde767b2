"""Train the finalists that cannot be told apart again, under further seeds, before one of them wins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qpruner.data.measures import over_questions
from qpruner.pipeline.comparison_rows import job_progress, run_jobs
from qpruner.pipeline.stage import Stage
from qpruner.runs.records import Confirmation, FinalistScore, KeptScore, TrialRecord, digest_of
from qpruner.runs.storage import for_each, published_folders, remove, write_json
from qpruner.search import choice
from qpruner.search.trial_records import objective, trial_folder
from qpruner.training.table_rows import Candidate, confirm_seed
from qpruner.wording import counted

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob


def with_further_seeds(
    stage: Stage[Any], confirmations: Sequence[Confirmation], trials: Mapping[int, TrialRecord], job: SearchJob
) -> tuple[list[Confirmation], float]:
    """Score the `choice.contenders` among the finalists in the budget under `search.confirm_seeds` further seeds.

    Return all finalists, and the GPU seconds that training and scoring used.
    """
    settings, config = job.config.search, job.config
    able = [at for at, each in enumerate(confirmations) if each.fits]
    fitting = [confirmations[at] for at in able]
    scores, are_controls = [objective(each, config) for each in fitting], [each.control for each in fitting]
    losses = [] if settings.by_accuracy else [each.losses for each in fitting]
    chosen = [able[at] for at in choice.contenders(scores, are_controls, settings.confirm, losses)]
    if len(chosen) < 2 or not settings.confirm_seeds:
        return list(confirmations), 0.0
    seeds = range(config.seed + 1, config.seed + 1 + settings.confirm_seeds)
    stage.notify(
        f"{counted(len(chosen), 'finalist')} cannot be told apart: each is trained again under "
        f"{counted(len(seeds), 'further seed')} (`search.confirm_seeds`)"
    )
    wanted = list(itertools.product((trials[confirmations[at].index] for at in chosen), seeds))
    found = iter(_scores(stage, wanted, job))
    confirmed, gpu_seconds = list(confirmations), 0.0
    for at in chosen:
        more = list(itertools.islice(found, len(seeds)))
        gpu_seconds += sum(each.gpu_seconds for each in more)
        confirmed[at] = _averaged(confirmations[at], more)
    return confirmed, gpu_seconds


def _averaged(finalist: Confirmation, more: Sequence[KeptScore]) -> Confirmation:
    """Average the scores of a finalist over its training seeds, the losses row by row."""
    scores: list[FinalistScore] = [finalist, *more]
    rows, seed_losses = [each.losses for each in scores], tuple(each.loss for each in scores)
    losses = [fmean(row) for row in zip(*rows, strict=True)] if all(rows) else []  # one that diverged has none
    update = {
        "loss": fmean(seed_losses),
        "stderr": over_questions(losses).stderr if losses else math.nan,
        "losses": tuple(round(each, 5) for each in losses),
        "seed_losses": seed_losses,
    }
    for name in ("accuracy", "accuracy_stderr") if finalist.accuracy is not None else ():
        update[name] = fmean(getattr(each, name) or 0.0 for each in scores)
    return finalist.model_copy(update=update)


def _scores(stage: Stage[Any], wanted: Sequence[tuple[TrialRecord, int]], job: SearchJob) -> list[KeptScore]:
    """Train each trial's plan under a seed, and score it on fresh rows; reuse the scores of an earlier command."""
    context, folders = stage.context, [trial_folder(job.trials, trial.index) / f"seed-{seed}" for trial, seed in wanted]
    paths = [folder.with_suffix(".json") for folder in folders]
    # The name of the trials folder is a digest of what else the scores depend on.
    asked = (context.config.search.metric, context.inspection.questions["fresh"])
    digests = [digest_of(trial.cut, trial.plan, seed, *asked) for trial, seed in wanted]
    kept = for_each(lambda path: stage.read_intact(path, KeptScore, job.trials, "the finalist is trained again"), paths)
    found = {at: score for at, score in enumerate(kept) if score and score.digest == digests[at]}
    left = [at for at in range(len(wanted)) if at not in found]
    jobs, held = [_candidate(stage, *wanted[at], folders[at]) for at in left], list[float]()
    ticks = job_progress(stage, [each.progress for each in jobs], len(wanted), "steps of finalists")

    def saved(position: int) -> list[Path]:
        return sorted(published_folders(jobs[position].checkpoints))

    for number, score in run_jobs(context, confirm_seed, jobs, on_held=held.append, on_tick=ticks, progress=saved):
        at = left[number]
        found[at] = KeptScore(**score.model_dump(), digest=digests[at], gpu_seconds=held[-1])
        write_json(paths[at], found[at])
        remove(folders[at])
        stage.notify(f"finalist: {jobs[number].label}, selection loss {score.loss:.4f}")
    return [found[at] for at in range(len(wanted))]


def _candidate(stage: Stage[Any], trial: TrialRecord, seed: int, folder: Path) -> Candidate:
    context = stage.context
    return Candidate(
        name=trial.origin,
        title=f"trial {trial.index}",
        bank=context.bank_of(trial.cut),
        plan=trial.plan,
        folder=folder,
        seed=seed,
        cut=trial.cut,
        micro_batch_size=trial.micro_batch_size,
    )
