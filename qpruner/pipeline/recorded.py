"""What a run's folder holds already of what a command would do; nothing is run, mended or written to find out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qpruner.errors import CorruptFile
from qpruner.pipeline.bank import bank_stage
from qpruner.pipeline.comparison import comparison_jobs, comparison_stage
from qpruner.pipeline.compress import prepare_stage, sensitivity_stage
from qpruner.pipeline.context import Context
from qpruner.pipeline.finish import evaluate_jobs, evaluate_stage, finetune_stage, winner_jobs
from qpruner.pipeline.prune import prune_stage
from qpruner.pipeline.search import search_stage
from qpruner.pipeline.stage import Stage, matching
from qpruner.runs.records import (
    BankRecord,
    ComparisonRecord,
    EvalRecord,
    FinetuneRecord,
    PrepareRecord,
    PruneRecord,
    Record,
    Results,
    SearchRecord,
    SensitivityRecord,
)
from qpruner.runs.storage import exists
from qpruner.search.trial_records import readable_trials

Kind = TypeVar("Kind", bound=Record)


def recorded(context: Context) -> Results:
    """The records that `run` would skip stages for; whether their files are whole is left to it."""

    def known(name: str, kind: type[Kind], stage: Callable[[], Stage]) -> Kind | None:
        if not exists(context.run_dir.record_path(name)):
            return None  # what the stage depends on takes time to read
        try:
            return matching(context.run_dir, stage(), kind)
        except CorruptFile:
            return None

    prepared = known("prepare", PrepareRecord, lambda: prepare_stage(context))
    pruned = known("prune", PruneRecord, lambda: prune_stage(context, prepared)) if prepared else None
    banked = known("bank", BankRecord, lambda: bank_stage(context, pruned)) if pruned else None
    measured = (
        known("sensitivity", SensitivityRecord, lambda: sensitivity_stage(context, pruned, banked))
        if pruned and banked
        else None
    )
    searched = (
        known("search", SearchRecord, lambda: search_stage(context, banked, measured)) if banked and measured else None
    )
    tuned = (
        known("finetune", FinetuneRecord, lambda: finetune_stage(context, searched, winner_jobs(context, searched)))
        if searched
        else None
    )
    scored = (
        known("evaluate", EvalRecord, lambda: evaluate_stage(context, tuned, evaluate_jobs(context, tuned)))
        if tuned
        else None
    )
    compared = (
        known(
            "comparison",
            ComparisonRecord,
            lambda: comparison_stage(scored, comparison_jobs(context, searched, measured)),
        )
        if scored and searched and measured and context.config.finetune.compare
        else None
    )
    return Results(
        prepare=prepared,
        prune=pruned,
        bank=banked,
        sensitivity=measured,
        search=searched,
        finetune=tuned,
        evaluate=scored,
        comparison=compared,
    )


def shares_done(context: Context, found: Results) -> dict[str, float]:
    """How much of each stage is done, from 0 to 1; of a search that was begun, its trials that are over."""
    shares = {name: float(record is not None) for name, record in found}
    if found.bank and found.sensitivity and not found.search:
        trials_digest, search_digest = search_stage(context, found.bank, found.sensitivity).inputs[:2]
        trials = readable_trials(context.run_dir.trials / trials_digest)
        over = sum(trial.is_over and trial.search == search_digest for trial in trials)
        shares["search"] = min(1.0, over / context.config.num_trials)
    return shares
