"""A trial resumed from a checkpoint between two rungs reports what an undisturbed one does."""

from __future__ import annotations

import shutil
from pathlib import Path

from qpruner.pipeline.context import Context
from qpruner.plans.plan import PRUNED
from qpruner.runs.records import RungResult
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob


def test_a_trial_resumed_between_rungs_scores_the_same(context: Context, tmp_path: Path) -> None:
    config = context.config.model_copy(
        update={"search": context.config.search.model_copy(update={"steps": 6, "first_rung": 3})}
    )
    plan = context.space.smallest()
    materials = Materials({PRUNED: context.checkpoint_of(PRUNED)}, {PRUNED: context.bank_of(PRUNED)}, context.data)
    job = TrialJob(config, materials, plan.as_dict(), save_seconds=0.0)
    saved: list[Path] = []

    def rungs_from(start: Path | None) -> list[RungResult]:
        found: list[RungResult] = []

        def report(result: RungResult | None, checkpoint: Path) -> None:
            if result:
                found.append(result)
            else:
                saved.append(shutil.copytree(checkpoint, tmp_path / f"{len(saved)}" / checkpoint.name))

        run_trial(job, start, report)
        return found

    whole = rungs_from(None)
    assert [(rung.step, len(rung.train_losses)) for rung in whole] == [(3, 3), (6, 3)]
    assert saved[0].name == "checkpoint-1", "saved before the first rung"
    assert rungs_from(saved[0]) == whole
