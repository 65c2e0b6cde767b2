"""The finetune stage: fine-tune the adapters of the winning plan anew.

It writes the folder `final`.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qpruner.cluster.slots import worker_resources
from qpruner.errors import CorruptFile, StageError, UserError
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import load_tokenizer, reporting_tensors
from qpruner.pipeline.comparison_rows import distinct, job_keys, jobs_of, run_jobs, winner_row
from qpruner.pipeline.context import Context
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs import storage
from qpruner.runs.events import Emit
from qpruner.runs.records import SEARCHED, CandidateRecord, FinetuneRecord, SearchRecord
from qpruner.runs.run_dir import RunDir
from qpruner.training.checkpoints import ADAPTER_WEIGHTS, is_damaged
from qpruner.training.table_rows import Candidate, finetune_candidate
from qpruner.wording import counted


class Finetune(Stage[FinetuneRecord]):
    """Fine-tune the adapters of the winning plan for `finetune.steps` or epochs.

    The result is written to the folder `final`.
    """

    name = "finetune"
    help = "Run up to the final fine-tune."
    record = FinetuneRecord
    keeps_files = False
    trains = True

    @cached_property
    def jobs(self) -> list[Candidate]:
        """The job of the winner, with the first training seed."""
        return jobs_of(self.context, [winner_row(self.context)])

    def inputs(self) -> tuple[Any, ...]:
        return (self.context.record(SearchRecord).digest, job_keys(self.jobs))

    def check(self) -> None:
        context, wanted = self.context, self.config.finetune.num_workers
        if context.assumed or wanted == 1:
            return
        slots = context.machines.known_slots
        resources = worker_resources(context.machines.trial_resources, wanted)
        if (fits := slots.at_most(resources)) < wanted:
            raise UserError(
                f"`finetune.num_workers`: {wanted} workers with {resources} each must run at once, "
                f"but only {fits} fit on {counted(len(slots.nodes), 'machine')}, the largest with "
                f"{slots.largest}: use fewer workers, or add machines"
            )

    def begin(self) -> None:
        final = self.context.run_dir.root / "final"
        if not (
            have_rows(self.jobs)
            and final in storage.published_folders(final.parent)
            and self.is_complete(final)
        ):
            self.context.forget(self.name)

    def detail(self) -> str:
        settings = self.config.finetune
        length = (
            counted(settings.steps, "step")
            if settings.steps
            else counted(settings.epochs or 0.0, "epoch")
        )
        return (
            f"the winner, {length}, with another training seed, and so another loss, "
            "than in its trial"
        )

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        tuned = finetune_jobs(self, self.jobs)
        [winner] = self.jobs
        context.forget(self.name)  # because the final folder is about to be overwritten
        before = context.machines.gpu_time.seconds
        write = partial(write_final, winner, context.run_dir.root / "final")
        with setting_aside_damaged_adapter(context.run_dir, self.name):
            context.machines.executor.run(write, context.emit)
        # An earlier command may have run the fine-tune.
        held = sum(each.gpu_seconds for each in tuned) + context.machines.gpu_time.seconds - before
        return {"winner": SEARCHED, "candidates": tuned, "gpu_seconds": held}

    def summary(self, record: FinetuneRecord) -> str:
        [tuned] = record.candidates
        return f"confirmation loss {tuned.confirmation_loss:.4f}, training seed {tuned.seed}"

    def disk_bytes(self) -> int:
        return 2 * self.context.inspection.shapes.checkpoint_bytes


def have_rows(jobs: Iterable[Candidate]) -> bool:
    """Return True if the fine-tune of every job is recorded and its files are intact."""
    found = storage.for_each(_recorded, [job.folder for job in jobs])
    return all(isinstance(each, CandidateRecord) for each in found)


def finetune_jobs(stage: Stage[Any], jobs: list[Candidate]) -> list[CandidateRecord]:
    """Run the fine-tunes that have no record, each in new processes.

    Return a record for every job.
    """
    context, models = stage.context, distinct(jobs)
    found: dict[Path, CandidateRecord] = {}
    for job, each in zip(
        models, storage.for_each(_recorded, [job.folder for job in models]), strict=True
    ):
        if isinstance(each, CandidateRecord):
            found[job.folder] = each
        elif each:
            where = storage.quarantine(job.folder, job.folder.parent)
            stage.notify(f"warning: {each}; set aside in {where}, {job.label} is fine-tuned again")
    # A killed driver may have left checkpoints of recorded fine-tunes.
    storage.for_each(storage.remove, [job.checkpoints for job in models if job.folder in found])
    for job in (job for job in models if job.folder not in found):
        for checkpoint in filter(is_damaged, storage.published_folders(job.checkpoints)):
            stage.notify(f"warning: {checkpoint} is damaged; {job.label} does not resume from it")
    num_workers = context.config.finetune.num_workers
    tuned = run_jobs(
        stage, finetune_candidate, models, found, "steps", num_workers, own_process=True
    )
    for job, (measured, tracker_errors) in tuned:
        record = found[job.folder] = _record_of(context, job, measured)
        storage.write_json(job.folder / "record.json", record)
        storage.remove(job.checkpoints)
        text = (
            f"{job.label}: confirmation loss {record.confirmation_loss:.4f} "
            f"after {record.steps} steps"
        )
        stage.notify(f"{text}, peak memory {record.peak_memory_bytes / 1e6:.0f} MB")
        for error in tracker_errors:
            stage.notify(f"warning: {job.label}: {error}")
    return [
        found[job.folder].model_copy(update={"name": job.name, "origin": job.origin})
        for job in jobs
    ]


def _recorded(folder: Path) -> CandidateRecord | str | None:
    """Return the record in a job's folder, or None if there is none.

    If the folder is damaged, a message is returned instead.
    """
    weights = folder / "adapter" / ADAPTER_WEIGHTS
    try:
        record = storage.read_json(folder / "record.json", CandidateRecord)
        if record is None or not storage.exists(weights):
            return None
        storage.storage_at(weights.parent).verify()
    except CorruptFile as error:
        return str(error)
    return record


def _record_of(context: Context, job: Candidate, measured: dict[str, Any]) -> CandidateRecord:
    """Make the record of a finished fine-tune; `measured` has the fields that its worker knows."""
    plan = PrecisionPlan.from_dict(dict(job.plan), job.cut)
    layout = context.shapes.layout_of(job.cut)
    assert job.seed is not None
    return CandidateRecord(
        digest=job.folder.name,
        name=job.name,
        origin=job.origin,
        seed=job.seed,
        plan=dict(job.plan),
        cut=job.cut,
        plan_bytes=layout.plan_bytes(plan),
        mean_bits=layout.mean_bits(plan),
        gpu_seconds=measured["seconds"]
        * context.machines.gpus_held(context.config.finetune.num_workers),
        num_parameters=layout.num_parameters,
        bank=job.bank.inputs if job.bank.uses_grams else "",
        **measured,
    )


@contextmanager
def setting_aside_damaged_adapter(run: RunDir, stage: str) -> Iterator[None]:
    """Set aside the folder of an adapter that the `with` block finds damaged.

    `StageError` of this stage is raised then. A folder that this process finds intact stays:
    another machine may not see it.
    """
    try:
        yield
    except CorruptFile as error:
        if not (error.path and error.path.is_relative_to(run.candidates)):
            raise
        row = run.candidates / error.path.relative_to(run.candidates).parts[0]
        if isinstance(_recorded(row), CandidateRecord):
            state, remedy = (
                "the driver finds the file intact",
                "make `output` visible to all machines, then repeat",
            )
            raise StageError(stage, f"{error}; {state}", f"{remedy} the command") from error
        cause = f"{error}; set aside in {storage.quarantine(row, run.candidates)}"
        raise StageError(
            stage, cause, "repeat the command: only that row is fine-tuned again"
        ) from error


def write_final(winner: Candidate, folder: Path, emit: Emit) -> None:
    """Write packed weights, adapter and tokenizer in a folder.

    Transformers loads the folder after `import qpruner.hf`.
    """
    from qpruner.quantization.assembly import assemble

    on_progress, adapter = loading_progress(emit, "finetune"), storage.fetch(winner.adapter)
    with reporting_tensors(on_progress):
        model, _ = assemble(winner.bank, winner.plan)
    scratch = storage.empty_folder(storage.storage_at(folder.with_name(f".{folder.name}")).staging)
    with storage.writing_folder(scratch):
        save_checkpoint(model, load_tokenizer(str(winner.bank.checkpoint)), scratch, on_progress)
        for file in ("adapter_config.json", ADAPTER_WEIGHTS):
            shutil.copy2(adapter / file, scratch / file)
    storage.storage_at(folder).publish(scratch)
