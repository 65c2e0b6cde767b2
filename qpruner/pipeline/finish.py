"""The winner's last stages: its full fine-tune, the final folder made of it, and the held-out evaluation."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.cluster.workshop import Bench
from qpruner.config.schema import RunConfig
from qpruner.pipeline.compress import telling
from qpruner.pipeline.context import Context
from qpruner.pipeline.jobs import (
    RowJob,
    finetune_jobs,
    forget_without_rows,
    jobs_of,
    measure_in_turns,
    row_set_aside_if_damaged,
    score_jobs,
    scores_digest,
    scores_line,
    told_jobs,
)
from qpruner.pipeline.rows import candidates_for, untuned_candidates, winner_row
from qpruner.pipeline.stage import Stage, is_whole, run_stage
from qpruner.report.results import BASE, SEARCHED
from qpruner.runs.events import Emit
from qpruner.runs.records import EvalRecord, FinetuneRecord, SearchRecord
from qpruner.runs.storage import empty_folder, fetch, publish_folder, staging_path, storage_at, writing_folder
from qpruner.training.checkpoints import ADAPTER_WEIGHTS
from qpruner.training.table_rows import Candidate
from qpruner.wording import counted


def finetune(context: Context, searched: SearchRecord) -> FinetuneRecord:
    """The winner's full fine-tune, and the final folder."""
    jobs = winner_jobs(context, searched)
    # `final` is where people look; the stage's own folder keeps nothing.
    final = context.run_dir.root / "final"
    forget_without_rows(context, "finetune", jobs)
    if not _is_there(context, final):
        context.forget("finetune")

    def work(scratch: Path) -> dict[str, Any]:
        tuned = finetune_jobs(context, "finetune", jobs)
        [(_, winner)] = jobs
        context.forget("finetune")  # what it vouches for is about to be written over
        before = context.gpu_time.seconds
        with row_set_aside_if_damaged(context.run_dir, "finetune"):
            context.workshop.do(write_final, FinalJob(context.config, winner, final), context.emit)
        context.workshop.close()
        # The fine-tune may be one of an earlier session.
        held = sum(each.gpu_seconds for each in tuned) + context.gpu_time.seconds - before
        return {"winner": SEARCHED, "candidates": tuned, "gpu_seconds": held}

    def figures(record: FinetuneRecord) -> str:
        [tuned] = record.candidates
        losses = f"validation loss {tuned.validation_loss:.4f}, confirmation loss {tuned.confirmation_loss:.4f}"
        return f"{losses}, training seed {tuned.seed}"

    return run_stage(context, finetune_stage(context, searched, jobs), FinetuneRecord, work, figures)


def winner_jobs(context: Context, searched: SearchRecord) -> list[RowJob]:
    """The winner under the first training seed."""
    return jobs_of(context, [winner_row(context, searched)])


def finetune_stage(context: Context, searched: SearchRecord, jobs: list[RowJob]) -> Stage:
    """What `finetune` depends on."""
    settings = context.config.finetune
    length = counted(settings.steps, "step") if settings.steps else counted(settings.epochs or 0.0, "epoch")
    # The plan's loss here beside its loss as a trial, after as many steps, looks like an error.
    detail = f"the winner, {length}, under another training seed than the trials', so its loss is not that of a trial"
    return Stage("finetune", detail, (searched.digest, told_jobs(jobs)))


def _is_there(context: Context, final: Path) -> bool:
    """Whether the final folder is there and complete."""
    return storage_at(final).is_published() and is_whole(context.run_dir, final, "finetune", context.emit)


def evaluate(context: Context, tuned: FinetuneRecord) -> EvalRecord:
    """Accuracies on tasks the search never saw: the model before any fine-tune, step by step, and the winner after."""
    jobs = evaluate_jobs(context, tuned)

    def work(scratch: Path) -> dict[str, Any]:
        about, text = held_out_text(context, scratch / "text")
        with row_set_aside_if_damaged(context.run_dir, "evaluate"):
            scored = score_jobs(context, "evaluate", jobs, text)
            before = context.gpu_time.seconds
            setting, taken = measure_in_turns(context, "evaluate", [job for job in jobs if job.seed is not None])
        rows = [
            scored[job.folder].model_copy(update={"name": job.name, "inference": taken.get(job.folder)}) for job in jobs
        ]
        return {
            "rows": rows,
            "text": about,
            "inference": setting,
            "tested": context.tested_digest,
            "gpu_seconds": sum(row.gpu_seconds for row in rows) + context.gpu_time.seconds - before,
        }

    def figures(record: EvalRecord) -> str:
        scores = {(row.name, row.seed is None): scores_line(row.scores) for row in record.rows}
        return f"{jobs[-1].label} {scores[SEARCHED, False]}; base as it is {scores[BASE, True]}"

    return run_stage(context, evaluate_stage(context, tuned, jobs), EvalRecord, work, figures)


def evaluate_stage(context: Context, tuned: FinetuneRecord, jobs: list[Candidate]) -> Stage:
    """What `evaluate` depends on."""
    detail = f"{', '.join(context.config.evaluate.tasks)} for {counted(len(jobs), 'model')}"
    return Stage("evaluate", detail, (tuned.digest, scores_digest(context)))


def evaluate_jobs(context: Context, tuned: FinetuneRecord) -> list[Candidate]:
    """The model before any fine-tune, step by step, and the winner after its own."""
    [winner] = tuned.candidates
    untuned = untuned_candidates(context, winner.plan)
    return [*untuned, *candidates_for(context, [(winner.name, winner.plan, winner.seed)])]


def held_out_text(context: Context, folder: Path) -> tuple[str | None, Path | None]:
    """What perplexity is measured on, in words and encoded; nothing where all there is are answers to questions."""
    from qpruner.data.encoding import load_confirmation, save_encoded, text_windows
    from qpruner.models.loading import load_tokenizer

    examples, length = context.inspection.examples, context.config.data.max_length
    if "text" in examples:
        tokenizer = load_tokenizer(str(context.checkpoint))
        rows = text_windows((row.response for row in examples["text"]), tokenizer, length)
        save_encoded(rows, folder)
        return f"`evaluate.text` in {len(rows)} windows of {length} tokens", folder
    if any(row.format == "multiple_choice" for row in examples["confirmation"]):
        return None, None
    rows = load_confirmation(context.data, "judge")
    save_encoded(rows, folder)
    counted = "responses" if context.config.data.response_only else "whole rows"
    if all(row.format == "text" for row in examples["confirmation"]):
        counted = "text"
    return f"the {counted} of the {len(rows)} confirmation rows that chose nothing", folder


@dataclass(frozen=True)
class FinalJob:
    """What the final folder is made of.

    Attributes:
        config: The run's configuration.
        winner: The fine-tuned row.
        folder: Where it goes.
    """

    config: RunConfig
    winner: Candidate
    folder: Path


def write_final(job: FinalJob, bench: Bench, emit: Emit) -> None:
    """The final folder: packed weights, adapter and tokenizer, loadable by transformers after `import qpruner.hf`."""
    from qpruner.models.checkpoint import save_checkpoint
    from qpruner.models.loading import load_tokenizer, tensors_told
    from qpruner.quantization.assembly import assemble

    told = telling(emit, "finetune")
    winner, quantize, dtype = job.winner, job.config.quantize, job.config.model.dtype
    checkpoint, adapter = fetch(winner.checkpoint), fetch(winner.adapter)
    with tensors_told(told):
        model, _ = assemble(checkpoint, winner.bank, quantize.group, winner.plan, dtype, quantize.double_quant)
    scratch = empty_folder(staging_path(job.folder.with_name(f".{job.folder.name}")))
    with writing_folder(scratch):
        save_checkpoint(model, load_tokenizer(str(checkpoint)), scratch, told)
        for file in ("adapter_config.json", ADAPTER_WEIGHTS):
            shutil.copy2(adapter / file, scratch / file)
    publish_folder(scratch, job.folder)
