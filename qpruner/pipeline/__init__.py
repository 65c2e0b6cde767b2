"""The flow, top to bottom: prepare, prune, bank, sensitivity, search, finetune, evaluate, comparison, report.

Each stage leaves a record; a stage whose record has the digest of its present inputs is skipped, which makes
`qpruner run` safe to repeat after any crash.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace

from qpruner.cluster.slots import Slots, with_gpus_for, worker_resources
from qpruner.config.schema import RunConfig, SearchConfig
from qpruner.errors import StorageError, UserError
from qpruner.pipeline import preflight
from qpruner.pipeline.bank import bank
from qpruner.pipeline.comparison import compare
from qpruner.pipeline.compress import prepare, sensitivity
from qpruner.pipeline.context import Context
from qpruner.pipeline.disk import check_room
from qpruner.pipeline.finish import evaluate, finetune
from qpruner.pipeline.nodes import look_at_nodes
from qpruner.pipeline.progress import RunProgress
from qpruner.pipeline.prune import preview_prune, prune
from qpruner.pipeline.recorded import recorded, shares_done
from qpruner.pipeline.report import report, report_unfinished
from qpruner.pipeline.search import search
from qpruner.pipeline.stage import explained
from qpruner.report.card import other_base_remark
from qpruner.report.search_progress import event_line
from qpruner.report.tensorboard import FOLDER, Board
from qpruner.runs.events import COMMAND, Emit, Event, Message
from qpruner.runs.lock import hold_run
from qpruner.runs.records import STAGES, PruneRecord, Results
from qpruner.runs.run_dir import LOG, RunDir
from qpruner.runs.storage import exists
from qpruner.runs.storage.upload import Uploader
from qpruner.search.searchers import check_searcher
from qpruner.training.trackers import check_trackers
from qpruner.wording import counted

logger = logging.getLogger(__name__)


def check_search(config: SearchConfig, slots: Slots) -> int:
    """Refuse now, not after pruning, what the cluster or the installed packages cannot do; returns trials at once.

    Raises:
        UserError: For a trial that does not fit, GPU hours without GPUs, or a searcher whose package is missing.
    """
    check_searcher(config.searcher)
    asked = config.resources_per_trial
    resources = slots.resources_per_trial(asked.model_dump() if asked else None)
    if config.max_gpu_hours is not None and not resources.get("gpu"):
        raise UserError(
            f"`search.max_gpu_hours` ends no search whose trials hold no GPU, got {config.max_gpu_hours:g}; use "
            "`search.max_hours`"
        )
    return slots.concurrent(resources, config.max_concurrent)


def check_finetune(config: RunConfig, slots: Slots) -> None:
    """Refuse now a final fine-tune on more workers than the cluster takes at once.

    Raises:
        UserError: With both numbers.
    """
    wanted, asked = config.finetune.num_workers, config.search.resources_per_trial
    resources = worker_resources(slots.resources_per_trial(asked.model_dump() if asked else None), wanted)
    fits = slots.at_most(resources)
    if wanted > 1 and fits < wanted:
        raise UserError(
            f"`finetune.num_workers` asks for {wanted} workers of {resources} at once, got room for {fits} on "
            f"{counted(len(slots.nodes), 'machine')}, the largest with {slots.largest}: ask for fewer, or add machines"
        )


@dataclass(frozen=True)
class Checked:
    """What a run would be.

    Attributes:
        inspection: Sizes and rows; of the pruned model itself, where the run's folder has it already.
        slots: Trials at once, were there enough of them; fine-tunes, too.
        resources: What Ray reserves for one.
        done: How much of each stage is recorded with the same inputs, from 0 to 1.
    """

    inspection: preflight.Inspection
    slots: int
    resources: dict[str, float]
    done: dict[str, float]


def check(config: RunConfig, emit: Emit, address: str | None = None, gpu_is_elsewhere: bool = False) -> Checked:
    """What `run` refuses before its first stage, and what it would be.

    Args:
        config: The configuration.
        emit: Told of the cluster's nodes.
        address: A running Ray cluster to join; None looks at this machine.
        gpu_is_elsewhere: Without an address: assume a machine with the GPUs that a trial asks for. How many there will
            be is not known.

    Raises:
        UserError: For what cannot work, as `preflight.inspect` tells it.
    """
    inspection = preflight.inspect(config, works_here=not (address or gpu_is_elsewhere))
    preflight.check_quantizable(inspection.model_config)
    run_dir, asked = RunDir(config.output, create=False), config.search.resources_per_trial
    assumed = with_gpus_for(asked.model_dump() if asked else None) if gpu_is_elsewhere else None
    with contextlib.closing(Context(config, run_dir, emit, address, inspection, assumed=assumed)) as context:
        check_room(context)
        slots = check_search(config.search, context.known_slots)
        if not assumed:
            check_finetune(config, context.known_slots)
        check_trackers(config.trackers)
        if address:
            look_at_nodes(context)
        found = recorded(context)
        if found.prune:
            made = inspection.cuts[-1 if found.prune.dropped_blocks else 0]
            inspection = replace(
                inspection,
                cuts=(replace(made, expected=context.pruned_config),),
                pruned=context.layout,
                is_estimate=False,
                budget_bytes=context.space.budget_bytes,
                plan=context.plan_in_file,
            )
        return Checked(inspection, slots, context.trial_resources, shares_done(context, found))


def run(
    config: RunConfig, emit: Emit, address: str | None = None, until: str = "report", command: str | None = None
) -> Results:
    """Run the flow up to a stage, skipping what is recorded.

    Args:
        config: The configuration.
        emit: Told of every event.
        address: A running Ray cluster to join; None starts Ray on this machine when it is needed.
        until: The last stage to run, one of `STAGES`.
        command: What repeats it in a shell; this process's own command line unless it is another one.

    Returns:
        The records so far; those of stages after `until` are None.

    Raises:
        UserError: Before any weight is loaded, when the input cannot work.
        StageError: When a stage cannot go on.
    """
    packs = STAGES.index(until) >= STAGES.index("bank")
    inspection = preflight.inspect(config, works_here=address is None, packs=packs)
    with contextlib.closing(Context(config, RunDir(config.output, create=False), emit, address, inspection)) as planned:
        check_room(planned)
    run_dir = RunDir(config.output)
    with (
        hold_run(run_dir.root, lambda text: emit(Message(COMMAND, text))) as holds_run,
        contextlib.closing(Uploader(run_dir.root, FOLDER, LOG)) as uploader,
    ):
        _ = run_dir.id  # there from now on: beside it a lock that is gone was taken away
        progress = RunProgress(run_dir, config, until, command, holds_run)
        board = Board(run_dir.root, config)

        def tell(event: Event) -> None:
            if line := event_line(event, config.search.steps):
                logger.info(line)
            for listen in (progress.listen, board.listen, uploader.listen, emit):
                listen(event)

        try:
            with progress.ending():
                results = _stages(Context(config, run_dir, tell, address, inspection, holds_run=holds_run), until)
        except BaseException as error:
            # Of a storage that was waited for a report would wait once more.
            is_away = isinstance(error, StorageError) or isinstance(error.__cause__, StorageError)
            if progress.is_told and not is_away and holds_run():  # else the report of an earlier command stands
                report_unfinished(run_dir)
            raise
        # Where nothing was done an earlier report, maybe of a whole run, tells more.
        if until != "report" and holds_run() and (progress.has_begun or not exists(run_dir.root / "report.html")):
            tell(Message("report", report_unfinished(run_dir)))
        return results


def _stages(context: Context, until: str) -> Results:
    """The flow up to a stage."""
    config, inspection, emit = context.config, context.inspection, context.emit
    _warn_of_keys(context)
    last = STAGES.index(until)
    if inspection.packs:
        preflight.check_quantizable(inspection.model_config)
    with contextlib.closing(context):
        if last >= STAGES.index("search"):
            for warning in inspection.warnings:
                emit(Message("search", f"warning: {warning}"))
            check_search(config.search, context.known_slots)
            check_trackers(config.trackers)
        if last >= STAGES.index("finetune"):
            check_finetune(config, context.known_slots)
        if until == "prune":
            _remark_on_cut(context)
        if until == "report" and (remark := other_base_remark(config)):
            emit(Message("report", f"warning: {remark}"))
        if context.address:
            look_at_nodes(context)
        prepared = prepare(context)
        pruned = prune(context, prepared) if last >= 1 else None
        banked = bank(context, pruned) if pruned and last >= 2 else None
        measured = sensitivity(context, pruned, banked) if pruned and banked and last >= 3 else None
        searched = search(context, banked, measured) if banked and measured and last >= 4 else None
        tuned = finetune(context, searched) if searched and last >= 5 else None
        scored = evaluate(context, tuned) if tuned and last >= 6 else None
        results = Results(
            prepare=prepared,
            prune=pruned,
            sensitivity=measured,
            bank=banked,
            search=searched,
            finetune=tuned,
            evaluate=scored,
        )
        if config.finetune.compare and scored and last >= 7:
            results = results.model_copy(update={"comparison": compare(context, results)})
        return report(context, results) if last >= 8 else results


def preview(config: RunConfig, emit: Emit, address: str | None = None) -> PruneRecord:
    """What the prune stage would leave, with nothing written.

    Args:
        config: The configuration.
        emit: Told of every event.
        address: A running Ray cluster to join; None cuts in this process.

    Raises:
        UserError: When the input cannot work.
    """
    inspection = preflight.inspect(config, works_here=address is None, packs=False)
    run_dir = RunDir(config.output, create=False)
    with contextlib.closing(Context(config, run_dir, emit, address, inspection, writes=False)) as context:
        if address:
            look_at_nodes(context)
        _warn_of_keys(context)
        _remark_on_cut(context)
        with explained("prune"):
            return preview_prune(context)


def _warn_of_keys(context: Context) -> None:
    """Name the keys of the configuration that have no effect."""
    for warning in context.config.warnings:
        context.emit(Message(COMMAND, f"warning: {warning}"))


def _remark_on_cut(context: Context) -> None:
    """Warn that this machine can make the cut and nothing more."""
    if not context.address and (remark := preflight.remark_on_cut(context.config, context.inspection)):
        context.emit(Message("prune", f"warning: {remark}"))
