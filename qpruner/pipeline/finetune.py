"""The finetune stage: the winner's full fine-tune, and the final folder made of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qpruner.cluster.executor import ModelCache
from qpruner.cluster.slots import worker_resources
from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile, StageError, UserError
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import load_tokenizer, reporting_tensors
from qpruner.pipeline.comparison_rows import (
    RowJob,
    distinct,
    gpus_held,
    job_keys,
    job_progress,
    jobs_of,
    winner_row,
    worker_jobs,
)
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight import layout_for
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import PrecisionPlan
from qpruner.report.results import SEARCHED
from qpruner.runs.events import Emit
from qpruner.runs.records import CandidateRecord, FinetuneRecord, SearchRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import (
    empty_folder,
    exists,
    fetch,
    for_each,
    published_folders,
    quarantine,
    read_json,
    remove,
    storage_at,
    write_json,
    writing_folder,
)
from qpruner.training.checkpoints import ADAPTER_WEIGHTS, is_damaged
from qpruner.training.table_rows import Candidate, FinetuneOutcome, finetune_candidate
from qpruner.wording import counted


class Finetune(Stage[FinetuneRecord]):
    """Fine-tune the winner in full and write the final folder."""

    name = "finetune"
    help = "Run up to the final fine-tune."
    record = FinetuneRecord
    trains = True

    @cached_property
    def jobs(self) -> list[RowJob]:
        """The winner under the first training seed."""
        return jobs_of(self.context, [winner_row(self.context)])

    def inputs(self) -> tuple[Any, ...]:
        return (self.context.record(SearchRecord).digest, job_keys(self.jobs))

    def check(self) -> None:
        context, wanted = self.context, self.config.finetune.num_workers
        if context.assumed or wanted == 1:
            return
        slots, resources = context.known_slots, worker_resources(context.trial_resources, wanted)
        if (fits := slots.at_most(resources)) < wanted:
            raise UserError(
                f"`finetune.num_workers` asks for {wanted} workers of {resources} at once, got room for {fits} on "
                f"{counted(len(slots.nodes), 'machine')}, the largest with {slots.largest}: ask for fewer, or add "
                "machines"
            )

    def begin(self) -> None:
        final = self.context.run_dir.root / "final"
        if not (have_rows(self.jobs) and final in published_folders(final.parent) and self.is_whole(final)):
            self.context.forget(self.name)

    def detail(self) -> str:
        settings = self.config.finetune
        length = counted(settings.steps, "step") if settings.steps else counted(settings.epochs or 0.0, "epoch")
        # The plan's loss here beside its loss as a trial, after as many steps, looks like an error.
        return f"the winner, {length}, under another training seed than the trials', so its loss is not that of a trial"

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        tuned = finetune_jobs(self, self.jobs)
        [(_, winner)] = self.jobs
        context.forget(self.name)  # the folder that it vouches for is about to be written over
        before = context.gpu_time.seconds
        # Where people look for the model; the stage's own folder keeps nothing.
        write = partial(write_final, self.config, winner, context.run_dir.root / "final")
        with row_set_aside_if_damaged(context.run_dir, self.name):
            context.executor.run(write, context.emit)
        context.executor.close()
        # The fine-tune may be one of an earlier session.
        held = sum(each.gpu_seconds for each in tuned) + context.gpu_time.seconds - before
        return {"winner": SEARCHED, "candidates": tuned, "gpu_seconds": held}

    def summary(self, record: FinetuneRecord) -> str:
        [tuned] = record.candidates
        losses = f"validation loss {tuned.validation_loss:.4f}, confirmation loss {tuned.confirmation_loss:.4f}"
        return f"{losses}, training seed {tuned.seed}"

    def disk_bytes(self) -> int:
        return 2 * self.context.checkpoint_bytes


def have_rows(jobs: Iterable[RowJob]) -> bool:
    """Whether every fine-tuned row is recorded and intact."""
    return all(isinstance(each, CandidateRecord) for each in for_each(_recorded, [job.folder for _, job in jobs]))


def finetune_jobs(stage: Stage[Any], jobs: list[RowJob]) -> list[CandidateRecord]:
    """Fine-tune the rows without a record, each in processes of its own; return a record for every row and seed."""
    context, models = stage.context, distinct(jobs)
    found: dict[Path, CandidateRecord] = {}
    for job, each in zip(models, for_each(_recorded, [job.folder for job in models]), strict=True):
        if isinstance(each, CandidateRecord):
            found[job.folder] = each
        elif each:
            where = quarantine(job.folder, job.folder.parent)
            stage.notify(f"warning: {each}; set aside in {where}, {job.label} is fine-tuned anew")
    for_each(remove, [job.checkpoints for job in models if job.folder in found])  # of a driver that was killed
    left = [job for job in models if job.folder not in found]
    for job in left:
        for checkpoint in filter(is_damaged, published_folders(job.checkpoints)):
            where = quarantine(checkpoint, job.folder.parent)
            stage.notify(f"warning: {checkpoint} is damaged; set aside in {where}, {job.label} does not go on from it")
    if left:
        origins = {job.folder: row.origin for row, job in jobs}
        on_tick = job_progress(stage, [job.progress for job in left], len(models), "steps")
        for position, outcome in _finetuned(context, left, on_tick):
            job = left[position]
            record = found[job.folder] = _record_of(context, job, origins[job.folder], outcome)
            write_json(job.folder / "record.json", record)
            remove(job.checkpoints)
            text = f"{job.label}: validation loss {outcome.validation_loss:.4f} after {outcome.steps} steps"
            stage.notify(f"{text}, peak memory {outcome.peak_memory_bytes / 1e6:.0f} MB")
            for trouble in outcome.tracker_errors:
                stage.notify(f"warning: {job.label}: {trouble}")
    return [found[job.folder].model_copy(update={"name": row.name, "origin": row.origin}) for row, job in jobs]


def _recorded(folder: Path) -> CandidateRecord | str | None:
    """Read the record of a fine-tuned row, or say what is damaged; a fetch checks weights at a URI."""
    weights = folder / "adapter" / ADAPTER_WEIGHTS
    try:
        record = read_json(folder / "record.json", CandidateRecord)
        if record is None or not exists(weights):
            return None
        storage_at(weights.parent).verify()
    except CorruptFile as error:
        return str(error)
    return record


def _finetuned(
    context: Context, jobs: list[Candidate], on_tick: Callable[[], None]
) -> Iterator[tuple[int, FinetuneOutcome]]:
    """Yield positions and outcomes as the fine-tunes end; as many run at once as the slots take."""

    def saved(position: int) -> list[Path]:
        return sorted(published_folders(jobs[position].checkpoints))

    num_workers = context.config.finetune.num_workers
    tasks, resources, concurrent = worker_jobs(context, jobs, num_workers)
    more: dict[str, Any] = {"on_tick": on_tick, "progress": saved}
    if num_workers > 1:
        from qpruner.cluster.group import run_groups

        scratch, check = context.run_dir.scratch("train"), context.check_node
        return run_groups(finetune_candidate, tasks, resources, num_workers, concurrent, scratch, check, **more)
    return context.run_tasks(finetune_candidate, tasks, resources, concurrent, fresh=True, **more)


def _record_of(context: Context, job: Candidate, origin: str, outcome: FinetuneOutcome) -> CandidateRecord:
    plan, layout = PrecisionPlan.from_dict(dict(job.plan)), context.layout
    if job.checkpoint != context.checkpoint:
        layout = layout_for(context.config, context.inspection.model_config)
    assert job.seed is not None
    measured = {name: value for name, value in vars(outcome).items() if name != "tracker_errors"}
    return CandidateRecord(
        digest=job.folder.name,
        name=job.name,
        origin=origin,
        seed=job.seed,
        plan=dict(job.plan),
        plan_bytes=layout.plan_bytes(plan),
        mean_bits=layout.mean_bits(plan),
        gpu_seconds=outcome.seconds * gpus_held(context, context.config.finetune.num_workers),
        num_parameters=layout.num_parameters,
        **measured,
    )


@contextmanager
def row_set_aside_if_damaged(run: RunDir, stage: str) -> Iterator[None]:
    """Set aside a row whose adapter is damaged, so that the next command makes it again."""
    try:
        yield
    except CorruptFile as error:
        if not (error.path and error.path.is_relative_to(run.candidates)):
            raise
        row = run.candidates / error.path.relative_to(run.candidates).parts[0]
        # One that the driver sees whole took hours: the machine that read it may not see the storage.
        is_whole = isinstance(_recorded(row), CandidateRecord)
        state = "the driver sees it whole" if is_whole else f"set aside in {quarantine(row, run.candidates)}"
        remedy = "see that the machine that read it sees `output`" if is_whole else "that row alone is fine-tuned anew"
        raise StageError(stage, f"{error}; {state}", f"repeat the command: {remedy}") from error


def write_final(config: RunConfig, winner: Candidate, folder: Path, cache: ModelCache, emit: Emit) -> None:
    """Write packed weights, adapter and tokenizer, which transformers loads after `import qpruner.hf`."""
    from qpruner.quantization.assembly import assemble

    told, quantize = loading_progress(emit, "finetune"), config.quantize
    checkpoint, adapter = fetch(winner.checkpoint), fetch(winner.adapter)
    with reporting_tensors(told):
        model, _ = assemble(
            checkpoint, winner.bank, quantize.group, winner.plan, config.model.dtype, quantize.double_quant
        )
    scratch = empty_folder(storage_at(folder.with_name(f".{folder.name}")).staging)
    with writing_folder(scratch):
        save_checkpoint(model, load_tokenizer(str(checkpoint)), scratch, told)
        for file in ("adapter_config.json", ADAPTER_WEIGHTS):
            shutil.copy2(adapter / file, scratch / file)
    storage_at(folder).publish(scratch)
