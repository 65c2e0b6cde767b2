"""Make, run and score fine-tunes, and read what earlier commands recorded of them.

The folder of a fine-tune is named by the digest of all that its weights depend on, so equal
fine-tunes share a folder, and later commands reuse it. Its `record.json` is a `FineTune`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from qpruner.config.schema import RunConfig
from qpruner.data.measures import over_questions
from qpruner.errors import CorruptFile, StageError
from qpruner.pipeline.context import Context
from qpruner.pipeline.final_model import merge
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import PrecisionPlan
from qpruner.quantization.formats import trained_by
from qpruner.runs import storage
from qpruner.runs.events import Progress
from qpruner.runs.records import FineTune, digest_of
from qpruner.runs.run_dir import RunDir
from qpruner.training.checkpoints import is_damaged
from qpruner.training.jobs import FineTuneJob, Scoring, score, tune, tune_rounding
from qpruner.wording import error_text

Result = TypeVar("Result")


def make_job(
    context: Context,
    plan: PrecisionPlan,
    seed: int | None,
    scoring: Scoring,
    *,
    name: str,
    title: str,
    origin: str,
    config: RunConfig | None = None,
    tunes_rounding: bool = True,
) -> FineTuneJob:
    """Make the job that fine-tunes or scores a plan.

    Args:
        context: The run.
        plan: The plan.
        seed: The training seed; None for a model without a fine-tune.
        scoring: What the model is scored on.
        name: The name of its row in records.
        title: The name of its row for people.
        origin: Where the plan comes from.
        config: A configuration with another length of the fine-tune than that of the run.
        tunes_rounding: Whether `quantize.rounding: tuned` applies; trials have GPTQ instead.
    """
    config = config or context.worker_config
    formats = plan.as_dict()
    method = trained_by(config.training.method, plan.formats)
    config = config.model_copy(update={"training": config.training.of(method)})
    bank = context.places.bank_of(plan.cut)
    layout = context.shapes.layout_of(plan.cut)
    tuned = context.places.tuned_of(plan) if tunes_rounding else None
    digest = digest_of(
        bank.inputs,
        bank.digests(formats.values()),
        tuned.digest if tuned else "",
        config.lora,
        config.training,
        (config.finetune.steps, config.finetune.epochs),
        config.seed,
        config.evaluate.batch_size,
        plan.cut,
        formats,
        seed,
    )
    record = FineTune(
        digest=digest,
        name=name,
        origin=origin,
        seed=seed,
        cut=plan.cut,
        plan=formats,
        plan_bytes=layout.plan_bytes(plan),
        mean_bits=layout.mean_bits(plan),
        num_parameters=layout.num_parameters,
        bank=bank.inputs if bank.uses_grams else "",
        method=method,
        learning_rate=config.training.rate_of(method),
    )
    folder = context.run_dir.candidates / digest
    return FineTuneJob(
        record=record,
        title=title,
        bank=bank,
        folder=folder,
        trained=folder / "trained",
        config=config,
        data=context.places.data,
        scoring=scoring,
        tuned=tuned,
        trackers=context.trackers,
    )


def job_keys(jobs: Iterable[FineTuneJob]) -> list[tuple[str, str, int | None, str]]:
    """List row name, origin of the plan, training seed and digest of each job, for a digest."""
    records = [job.record for job in jobs]
    return [(record.name, record.origin, record.seed, record.digest) for record in records]


def distinct(jobs: Iterable[FineTuneJob]) -> list[FineTuneJob]:
    """Return one job per folder: rows with the same plan and fine-tune share a folder."""
    return list({job.folder: job for job in jobs}.values())


# ---- fine-tunes


def are_recorded(jobs: Iterable[FineTuneJob]) -> bool:
    """Return True if the fine-tune of every job is recorded and its files are intact."""
    records = storage.for_each(_recorded, [job.folder for job in jobs])
    return all(isinstance(record, FineTune) for record in records)


def tune_all(
    stage: Stage[Any], jobs: Sequence[FineTuneJob], num_workers: int = 1, own_process: bool = False
) -> list[FineTune]:
    """Run the fine-tunes that have no record; return a record for every job.

    Each runs in `num_workers` processes; with `own_process` in processes that ran nothing before.
    """
    models = distinct(jobs)
    folders = [job.folder for job in models]
    tuned: dict[Path, FineTune] = {}
    for job, record in zip(models, storage.for_each(_recorded, folders), strict=True):
        if isinstance(record, FineTune):
            # A training that diverged left nothing to score anew.
            if record.trained_sha256 or record.scored == job.scoring.digest:
                tuned[job.folder] = record
        elif record:
            where = storage.quarantine(job.folder, job.folder.parent)
            stage.notify(
                f"warning: {record}; set aside in {where}, {job.label} is fine-tuned again"
            )

    # A killed driver may have left checkpoints of recorded fine-tunes.
    storage.for_each(storage.remove, [job.checkpoints for job in models if job.folder in tuned])
    for job in models:
        if job.folder in tuned:
            continue
        for checkpoint in filter(is_damaged, storage.published_folders(job.checkpoints)):
            stage.notify(f"warning: {checkpoint} is damaged; {job.label} does not resume from it")

    wanted = [job for job in models if job.folder not in tuned]
    _tune_roundings(stage, wanted)
    trainings = [job for job in wanted if not job.merges]
    mergers = [job for job in wanted if job.merges]
    num_trained = len(models) - len(mergers)
    runs = _run_jobs(stage, tune, trainings, num_trained, "steps", num_workers, own_process)
    for job, (record, tracker_errors) in runs:
        held = record.seconds * stage.context.machines.gpus_held(num_workers)
        tuned[job.folder] = _record(job, record, gpu_seconds=held)
        storage.remove(job.checkpoints)
        stage.notify(_tuned_line(job, record))
        for error in tracker_errors:
            stage.notify(f"warning: {job.label}: {error}")
    # These read the trainings above.
    for job, record in _run_jobs(stage, merge, mergers, len(mergers), "models merged"):
        held = (record.seconds + record.scoring_seconds) * stage.context.machines.gpus_held()
        tuned[job.folder] = _record(job, record, gpu_seconds=held)
        stage.notify(_tuned_line(job, record))
    return _under_own_names(jobs, tuned)


def _tune_roundings(stage: Stage[Any], jobs: Iterable[FineTuneJob]) -> None:
    """Tune the rounding of the plans of these jobs, in parallel, unless that has been done."""
    plans = {job.tuned.folder: job for job in jobs if job.tuned}
    wanted = [job for job in plans.values() if job.tuned and not job.tuned.is_done]
    machines = stage.context.machines
    for job, record in _run_jobs(stage, tune_rounding, wanted, len(wanted), "blocks rounded"):
        machines.gpu_time.add(record.seconds * machines.gpus_held())
        stage.notify(f"{job.title}: rounding tuned in {record.seconds:.0f} s")


def _tuned_line(job: FineTuneJob, record: FineTune) -> str:
    losses = [f"{half} loss {losses.mean:.4f}" for half, losses in record.losses.items()]
    memory = f"peak memory {record.peak_memory_bytes / 1e6:.0f} MB"
    return f"{job.label}: {', '.join(losses)} after {record.steps} steps, {memory}"


def _recorded(folder: Path) -> FineTune | str | None:
    """Return the record in a job's folder, or None if there is none.

    If the folder is damaged, a message is returned instead.
    """
    try:
        record = storage.read_json(folder / "record.json", FineTune)
        if record is None:
            return None
        if record.trained_sha256:  # a training that diverged leaves none
            trained = folder / "trained"
            if trained not in storage.published_folders(folder):
                return None
            storage.storage_at(trained).verify()
    except CorruptFile as error:
        return str(error)
    return record


def _record(job: FineTuneJob, record: FineTune, **held: float) -> FineTune:
    """Write the record of a job that is done, with the GPU seconds that it held."""
    record = record.model_copy(update=held)
    storage.write_json(job.folder / "record.json", record)
    return record


def _under_own_names(jobs: Iterable[FineTuneJob], records: dict[Path, FineTune]) -> list[FineTune]:
    """Return the record of each job under the job's own name and origin."""
    return [
        records[job.folder].model_copy(
            update={"name": job.record.name, "origin": job.record.origin}
        )
        for job in jobs
    ]


@contextmanager
def setting_aside_damaged_folder(run: RunDir, stage: str) -> Iterator[None]:
    """Set aside the folder of a fine-tune that the `with` block finds damaged.

    `StageError` of this stage is raised then. A folder that this process finds intact stays:
    another machine may not see it.
    """
    try:
        yield
    except CorruptFile as error:
        if not (error.path and error.path.is_relative_to(run.candidates)):
            raise
        folder = run.candidates / error.path.relative_to(run.candidates).parts[0]
        if isinstance(_recorded(folder), FineTune):
            raise StageError(
                stage,
                f"{error}; the driver finds the file intact",
                "make `output` visible to all machines, then repeat the command",
            ) from error
        cause = f"{error}; set aside in {storage.quarantine(folder, run.candidates)}"
        raise StageError(
            stage, cause, "repeat the command: only that row is fine-tuned again"
        ) from error


# ---- scores


def score_all(stage: Stage[Any], jobs: Sequence[FineTuneJob], unit: str) -> list[FineTune]:
    """Score models, unless their records have these scores already; return their records.

    The progress counts `unit`.
    """
    models = distinct(jobs)
    records: dict[Path, FineTune] = {}
    wanted = []
    for job in models:
        record = stage.read_intact(
            job.folder / "record.json", FineTune, job.folder.parent, f"{job.label} is scored again"
        )
        if record and record.scored == job.scoring.digest:
            records[job.folder] = record
        else:
            wanted.append(job)

    _tune_roundings(stage, wanted)
    # files of an interrupted command
    storage.for_each(storage.remove, [job.progress for job in wanted])
    for job, record in _run_jobs(stage, score, wanted, len(models), unit):
        held = record.scoring_seconds * stage.context.machines.gpus_held()
        records[job.folder] = _record(job, record, scoring_gpu_seconds=held)
        stage.notify(f"{job.label}: {scores_line(record)}")
    return _under_own_names(jobs, records)


def scores_line(record: FineTune) -> str:
    """Format the losses of a model and its scores on tasks."""
    scores = []
    for half, losses in record.losses.items():
        stderr = over_questions(losses.by_row).stderr
        scores.append(f"{half} loss {losses.mean:.4f}{error_text(stderr, 4)}")
    scores += tasks_text(record)
    if record.accuracy is not None and len(record.tasks) > 1:
        scores.append(f"mean {record.accuracy:.3f}{error_text(record.accuracy_stderr, 3)}")
    return ", ".join(scores)


def tasks_text(record: FineTune) -> list[str]:
    """Format the score on every task, such as `arc_easy acc_norm 0.650 (se 0.048)`."""
    return [
        f"{task.task} {task.metric} {task.value:.3f}{error_text(task.stderr, 3)}"
        for task in record.tasks
    ]


# ---- workers


def _run_jobs(
    stage: Stage[Any],
    function: Callable[[FineTuneJob], Result],
    jobs: Sequence[FineTuneJob],
    num_all: int,
    unit: str,
    num_workers: int = 1,
    own_process: bool = False,
) -> Iterator[tuple[FineTuneJob, Result]]:
    """Run a function on the jobs in parallel, each in `num_workers` processes.

    Yield each job with its result as it ends, and emit the progress of all `num_all` jobs in
    `unit`; those that are not in `jobs` count as done.
    """
    if not jobs:
        return
    context = stage.context
    resources, concurrent = context.machines.task_resources(len(jobs), num_workers)
    threads = int(resources.get("cpu", 1))
    tasks = [replace(job, threads=threads) for job in jobs]
    hooks: dict[str, Any] = {
        "on_tick": job_progress(stage, [job.progress for job in jobs], num_all, unit),
        "progress": lambda place: sorted(storage.published_folders(jobs[place].checkpoints)),
    }
    if num_workers == 1:
        results = context.machines.run_tasks(
            function, tasks, resources, concurrent, own_process, **hooks
        )
    else:
        from qpruner.cluster.group import run_groups

        results = run_groups(
            function,
            tasks,
            resources,
            num_workers,
            concurrent,
            scratch=context.run_dir.scratch("train"),
            check_node=context.machines.check_node,
            **hooks,
        )
    for position, result in results:
        yield jobs[position], result


def job_progress(
    stage: Stage[Any], files: Sequence[Path], num_jobs: int, unit: str
) -> Callable[[], None]:
    """Return a callback that emits the progress of equally long jobs.

    It is summed from the progress files of workers. `files` are those of the unfinished jobs, each
    with the text `done total`; `num_jobs` counts finished jobs too.
    """
    last = -1

    def emit() -> None:
        nonlocal last
        texts = [text.split() for text in storage.for_each(storage.read_progress, files) if text]
        parts = [(int(fields[0]), int(fields[1])) for fields in texts if len(fields) == 2]
        if not parts:
            return
        size = parts[0][1]
        done = (num_jobs - len(files)) * size + sum(done for done, _ in parts)
        if done != last:
            last = done
            stage.context.emit(Progress(stage.name, done, num_jobs * size, unit))

    return emit
