"""What a command does around the flow: checks before, the run folder's lock, log and report."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qpruner.cluster.slots import with_gpus_for
from qpruner.config.schema import RunConfig
from qpruner.errors import StorageError, UserError
from qpruner.pipeline import preflight
from qpruner.pipeline.bank import Bank
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import STAGES, explained, recorded, run_flow, stages_until
from qpruner.pipeline.nodes import look_at_nodes
from qpruner.pipeline.progress import RunProgress
from qpruner.pipeline.prune import Prune
from qpruner.pipeline.report import Report, report_unfinished
from qpruner.pipeline.stage import Stage
from qpruner.report.search_progress import event_line
from qpruner.runs.events import COMMAND, Emit, Event, Message
from qpruner.runs.lock import hold_run
from qpruner.runs.logs import Uploader
from qpruner.runs.records import PruneRecord, Results
from qpruner.runs.run_dir import LOG, RunDir
from qpruner.runs.storage import CACHE, Storage, exists

logger = logging.getLogger(__name__)
SMALL_FILES = 2**20
"""Bytes of records, log and report, which every command writes."""


@dataclass(frozen=True)
class Checked:
    """What a run would be."""

    inspection: preflight.Inspection  # of the recorded pruned model where there is one
    slots: int  # trials, or fine-tunes, that fit at once
    resources: dict[str, float]  # of one
    done: dict[str, float]  # how much of each stage is recorded with the same inputs, from 0 to 1
    disk: tuple[int, int]  # bytes that are needed at most, and bytes that are free


def check(config: RunConfig, emit: Emit, address: str | None = None, gpu_is_elsewhere: bool = False) -> Checked:
    """Find what `run` would refuse before its first stage, and what it would do.

    Without an `address` it looks at this machine, or at one assumed to have the GPUs that a trial asks for.
    """
    inspection = preflight.inspect(config, works_here=not (address or gpu_is_elsewhere))
    run_dir, asked = RunDir(config.output, create=False), config.search.resources_per_trial
    assumed = with_gpus_for(asked.model_dump() if asked else None) if gpu_is_elsewhere else None
    with contextlib.closing(Context(config, run_dir, emit, address, inspection, assumed=assumed)) as context:
        disk = _check_room(context)
        for stage in STAGES:
            stage(context).check()
        if address:
            look_at_nodes(context)
        done = recorded(context)
        if context.records.prune:
            inspection = replace(
                inspection,
                cuts=(replace(inspection.cuts[0], expected=context.pruned_config),),
                pruned=context.layout,
                is_estimate=False,
                budget_bytes=context.space.budget_bytes,
                plan=context.plan_in_file,
            )
        resources = context.trial_resources
        slots = context.known_slots.concurrent(resources, config.search.max_concurrent)
        return Checked(inspection, slots, resources, done, disk)


def run(
    config: RunConfig, emit: Emit, address: str | None = None, until: str = Report.name, command: str | None = None
) -> Results:
    """Run the flow up to a stage, skipping what is recorded; return the records so far.

    Without an `address` Ray is started on this machine when it is needed. `command` is what repeats it in a shell.
    """
    from qpruner.report.tensorboard import FOLDER, Board  # loads torch

    stages = stages_until(until)
    inspection = preflight.inspect(config, works_here=address is None, packs=Bank in stages)
    with contextlib.closing(Context(config, RunDir(config.output, create=False), emit, address, inspection)) as planned:
        _check_room(planned)
    run_dir = RunDir(config.output)
    with (
        hold_run(run_dir.root, lambda text: emit(Message(COMMAND, text))) as holds_run,
        contextlib.closing(Uploader(run_dir.root, FOLDER, LOG)) as uploader,
    ):
        _ = run_dir.id  # there from now on: beside it a lock that is gone was taken away
        progress = RunProgress(run_dir, config, until, command, holds_run)
        board = Board(run_dir.root, config)

        def on_event(event: Event) -> None:
            if line := event_line(event, config.search.steps):
                logger.info(line)
            for listen in (progress.listen, board.listen, uploader.listen, emit):
                listen(event)

        context = Context(config, run_dir, on_event, address, inspection, holds_run=holds_run)
        try:
            with progress.ending(), contextlib.closing(context):
                _warn_and_check(context, stages)
                results = run_flow(context, until)
        except BaseException as error:
            # A report would wait once more for a storage that is away.
            is_away = isinstance(error, StorageError) or isinstance(error.__cause__, StorageError)
            if progress.is_written and not is_away and holds_run():  # else the report of an earlier command stands
                report_unfinished(run_dir)
            raise
        # Where nothing was done, an earlier report, maybe of a whole run, has more.
        if until != Report.name and holds_run() and (progress.has_begun or not exists(run_dir.root / "report.html")):
            on_event(Message(Report.name, report_unfinished(run_dir)))
        return results


def preview(config: RunConfig, emit: Emit, address: str | None = None) -> PruneRecord:
    """Return what the prune stage would record; nothing is written."""
    inspection = preflight.inspect(config, works_here=address is None, packs=False)
    run_dir = RunDir(config.output, create=False)
    with contextlib.closing(Context(config, run_dir, emit, address, inspection, writes=False)) as context:
        _warn_and_check(context, [Prune])
        with explained(Prune):
            return Prune(context).preview()


def _check_room(context: Context) -> tuple[int, int]:
    """Refuse a disk too small for the large files still to write; return about the bytes needed at most, and free."""
    run = context.run_dir
    existing = next(parent for parent in (run.root, *run.root.parents) if parent.exists())
    wanted = [stage for stage in STAGES if stage.record and stage.is_wanted(context.config)]
    sizes = {stage.name: stage(context).disk_bytes() for stage in wanted}
    free, needed = shutil.disk_usage(existing).free, SMALL_FILES + sum(sizes.values())
    if free < needed:  # what is recorded, or left by a killed command, takes time to find out
        shares = recorded(context)
        left = {name: round(size * (1 - shares[name])) for name, size in sizes.items()}
        for name in left:
            with contextlib.suppress(FileNotFoundError):  # another driver may be at work
                left[name] -= sum(Storage(run.scratch_path(name)).files().values())
        needed = SMALL_FILES + sum(max(0, size) for size in left.values())
    if free < needed:
        other = "" if run.storage.fills_this_disk else f" by {CACHE}"
        raise UserError(
            f"`output`: the run needs about {preflight.amount(needed)} more in {existing}, where "
            f"{preflight.amount(free)} are free: make room or name another folder{other}"
        )
    return needed, free


def _warn_and_check(context: Context, stages: Sequence[type[Stage[Any]]]) -> None:
    """Warn of keys without effect and of what the stages will meet; refuse what cannot work in one of them."""
    for warning in context.config.warnings:
        context.emit(Message(COMMAND, f"warning: {warning}"))
    for stage in stages:
        for warning in stage(context).warnings():
            context.emit(Message(stage.name, f"warning: {warning}"))
    for stage in stages:
        stage(context).check()
    if context.address:
        look_at_nodes(context)
