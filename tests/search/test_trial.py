"""A trial resumed between two rungs, or trained again for the choice of the winner, is the same
training."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_has
from mixed_models import plan_job

from qpruner.data.encoding import load_scored
from qpruner.errors import TrainingDiverged
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline.context import Context
from qpruner.runs.records import SELECTION, RungResult
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob
from qpruner.training.finetune import DIVERGED_BY
from qpruner.training.jobs import FineTuneJob, Scoring, score, tune


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
    found = []

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
    # It was saved before the first rung.
    assert between.exists()
    assert rungs_from(between, job, tmp_path / "resumed") == whole


def test_training_again_under_the_own_seed_scores_the_same(job: TrialJob, tmp_path: Path) -> None:
    """So a further seed differs by its seed alone."""
    rungs_from(None, job, tmp_path)
    config = job.config
    materials = job.materials

    def fine_tune(folder: Path, seed: int, size: int | None = None) -> FineTuneJob:
        length = config.finetune.model_copy(update={"steps": config.search.steps, "epochs": None})
        changes: dict[str, Any] = {"finetune": length}
        if size:
            changes["training"] = config.training.model_copy(update={"micro_batch_size": size})
        own = config.model_copy(update=changes)
        made = plan_job(own, materials.banks[job.cut], materials.data, job.plan, folder, seed)
        return replace(made, scoring=Scoring(rows=SELECTION))

    seed = config.seed
    last = replace(fine_tune(tmp_path / "trial", seed), trained=tmp_path / "checkpoint-6")
    trial = score(last)
    assert tune(fine_tune(tmp_path / "again", seed))[0].losses == trial.losses
    other, _ = tune(fine_tune(tmp_path / "other", seed + 1))
    assert other.losses != trial.losses
    assert other.selection.loss == pytest.approx(trial.selection.loss, abs=0.3)
    smaller, _ = tune(fine_tune(tmp_path / "smaller", seed, size=2))
    assert smaller.selection.loss == pytest.approx(trial.selection.loss, abs=1e-3)


def test_a_training_that_diverged_has_the_worst_score(job: TrialJob, tmp_path: Path) -> None:
    """A winner must not be chosen among the seeds under which its plan happens to train."""
    training = job.config.training.model_copy(update={"learning_rate": 1e30})
    bank = job.materials.banks[job.cut]
    config = job.config.model_copy(update={"training": training})
    made = plan_job(config, bank, job.materials.data, job.plan, tmp_path / "diverged")
    made = replace(made, scoring=Scoring(digest="asked", rows=SELECTION))
    with pytest.raises(TrainingDiverged):
        tune(made)
    record, _ = tune(replace(made, survives_divergence=True))
    losses = record.losses[SELECTION]
    worst = math.log(len(load_tokenizer(str(bank.checkpoint)))) + DIVERGED_BY
    assert losses.mean == worst
    assert set(losses.by_row) == {worst}
    assert len(losses.by_row) == len(load_scored(job.materials.data, SELECTION))
    assert_has(record, scored="asked", accuracy=None, trained_sha256="")
    assert record.seconds > 0
