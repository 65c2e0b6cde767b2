"""The last stages: the winner's full fine-tune beside the rows it is compared with, and the held-out evaluation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qpruner.candidates import Candidate, CandidateJob, evaluate_candidate, finetune_candidate
from qpruner.events import Message, Progress
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import Stage, run_stage
from qpruner.plan import FULL_BITS, Layout, PrecisionPlan
from qpruner.preflight import layout_for
from qpruner.records import (
    CandidateRecord,
    EvalRecord,
    FinetuneRecord,
    PrepareRecord,
    SearchRecord,
    SensitivityRecord,
    TaskScore,
    digest_of,
)
from qpruner.rundir import publish_folder, read_json, write_json
from qpruner.sensitivity.mutual_information import seed_plan

SEARCHED, BASE, PRUNED = "searched", "base", "pruned"
UNTUNED = "{} (no fine-tune)"


def finetune(context: Context, searched: SearchRecord, measured: SensitivityRecord) -> FinetuneRecord:
    """The winner, and with `finetune.compare` every row it is compared with, from the same start on the same data."""
    config = context.config
    rows = table_rows(context, searched, measured)
    length = f"{config.finetune.steps} steps" if config.finetune.steps else f"{config.finetune.epochs:g} epochs"
    # Where checkpoints fall, and which rows stand beside it, changes no row.
    settings = config.finetune.model_copy(update={"save_steps": 1, "compare": False})
    row_inputs = (searched.trials_digest, settings, config.training, config.evaluate.batch_size)
    inputs = (searched.digest, searched.best_plan, config.finetune.compare, *row_inputs)
    stage = Stage("finetune", f"{len(rows)} row(s), {length}", inputs)
    if not all((row.adapter / "adapter_model.safetensors").is_file() for row in _distinct(rows)):
        context.run_dir.forget("finetune")

    def work(scratch: Path) -> dict[str, Any]:
        finetuned = _finetune_rows(context, rows, digest_of(*row_inputs))
        _write_final(context, next(row for row in rows if row.name == SEARCHED), scratch)
        return {"winner": SEARCHED, "candidates": finetuned}

    def figures(record: FinetuneRecord) -> str:
        return "validation loss " + ", ".join(f"{row.name} {row.validation_loss:.4f}" for row in record.candidates)

    record = run_stage(context.run_dir, stage, FinetuneRecord, work, figures, context.emit)
    _place_final(context)
    return record


def evaluate(
    context: Context, tuned: FinetuneRecord, searched: SearchRecord, measured: SensitivityRecord
) -> EvalRecord:
    """Accuracies on tasks the search never saw: base and pruned as they are, every row after its fine-tune."""
    settings = context.config.evaluate
    rows = [*_untuned_rows(context), *table_rows(context, searched, measured)]
    detail = f"{', '.join(settings.tasks)} for {len(rows)} models"
    stage = Stage("evaluate", detail, (tuned.digest, settings, context.task_digest))

    def work(scratch: Path) -> dict[str, Any]:
        from qpruner.execution.cluster import run_tasks

        distinct = _distinct(rows)
        jobs, resources, concurrent = _jobs(context, distinct)
        scores: dict[str, tuple[TaskScore, ...]] = {}
        for position, result in run_tasks(evaluate_candidate, jobs, resources, concurrent, fresh=False):
            scores[distinct[position].name] = result
            context.emit(Message("evaluate", f"{distinct[position].name}: {scores_line(result)}"))
            context.emit(Progress("evaluate", len(scores), len(distinct)))
        return {"scores": {row.name: scores[_same_as(row, distinct).name] for row in rows}}

    def figures(record: EvalRecord) -> str:
        before, after = record.scores[UNTUNED.format(BASE)], record.scores[SEARCHED]
        return f"base as it is {scores_line(before)}; searched {scores_line(after)}"

    return run_stage(context.run_dir, stage, EvalRecord, work, figures, context.emit)


def table_rows(context: Context, searched: SearchRecord, measured: SensitivityRecord) -> list[Candidate]:
    """The rows of the final table; only the winner without `finetune.compare`."""
    plans = {SEARCHED: PrecisionPlan.from_dict(searched.best_plan)}
    if context.config.finetune.compare:
        layout = context.layout
        uniform = {f"uniform {bits}-bit": layout.uniform(bits) for bits in context.space.levels if bits != FULL_BITS}
        # At the winner's own bytes, so that the claim compares like with like.
        equal_bytes = replace(context.space, budget_bytes=layout.plan_bytes(plans[SEARCHED]))
        seed = {"mutual-information seed": seed_plan(measured.mutual_information_nats, equal_bytes)}
        plans = {BASE: layout.uniform(FULL_BITS), PRUNED: layout.uniform(FULL_BITS), **uniform, **seed, **plans}
    return [_candidate(context, name, plan) for name, plan in plans.items()]


def scores_line(scores: tuple[TaskScore, ...]) -> str:
    """`task 0.650 +- 0.048` for every task."""
    return ", ".join(f"{score.task} {score.value:.3f} +- {score.stderr:.3f}" for score in scores)


def _candidate(context: Context, name: str, plan: PrecisionPlan) -> Candidate:
    base = Path(_prepared(context).model_path)
    checkpoint = base if name.startswith(BASE) else context.checkpoint
    folder = context.run_dir.candidates / name.replace(" ", "-")
    return Candidate(name, checkpoint, context.bank, plan.as_dict(), folder)


def _prepared(context: Context) -> PrepareRecord:
    record = context.run_dir.read_record("prepare", PrepareRecord)
    assert record is not None, "prepare runs before"
    return record


def _untuned_rows(context: Context) -> list[Candidate]:
    plan = context.layout.uniform(FULL_BITS)
    rows = [_candidate(context, UNTUNED.format(name), plan) for name in (BASE, PRUNED)]
    return [replace(row, tuned=False) for row in rows]


def _distinct(rows: list[Candidate]) -> list[Candidate]:
    """One row for each different model: a winner that is a control is not trained twice."""
    distinct: list[Candidate] = []
    # The winner first, so that the final folder is its own.
    for row in sorted(rows, key=lambda row: row.name != SEARCHED):
        if _same_as(row, distinct) is row:
            distinct.append(row)
    return sorted(distinct, key=rows.index)


def _same_as(row: Candidate, others: list[Candidate]) -> Candidate:
    """The one of `others` with the same checkpoint, plan and fine-tune, or the row itself."""

    def key(each: Candidate) -> tuple[Any, ...]:
        return each.checkpoint, tuple(each.plan.items()), each.tuned

    return next((other for other in others if key(other) == key(row)), row)


def _jobs(context: Context, rows: list[Candidate]) -> tuple[list[CandidateJob], dict[str, float], int]:
    resources, concurrent = context.task_resources(len(rows))
    threads = int(resources.get("cpu", 1))
    jobs = [CandidateJob(context.worker_config, row, context.data, threads) for row in rows]
    return jobs, resources, concurrent


def _finetune_rows(context: Context, rows: list[Candidate], digest: str) -> list[CandidateRecord]:
    """Fine-tune every distinct row that has no record yet, each in a process of its own."""
    from qpruner.execution.cluster import run_tasks

    distinct = _distinct(rows)
    done: dict[str, CandidateRecord] = {}
    for row in distinct:
        record = read_json(row.folder / "record.json", CandidateRecord)
        if record and record.digest == _row_digest(row, digest) and row.adapter.is_dir():
            done[row.name] = record
        elif record is None or record.digest != _row_digest(row, digest):
            _forget_other_inputs(row, _row_digest(row, digest))
    left = [row for row in distinct if row.name not in done]
    if left:
        jobs, resources, concurrent = _jobs(context, left)
        progress = _StepProgress(context, left, len(done), len(distinct))
        for position, outcome in run_tasks(
            finetune_candidate, jobs, resources, concurrent, fresh=True, on_tick=progress.tell
        ):
            row = left[position]
            layout = _row_layout(context, row)
            plan = PrecisionPlan.from_dict(dict(row.plan))
            record = CandidateRecord(
                digest=_row_digest(row, digest),
                name=row.name,
                plan=dict(row.plan),
                plan_bytes=layout.plan_bytes(plan),
                mean_bits=layout.mean_bits(plan),
                num_parameters=layout.num_parameters,
                **vars(outcome),
            )
            write_json(row.folder / "record.json", record)
            done[row.name] = record
            text = f"{row.name}: validation loss {outcome.validation_loss:.4f} after {outcome.steps} steps"
            context.emit(Message("finetune", f"{text}, peak memory {outcome.peak_memory_bytes / 1e6:.0f} MB"))
    return [done[_same_as(row, distinct).name].model_copy(update={"name": row.name}) for row in rows]


def _row_digest(row: Candidate, digest: str) -> str:
    return digest_of(digest, row.name, row.plan)


def _forget_other_inputs(row: Candidate, digest: str) -> None:
    """Keep a half-done fine-tune only if it is this one: its inputs are written beside its checkpoints."""
    marker = row.folder / "inputs"
    if not marker.is_file() or marker.read_text() != digest:
        shutil.rmtree(row.folder, ignore_errors=True)
        row.folder.mkdir(parents=True)
        marker.write_text(digest)


def _row_layout(context: Context, row: Candidate) -> Layout:
    if row.checkpoint == context.checkpoint:
        return context.layout
    return layout_for(context.config, context.inspection.model_config)


def _write_final(context: Context, winner: Candidate, scratch: Path) -> None:
    """The final folder: packed weights, adapter and tokenizer, loadable by transformers after `import qpruner.hf`."""
    from qpruner.models.checkpoint import save_checkpoint
    from qpruner.models.loading import load_tokenizer
    from qpruner.quantization.assembly import assemble

    quantize = context.config.quantize
    model, _ = assemble(
        winner.checkpoint, winner.bank, quantize.group, winner.plan, context.config.model.dtype, quantize.double_quant
    )
    save_checkpoint(model, load_tokenizer(str(winner.checkpoint)), scratch / "final")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy2(winner.adapter / file, scratch / "final" / file)


def _place_final(context: Context) -> None:
    """`RUN/final` is where people look; the stage's own folder keeps nothing else."""
    made = context.run_dir.stage("finetune") / "final"
    if made.is_dir():
        publish_folder(made, context.run_dir.root / "final")


class _StepProgress:
    """Adds up the steps of the fine-tunes under way, which their workers leave in small files."""

    def __init__(self, context: Context, rows: list[Candidate], num_done: int, num_rows: int) -> None:
        self._emit, self._rows, self._done, self._total = context.emit, rows, num_done, num_rows
        self._last = -1

    def tell(self) -> None:
        found = [row.progress.read_text().split() for row in self._rows if row.progress.is_file()]
        parts = [(int(fields[0]), int(fields[1])) for fields in found if len(fields) == 3]
        if not parts:
            return
        steps = parts[0][1]
        done = self._done * steps + sum(step for step, _ in parts)
        if done != self._last:
            self._last = done
            self._emit(Progress("finetune", done, self._total * steps))
