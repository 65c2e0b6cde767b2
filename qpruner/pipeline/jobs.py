"""The (row, training seed) jobs of the last stages: their fine-tunes, their scores, and what their models take to use.

What a job left lies in a folder named by the digest of all that it depends on, and is recorded as the job ends: nothing
is trained or scored twice, not after an interruption, not where two rows are the same model, and not when rows or seeds
are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpruner.cluster.slots import worker_resources
from qpruner.errors import CorruptFile, StageError
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight import layout_for
from qpruner.pipeline.rows import Row, candidates_for
from qpruner.plans.plan import Layout, PrecisionPlan
from qpruner.runs.events import Message, Progress
from qpruner.runs.records import CandidateRecord, Inference, InferenceSetting, RowScores, TaskScore, digest_of
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import (
    exists,
    for_each,
    published_folders,
    quarantine,
    read_json,
    read_progress,
    remove,
    verify_folder,
    write_json,
)
from qpruner.training.checkpoints import ADAPTER_WEIGHTS, is_damaged
from qpruner.training.table_rows import (
    Candidate,
    CandidateJob,
    FinetuneOutcome,
    InferenceJob,
    evaluate_candidate,
    finetune_candidate,
    measure_inference,
)
from qpruner.wording import counted, error_text

RowJob = tuple[Row, Candidate]


def jobs_of(context: Context, rows: Iterable[Row]) -> list[RowJob]:
    """Rows under each of their training seeds."""
    fine_tunes = [(row, seed, plan) for row in rows for seed, plan in row.plans]
    jobs = candidates_for(context, [(row.name, plan.as_dict(), seed) for row, seed, plan in fine_tunes])
    return [(row, job) for (row, _, _), job in zip(fine_tunes, jobs, strict=True)]


def told_jobs(jobs: Iterable[RowJob]) -> list[tuple[str, str, int | None, str]]:
    """What tells one list of jobs from another."""
    return [(row.name, row.origin, job.seed, job.folder.name) for row, job in jobs]


def forget_without_rows(context: Context, stage: str, jobs: Iterable[RowJob]) -> None:
    """Drop the record of a stage some of whose fine-tuned rows are damaged or gone."""
    if not all(isinstance(each, CandidateRecord) for each in for_each(_recorded, [job.folder for _, job in jobs])):
        context.forget(stage)


def distinct(jobs: Iterable[tuple[Any, Candidate]]) -> list[Candidate]:
    """One job for each different model and training seed: a winner that is a control is not trained twice."""
    return list({job.folder: job for _, job in jobs}.values())


def finetune_jobs(context: Context, stage: str, jobs: list[RowJob]) -> list[CandidateRecord]:
    """Fine-tune what has no record yet, each in a process or a group of its own; a record for every row and seed."""
    models = distinct(jobs)
    recorded = for_each(_recorded, [job.folder for job in models])
    found: dict[Path, CandidateRecord] = {}
    for job, each in zip(models, recorded, strict=True):
        if isinstance(each, CandidateRecord):
            found[job.folder] = each
        elif each:
            where = quarantine(job.folder, job.folder.parent)
            context.emit(Message(stage, f"warning: {each}; set aside in {where}, {job.label} is fine-tuned anew"))
    for_each(remove, [job.checkpoints for job in models if job.folder in found])  # of a driver that was killed
    left = [job for job in models if job.folder not in found]
    for job in left:
        for checkpoint in filter(is_damaged, published_folders(job.checkpoints)):
            where = quarantine(checkpoint, job.folder.parent)
            text = f"warning: {checkpoint} is damaged; set aside in {where}, {job.label} does not go on from it"
            context.emit(Message(stage, text))
    if left:
        origins = {job.folder: row.origin for row, job in jobs}
        progress = JobProgress(context, stage, [job.progress for job in left], len(models), "steps")
        for position, outcome in _finetuned(context, left, progress.tell):
            job = left[position]
            record = found[job.folder] = _record_of(context, job, origins[job.folder], outcome)
            write_json(job.folder / "record.json", record)
            remove(job.checkpoints)
            text = f"{job.label}: validation loss {outcome.validation_loss:.4f} after {outcome.steps} steps"
            context.emit(Message(stage, f"{text}, peak memory {outcome.peak_memory_bytes / 1e6:.0f} MB"))
            for trouble in outcome.tracker_errors:
                context.emit(Message(stage, f"warning: {job.label}: {trouble}"))
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
    try:
        verify_folder(weights.parent)
    except CorruptFile as error:
        return str(error)
    return record


def _finetuned(
    context: Context, jobs: list[Candidate], on_tick: Callable[[], None]
) -> Iterator[tuple[int, FinetuneOutcome]]:
    """Positions and outcomes as the fine-tunes end; as many at once as the slots take."""

    def saved(position: int) -> list[Path]:
        return sorted(published_folders(jobs[position].checkpoints))

    num_workers = context.config.finetune.num_workers
    tasks, resources, concurrent = _worker_jobs(context, jobs, num_workers)
    if num_workers > 1:
        from qpruner.cluster.group import run_groups

        scratch = context.run_dir.scratch("train")
        return run_groups(
            finetune_candidate, tasks, resources, num_workers, concurrent, scratch, context.check_node, on_tick, saved
        )
    from qpruner.cluster.cluster import run_tasks

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


def _layout_of(context: Context, job: Candidate) -> Layout:
    if job.checkpoint == context.checkpoint:
        return context.layout
    return layout_for(context.config, context.inspection.model_config)


def scores_digest(context: Context) -> str:
    """Digest of what a row is scored on."""
    texts = [row.response for row in context.inspection.examples.get("text", ())]
    metrics = context.inspection.metrics["evaluate"]
    return digest_of(context.config.evaluate, context.task_digest, metrics, texts, context.config.data.max_length)


def score_jobs(context: Context, stage: str, jobs: list[Candidate], text: Path | None) -> dict[Path, RowScores]:
    """Score what has no record of these tasks and this text yet; the scores by folder."""
    from qpruner.cluster.cluster import run_tasks

    digest = scores_digest(context)
    found: dict[Path, RowScores] = {}
    for job in jobs:
        try:
            record = read_json(job.folder / "scores.json", RowScores)
        except CorruptFile as error:
            where = quarantine(job.folder / "scores.json", job.folder.parent)
            context.emit(Message(stage, f"warning: {error}; set aside in {where}, {job.label} is scored again"))
            continue
        if record and record.digest == digest:
            found[job.folder] = record
    left = [job for job in jobs if job.folder not in found]
    if left:
        tasks, resources, concurrent = _worker_jobs(context, left, text=text)
        signs = [job.scoring_progress for job in left]
        for_each(remove, signs)  # of a session that was interrupted
        progress = JobProgress(context, stage, signs, len(jobs), "answers")
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
                gpu_seconds=scored.seconds * gpus_held(context),
            )
            write_json(job.folder / "scores.json", record)
            found[job.folder] = record
            context.emit(Message(stage, f"{job.label}: {scores_line(record.scores)}"))
    return found


def scores_line(scores: tuple[TaskScore, ...]) -> str:
    """`task acc_norm 0.650 (se 0.048)` for every task."""
    return ", ".join(f"{each.task} {each.metric} {each.value:.3f}{error_text(each.stderr, 3)}" for each in scores)


def measure_in_turns(
    context: Context, stage: str, jobs: Iterable[Candidate]
) -> tuple[InferenceSetting, dict[Path, Inference]]:
    """What each row takes to use, by its folder; training seeds of one plan are one model."""
    from qpruner.cluster.cluster import run_tasks

    models: dict[tuple[Any, ...], list[Candidate]] = {}
    for job in sorted(jobs, key=lambda job: str(job.checkpoint)):
        models.setdefault((job.checkpoint, *job.plan.items()), []).append(job)
    resources, _ = context.task_resources(1)
    alone = tuple(same[0] for same in models.values())
    context.emit(Message(stage, f"{counted(len(alone), 'model')} in turns: memory and tokens a second"))
    signs = context.run_dir.candidates / "turns"
    task = InferenceJob(context.worker_config, alone, context.data, int(resources.get("cpu", 1)), signs)
    remove(signs)  # of an earlier command
    progress = JobProgress(context, stage, [signs], 1, "memory and tokens a second")
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


def _worker_jobs(
    context: Context, jobs: list[Candidate], num_workers: int = 1, text: Path | None = None
) -> tuple[list[CandidateJob], dict[str, float], int]:
    resources, concurrent = context.task_resources(len(jobs), num_workers)
    threads = int(resources.get("cpu", 1))
    tasks = [CandidateJob(context.worker_config, job, context.data, threads, text, context.trackers) for job in jobs]
    return tasks, resources, concurrent


def gpus_held(context: Context, num_workers: int = 1) -> float:
    """GPUs that a job of so many workers holds."""
    return num_workers * worker_resources(context.trial_resources, num_workers).get("gpu", 0.0)


@contextmanager
def row_set_aside_if_damaged(run: RunDir, stage: str) -> Iterator[None]:
    """Set the row aside whose adapter turns out not to be as it was written, so that the next command makes it anew."""
    try:
        yield
    except CorruptFile as error:
        if not (error.path and error.path.is_relative_to(run.candidates)):
            raise
        row = run.candidates / error.path.relative_to(run.candidates).parts[0]
        if isinstance(_recorded(row), CandidateRecord):
            raise StageError(
                stage,
                f"{error}; seen from the driver's machine it is whole",
                "let the machine that read it see `output` again, or leave it out, then repeat the command",
            ) from error
        cause = f"{error}; set aside in {quarantine(row, run.candidates)}"
        raise StageError(stage, cause, "repeat the command: that row alone is fine-tuned anew") from error


class JobProgress:
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
        found = [(text or "").split() for text in for_each(read_progress, self._signs)]
        parts = [(int(fields[0]), int(fields[1])) for fields in found if len(fields) == 2]
        if not parts:
            return
        each = parts[0][1]
        done = (self._num_jobs - len(self._signs)) * each + sum(done for done, _ in parts)
        if done != self._last:
            self._last = done
            self._emit(Progress(self._stage, done, self._num_jobs * each, self._what))
