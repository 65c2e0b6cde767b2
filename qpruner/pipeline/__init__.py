"""The flow, top to bottom: prepare, prune, sensitivity, bank, search, finetune, evaluate, report.

Each stage leaves a record; a stage whose record has the digest of its present inputs is skipped, which makes
`qpruner run` safe to repeat after any crash.
"""

from __future__ import annotations

from pathlib import Path

from qpruner import preflight
from qpruner.config import RunConfig
from qpruner.events import Emit
from qpruner.execution.cluster import local_slots
from qpruner.pipeline.compress import bank, prepare, sensitivity
from qpruner.pipeline.context import Context
from qpruner.pipeline.finish import evaluate, finetune
from qpruner.pipeline.prune import preview_prune, prune
from qpruner.pipeline.report import report
from qpruner.pipeline.search import search
from qpruner.pipeline.stage import explained
from qpruner.records import PruneRecord, Results
from qpruner.rundir import RunDir

STAGES = ("prepare", "prune", "sensitivity", "bank", "search", "finetune", "evaluate", "report")


def _check_slots(context: Context) -> None:
    """Refuse a trial that does not fit the cluster now, not after pruning; joins a cluster that was named."""
    slots = context.slots if context.address else local_slots()
    asked = context.config.search.resources_per_trial
    slots.concurrent(slots.resources_per_trial(asked.model_dump() if asked else None), None)


def run(config: RunConfig, emit: Emit, address: str | None = None, until: str = "report") -> Results:
    """Run the flow up to a stage, skipping what is recorded.

    Args:
        config: The configuration.
        emit: Told of every event.
        address: A running Ray cluster to join; None starts Ray on this machine when it is needed.
        until: The last stage to run, one of `STAGES`.

    Returns:
        The records so far; those of stages after `until` are None.

    Raises:
        UserError: Before any weight is loaded, when the input cannot work.
        StageError: When a stage cannot go on.
    """
    inspection = preflight.inspect(config)
    context = Context(config, RunDir(Path(config.output)), emit, address, inspection)
    last = STAGES.index(until)
    if last >= STAGES.index("sensitivity"):
        preflight.check_quantizable(inspection.model_config)
    try:
        if last >= STAGES.index("search"):
            _check_slots(context)
        prepared = prepare(context)
        pruned = prune(context, prepared) if last >= 1 else None
        measured = sensitivity(context, pruned) if pruned and last >= 2 else None
        banked = bank(context, pruned) if pruned and last >= 3 else None
        searched = search(context, banked, measured) if banked and measured and last >= 4 else None
        tuned = finetune(context, searched, measured) if searched and measured and last >= 5 else None
        scored = evaluate(context, tuned, searched, measured) if tuned and searched and measured and last >= 6 else None
        results = Results(
            prepare=prepared,
            prune=pruned,
            sensitivity=measured,
            bank=banked,
            search=searched,
            finetune=tuned,
            evaluate=scored,
        )
        return report(context, results) if last >= 7 else results
    finally:
        context.close()


def preview(config: RunConfig, emit: Emit) -> PruneRecord:
    """What the prune stage would leave, with nothing written.

    Args:
        config: The configuration.
        emit: Told of every event.

    Raises:
        UserError: When the input cannot work.
    """
    inspection = preflight.inspect(config)
    with explained("prune"):
        return preview_prune(Context(config, RunDir(Path(config.output), create=False), emit, None, inspection))
