"""A trial resumed between two rungs, or trained again for the choice of the winner, is the same
training."""

import shutil
from pathlib import Path

import pytest

from qpruner.pipeline.context import Context
from qpruner.runs.records import RungResult
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob
from qpruner.training.table_rows import Candidate, CandidateJob, confirm_seed, confirm_trial


@pytest.fixture(scope="module")
def job(context: Context) -> TrialJob:
    """A trial of two rungs, saved as often as it can be."""
    search = context.config.search.model_copy(update={"steps": 6, "first_rung": 3})
    config = context.config.model_copy(update={"search": search})
    plan = context.shapes.space.spaces[0].smallest()
    cut = plan.cut
    materials = Materials({cut: context.places.bank_of(cut)}, context.places.data)
    return TrialJob(config, materials, plan.as_dict(), cut, save_seconds=0.0)


def rungs_from(start: Path | None, job: TrialJob, kept: Path) -> list[RungResult]:
    """Run a trial, return its rungs, and keep its checkpoints in a folder."""
    found: list[RungResult] = []

    def report(result: RungResult | None, checkpoint: Path) -> None:
        if result:
            found.append(result)
        shutil.copytree(checkpoint, kept / checkpoint.name)

    run_trial(job, start, report)
    return found


def test_a_trial_resumed_between_rungs_scores_the_same(job: TrialJob, tmp_path: Path) -> None:
    whole = rungs_from(None, job, tmp_path / "whole")
    assert [(rung.step, len(rung.train_losses)) for rung in whole] == [(3, 3), (6, 3)]
    between = tmp_path / "whole" / "checkpoint-1"
    # Saved before the first rung.
    assert between.exists()
    assert rungs_from(between, job, tmp_path / "resumed") == whole


def test_training_again_under_the_own_seed_scores_the_same(job: TrialJob, tmp_path: Path) -> None:
    """So a further seed differs by its seed alone, though the final fine-tune is longer and takes
    larger batches."""
    rungs_from(None, job, tmp_path)
    config = job.config
    materials = job.materials

    def candidate(folder: Path, seed: int, size: int | None = None) -> CandidateJob:
        bank = materials.banks[job.cut]
        each = Candidate("gp", "trial 0", bank, job.plan, folder, seed, micro_batch_size=size)
        longer = config.model_copy(
            update={"finetune": config.finetune.model_copy(update={"steps": 50})}
        )
        return CandidateJob(longer, each, materials.data, threads=1)

    seed = config.seed
    trial = confirm_trial(candidate(tmp_path / "checkpoint-6", seed))
    assert confirm_seed(candidate(tmp_path / "again", seed)) == trial
    other = confirm_seed(candidate(tmp_path / "other", seed + 1))
    assert other.losses != trial.losses
    assert other.loss == pytest.approx(trial.loss, abs=0.3)
    smaller = confirm_seed(candidate(tmp_path / "smaller", seed, size=2))
    assert smaller.loss == pytest.approx(trial.loss, abs=1e-3)
