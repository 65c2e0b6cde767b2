"""The last stages: the winner's full fine-tune beside the rows it is compared with, and the held-out evaluation.

Both work through (row, training seed) jobs. What a job left lies in a folder named by the digest of all that it
depends on, and is recorded as the job ends: nothing is trained or scored twice, not after an interruption, not where
two rows are the same model, and not when rows or seeds are added.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.candidates import (
    ADAPTER_WEIGHTS,
    Candidate,
    CandidateJob,
    FinetuneOutcome,
    InferenceJob,
    evaluate_candidate,
    finetune_candidate,
    is_damaged,
    measure_inference,
)
from qpruner.config import RunConfig
from qpruner.errors import CorruptFile, StageError
from qpruner.events import Emit, Message, Progress
from qpruner.execution.slots import worker_resources
from qpruner.execution.workshop import Bench
from qpruner.mirror import FileList, emptied, fetch, list_beside, put_folders, workplace, written
from qpruner.objects import is_mirror, name_of
from qpruner.pipeline.compress import telling
from qpruner.pipeline.context import Context
from qpruner.pipeline.rows import Row, candidates_for, table_rows, untuned_candidates
from qpruner.pipeline.stage import Stage, is_whole, run_stage
from qpruner.plan import Layout, PrecisionPlan
from qpruner.preflight import layout_for
from qpruner.records import (
    CandidateRecord,
    EvalRecord,
    FinetuneRecord,
    Inference,
    InferenceSetting,
    RowScores,
    SearchRecord,
    SensitivityRecord,
    TaskScore,
    digest_of,
)
from qpruner.report.table import BASE, SEARCHED
from qpruner.rundir import (
    RunDir,
    exists,
    file_digest,
    files_in,
    for_each,
    publish_folder,
    read_json,
    read_sign,
    remove,
    set_aside,
    write_json,
)
from qpruner.wording import counted, error_text


def finetune(context: Context, searched: SearchRecord, measured: SensitivityRecord) -> FinetuneRecord:
    """The winner, and with `finetune.compare` every row it is compared with, from the same start on the same data."""
    jobs = finetune_jobs(context, searched, measured)
    stage = finetune_stage(context, searched, jobs)
    # `final` is where people look; the stage's own folder keeps nothing.
    final = context.run_dir.root / "final"
    recorded = for_each(_recorded, [job.folder for _, job in jobs])
    if not all(isinstance(each, CandidateRecord) for each in recorded) or not _is_there(context, final):
        context.forget("finetune")

    def work(scratch: Path) -> dict[str, Any]:
        finetuned = _finetune_jobs(context, jobs)
        # Of the searched row's training seeds the first.
        winner = next(job for row, job in jobs if row.name == SEARCHED)
        context.forget("finetune")  # what it vouches for is about to be written over
        before = context.gpu_time.seconds
        with _row_set_aside_if_damaged(context.run_dir, "finetune"):
            context.workshop.do(write_final, FinalJob(context.config, winner, final), context.emit)
        context.workshop.close()
        # Those of earlier sessions are among them; rows of one model share a fine-tune.
        held = sum({each.digest: each.gpu_seconds for each in finetuned}.values())
        written = context.gpu_time.seconds - before
        return {"winner": SEARCHED, "candidates": finetuned, "gpu_seconds": held + written}

    def figures(record: FinetuneRecord) -> str:
        titles, first = {job.name: job.title for _, job in jobs}, _first_seed(record.candidates)
        losses = [(titles[each.name], each.validation_loss) for each in record.candidates if each.seed == first]
        told = ", ".join(f"{title} {loss:.4f}" for title, loss in losses)
        return f"training seed {first}: validation loss {told}"

    return run_stage(context, stage, FinetuneRecord, work, figures)


def finetune_stage(context: Context, searched: SearchRecord, jobs: list[tuple[Row, Candidate]]) -> Stage:
    """What `finetune` depends on."""
    settings = context.config.finetune
    length = counted(settings.steps, "step") if settings.steps else counted(settings.epochs or 0.0, "epoch")
    told = [(row.name, row.origin, job.seed, job.folder.name) for row, job in jobs]
    work = f"{counted(len(_distinct(jobs)), 'fine-tune')}, {length}"
    # A plan's loss here beside its loss as a trial, after as many steps, looks like an error.
    detail = f"{work}, under other training seeds than the trials', so losses are no longer those of trials"
    return Stage("finetune", detail, (searched.digest, told))


def finetune_jobs(context: Context, searched: SearchRecord, measured: SensitivityRecord) -> list[tuple[Row, Candidate]]:
    """Every row of the table under every training seed."""
    fine_tunes = [(row, seed, plan) for row in table_rows(context, searched, measured) for seed, plan in row.plans]
    jobs = candidates_for(context, [(row.name, plan.as_dict(), seed) for row, seed, plan in fine_tunes])
    return [(row, job) for (row, _, _), job in zip(fine_tunes, jobs, strict=True)]


def _is_there(context: Context, final: Path) -> bool:
    """Whether the final folder is there whole; of one at a URI whether all of it is there, since who fetches it
    compares it."""
    if not context.run_dir.is_at_uri:
        return final.is_dir() and is_whole(context.run_dir, final, "finetune", context.emit)
    try:
        listed = read_json(list_beside(final), FileList)
    except CorruptFile as error:
        trouble = str(error)
    else:
        if listed is None:
            return False
        missing = listed.sha256.keys() - files_in(final).keys()
        trouble = f"{name_of(final / min(missing))} is missing" if missing else ""
    if trouble:
        context.emit(Message("finetune", f"warning: {trouble}; the final model is written again"))
    return not trouble


@contextmanager
def _row_set_aside_if_damaged(run: RunDir, stage: str) -> Iterator[None]:
    """Set the row aside whose adapter turns out not to be as it was written, so that the next command makes it anew."""
    try:
        yield
    except CorruptFile as error:
        if not (error.path and error.path.is_relative_to(run.candidates)):
            raise
        row = run.candidates / error.path.relative_to(run.candidates).parts[0]
        if not run.is_at_uri and isinstance(_recorded(row), CandidateRecord):
            raise StageError(
                stage,
                f"{error}; seen from the driver's machine it is whole",
                "let the machine that read it see `output` again, or leave it out, then repeat the command",
            ) from error
        cause = f"{error}; set aside in {set_aside(row, run.candidates)}"
        raise StageError(stage, cause, "repeat the command: that row alone is fine-tuned anew") from error


def evaluate(context: Context, tuned: FinetuneRecord) -> EvalRecord:
    """Accuracies on tasks the search never saw: the model before any fine-tune, step by step, and every fine-tuned row
    and seed."""
    jobs = evaluate_jobs(context, tuned)
    stage = evaluate_stage(context, tuned, jobs)

    def work(scratch: Path) -> dict[str, Any]:
        about, text = held_out_text(context, scratch / "text")
        with _row_set_aside_if_damaged(context.run_dir, "evaluate"):
            scored = _evaluate_jobs(context, _distinct(jobs), text)
            before = context.gpu_time.seconds
            setting, taken = _measure_inference(context, [job for _, job in jobs if job.seed is not None])
        rows = [
            scored[job.folder].model_copy(update={"name": name, "inference": taken.get(job.folder)})
            for name, job in jobs
        ]
        held = sum(row.gpu_seconds for row in scored.values()) + context.gpu_time.seconds - before
        return {
            "rows": rows,
            "text": about,
            "inference": setting,
            "tested": context.tested_digest,
            "gpu_seconds": held,
        }

    def figures(record: EvalRecord) -> str:
        first = _first_seed(tuned.candidates)
        scores = {(row.name, row.seed): _scores_line(row.scores) for row in record.rows}
        title = next(job.title for name, job in jobs if name == SEARCHED)
        told = {"base as it is": (BASE, None), "base": (BASE, first), title: (SEARCHED, first)}
        lines = [f"{name} {scores[row]}" for name, row in told.items() if row in scores]
        return f"training seed {first}: {'; '.join(lines)}"

    return run_stage(context, stage, EvalRecord, work, figures)


def evaluate_stage(context: Context, tuned: FinetuneRecord, jobs: list[tuple[str, Candidate]]) -> Stage:
    """What `evaluate` depends on."""
    models = counted(len(_distinct(jobs)), "model")
    detail = f"{', '.join(context.config.evaluate.tasks)} for {models}"
    return Stage("evaluate", detail, (tuned.digest, scores_digest(context)))


def evaluate_jobs(context: Context, tuned: FinetuneRecord) -> list[tuple[str, Candidate]]:
    """Models before any fine-tune, step by step, and every fine-tuned row and seed."""
    winner = next(each.plan for each in tuned.candidates if each.name == SEARCHED)
    fine_tuned = candidates_for(context, [(each.name, each.plan, each.seed) for each in tuned.candidates])
    return [(job.name, job) for job in (*untuned_candidates(context, winner), *fine_tuned)]


def scores_digest(context: Context) -> str:
    """Digest of what a row is scored on."""
    texts = [row.response for row in context.inspection.examples.get("text", ())]
    metrics = context.inspection.metrics["evaluate"]
    return digest_of(context.config.evaluate, context.task_digest, metrics, texts, context.config.data.max_length)


def held_out_text(context: Context, folder: Path) -> tuple[str | None, Path | None]:
    """What perplexity is measured on, in words and encoded; nothing where all there is are answers to questions."""
    from qpruner.data import load_confirmation, save_encoded, text_windows
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


def _measure_inference(context: Context, jobs: list[Candidate]) -> tuple[InferenceSetting, dict[Path, Inference]]:
    """What each row takes to use, by its folder; training seeds of one plan are one model."""
    from qpruner.execution.cluster import run_tasks

    models: dict[tuple[Any, ...], list[Candidate]] = {}
    for job in sorted(jobs, key=lambda job: str(job.checkpoint)):
        models.setdefault((job.checkpoint, *job.plan.items()), []).append(job)
    resources, _ = context.task_resources(1)
    alone = tuple(same[0] for same in models.values())
    context.emit(Message("evaluate", f"{counted(len(alone), 'model')} in turns: memory and tokens a second"))
    signs = context.run_dir.candidates / "turns"
    task = InferenceJob(context.worker_config, alone, context.data, int(resources.get("cpu", 1)), signs)
    remove(signs)  # of an earlier command
    progress = _Progress(context, "evaluate", [signs], 1, "memory and tokens a second")
    [(_, (setting, found))] = run_tasks(
        measure_inference,
        [task],
        resources,
        1,
        fresh=True,
        check_node=context.check_node,
        on_tick=progress.tell,
        on_held=context.gpu_time.add,
    )
    folders = zip(models.values(), found, strict=True)
    return setting, {job.folder: taken for same, taken in folders for job in same}


def _distinct(jobs: Iterable[tuple[Any, Candidate]]) -> list[Candidate]:
    """One job for each different model and training seed: a winner that is a control is not trained twice."""
    return list({job.folder: job for _, job in jobs}.values())


def _worker_jobs(
    context: Context, jobs: list[Candidate], num_workers: int = 1, text: Path | None = None
) -> tuple[list[CandidateJob], dict[str, float], int]:
    resources, concurrent = context.task_resources(len(jobs), num_workers)
    threads = int(resources.get("cpu", 1))
    tasks = [CandidateJob(context.worker_config, job, context.data, threads, text, context.trackers) for job in jobs]
    return tasks, resources, concurrent


def _gpus_held(context: Context, num_workers: int = 1) -> float:
    """GPUs that a job of so many workers holds."""
    return num_workers * worker_resources(context.trial_resources, num_workers).get("gpu", 0.0)


def _finetune_jobs(context: Context, jobs: list[tuple[Row, Candidate]]) -> list[CandidateRecord]:
    """Fine-tune what has no record yet, each in a process or a group of its own; a record for every row and seed."""
    distinct = _distinct(jobs)
    recorded = for_each(_recorded, [job.folder for job in distinct])
    found: dict[Path, CandidateRecord] = {}
    for job, each in zip(distinct, recorded, strict=True):
        if isinstance(each, CandidateRecord):
            found[job.folder] = each
        elif each:
            where = set_aside(job.folder, job.folder.parent)
            context.emit(Message("finetune", f"warning: {each}; set aside in {where}, {job.label} is fine-tuned anew"))
    for_each(remove, [job.checkpoints for job in distinct if job.folder in found])  # of a driver that was killed
    left = [job for job in distinct if job.folder not in found]
    for job in left:
        for checkpoint in filter(is_damaged, put_folders(job.checkpoints)):
            where = set_aside(checkpoint, job.folder.parent)
            text = f"warning: {checkpoint} is damaged; set aside in {where}, {job.label} does not go on from it"
            context.emit(Message("finetune", text))
    if left:
        origins = {job.folder: row.origin for row, job in jobs}
        progress = _Progress(context, "finetune", [job.progress for job in left], len(distinct), "steps")
        for position, outcome in _finetuned(context, left, progress.tell):
            job = left[position]
            record = found[job.folder] = _record_of(context, job, origins[job.folder], outcome)
            write_json(job.folder / "record.json", record)
            remove(job.checkpoints)
            text = f"{job.label}: validation loss {outcome.validation_loss:.4f} after {outcome.steps} steps"
            context.emit(Message("finetune", f"{text}, peak memory {outcome.peak_memory_bytes / 1e6:.0f} MB"))
            for trouble in outcome.untold:
                context.emit(Message("finetune", f"warning: {job.label}: {trouble}"))
    records = []
    for row, job in jobs:
        records.append(found[job.folder].model_copy(update={"name": row.name, "origin": row.origin}))
    return records


def _recorded(folder: Path) -> CandidateRecord | str | None:
    """The record of a fine-tuned row, or what of it is damaged; of weights at a URI who fetches them finds that out."""
    weights = folder / "adapter" / ADAPTER_WEIGHTS
    try:
        record = read_json(folder / "record.json", CandidateRecord)
    except CorruptFile as error:
        return str(error)
    if record is None or not exists(weights):
        return None
    if record.adapter_sha256 and not is_mirror(weights) and file_digest(weights) != record.adapter_sha256:
        return f"{name_of(weights)} is damaged"
    return record


def _finetuned(
    context: Context, jobs: list[Candidate], on_tick: Callable[[], None]
) -> Iterator[tuple[int, FinetuneOutcome]]:
    """Positions and outcomes as the fine-tunes end; as many at once as the slots take."""

    def saved(position: int) -> list[Path]:
        return sorted(put_folders(jobs[position].checkpoints))

    num_workers = context.config.finetune.num_workers
    tasks, resources, concurrent = _worker_jobs(context, jobs, num_workers)
    if num_workers > 1:
        from qpruner.execution.group import run_groups

        scratch = context.run_dir.scratch("train")
        return run_groups(
            finetune_candidate, tasks, resources, num_workers, concurrent, scratch, context.check_node, on_tick, saved
        )
    from qpruner.execution.cluster import run_tasks

    return run_tasks(
        finetune_candidate,
        tasks,
        resources,
        concurrent,
        fresh=True,
        check_node=context.check_node,
        on_tick=on_tick,
        progress=saved,
    )


def _record_of(context: Context, job: Candidate, origin: str, outcome: FinetuneOutcome) -> CandidateRecord:
    plan, layout = PrecisionPlan.from_dict(dict(job.plan)), _layout_of(context, job)
    assert job.seed is not None
    measured = {name: value for name, value in vars(outcome).items() if name != "untold"}
    return CandidateRecord(
        digest=job.folder.name,
        name=job.name,
        origin=origin,
        seed=job.seed,
        plan=dict(job.plan),
        plan_bytes=layout.plan_bytes(plan),
        mean_bits=layout.mean_bits(plan),
        gpu_seconds=outcome.seconds * _gpus_held(context, context.config.finetune.num_workers),
        num_parameters=layout.num_parameters,
        **measured,
    )


def _evaluate_jobs(context: Context, jobs: list[Candidate], text: Path | None) -> dict[Path, RowScores]:
    """Score what has no record of these tasks and this text yet; the scores by folder."""
    from qpruner.execution.cluster import run_tasks

    digest = scores_digest(context)
    found: dict[Path, RowScores] = {}
    for job in jobs:
        try:
            record = read_json(job.folder / "scores.json", RowScores)
        except CorruptFile as error:
            where = set_aside(job.folder / "scores.json", job.folder.parent)
            context.emit(Message("evaluate", f"warning: {error}; set aside in {where}, {job.label} is scored again"))
            continue
        if record and record.digest == digest:
            found[job.folder] = record
    left = [job for job in jobs if job.folder not in found]
    if left:
        tasks, resources, concurrent = _worker_jobs(context, left, text=text)
        signs = [job.scoring_progress for job in left]
        for_each(remove, signs)  # of a session that was interrupted
        progress = _Progress(context, "evaluate", signs, len(jobs), "answers")
        for position, scored in run_tasks(
            evaluate_candidate,
            tasks,
            resources,
            concurrent,
            fresh=False,
            check_node=context.check_node,
            on_tick=progress.tell,
        ):
            job = left[position]
            record = RowScores(
                digest=digest,
                name=job.name,
                seed=job.seed,
                scores=scored.scores,
                text_loss=scored.text_loss,
                gpu_seconds=scored.seconds * _gpus_held(context),
            )
            write_json(job.folder / "scores.json", record)
            found[job.folder] = record
            context.emit(Message("evaluate", f"{job.label}: {_scores_line(record.scores)}"))
    return found


def _first_seed(candidates: Sequence[CandidateRecord]) -> int:
    """The training seed that every row had, whatever their number."""
    return min(each.seed for each in candidates)


def _scores_line(scores: tuple[TaskScore, ...]) -> str:
    """`task acc_norm 0.650 (se 0.048)` for every task."""
    return ", ".join(f"{each.task} {each.metric} {each.value:.3f}{error_text(each.stderr, 3)}" for each in scores)


def _layout_of(context: Context, job: Candidate) -> Layout:
    if job.checkpoint == context.checkpoint:
        return context.layout
    return layout_for(context.config, context.inspection.model_config)


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
    scratch = emptied(workplace(job.folder.with_name(f".{job.folder.name}")))
    with written(scratch):
        save_checkpoint(model, load_tokenizer(str(checkpoint)), scratch, told)
        for file in ("adapter_config.json", ADAPTER_WEIGHTS):
            shutil.copy2(adapter / file, scratch / file)
    publish_folder(scratch, job.folder)


class _Progress:
    """Adds up what the workers of equally long jobs leave in small files: `done total`, as they go.

    Args:
        context: The run.
        stage: Whose progress it is.
        signs: A file for each job that is left.
        num_jobs: Jobs in all; the others are done.
        what: Is counted.
    """

    def __init__(self, context: Context, stage: str, signs: list[Path], num_jobs: int, what: str) -> None:
        self._emit, self._stage, self._signs, self._num_jobs, self._what = context.emit, stage, signs, num_jobs, what
        self._last = -1

    def tell(self) -> None:
        found = [(text or "").split() for text in for_each(read_sign, self._signs)]
        parts = [(int(fields[0]), int(fields[1])) for fields in found if len(fields) == 2]
        if not parts:
            return
        each = parts[0][1]
        done = (self._num_jobs - len(self._signs)) * each + sum(done for done, _ in parts)
        if done != self._last:
            self._last = done
            self._emit(Progress(self._stage, done, self._num_jobs * each, self._what))
