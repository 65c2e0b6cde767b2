"""Fine-tune plans and score models, each model in the same way.

Worker processes run `tune` and `score`, one job at a time; several processes may share a fine-tune.
Ray is not used here.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import RunConfig
from qpruner.data.encoding import load_encoded, load_scored
from qpruner.data.measures import over_tasks
from qpruner.errors import TrainingDiverged
from qpruner.models.loading import load_tokenizer
from qpruner.models.memory import PeakMemory, begin_job
from qpruner.runs.records import FineTune, RowLosses, ScoredRows
from qpruner.runs.storage import fetch, progress_seconds, storage_at, write_progress
from qpruner.training.checkpoints import (
    Ownership,
    keep_checkpoint,
    latest_checkpoint,
    load_trained,
    publish_trained,
)
from qpruner.training.trackers import Trackers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qpruner.data.losses import LossResult
    from qpruner.quantization.bank import BankSource
    from qpruner.quantization.tuned import TunedPlan, TunedRecord
    from qpruner.training.finetune import TrainingResult


@dataclass(frozen=True)
class Scoring:
    """What a model is scored on."""

    digest: str = ""  # of the rows, questions and text, for `FineTune.scored`
    rows: ScoredRows | None = None
    text: Path | None = None  # folder with windows of held-out text
    tasks: Sequence[str] = ()
    limit: int | None = None  # questions of each task
    skip: int = 0  # questions at the beginning of each task that are left out
    num_fewshot: int = 0
    metric: str | None = None  # None: the first that each task reports


@dataclass(frozen=True)
class FineTuneJob:
    """A worker's job: to fine-tune a plan and score it, or to score it as it is.

    `record` has the plan and the training seed; the worker returns it with what it measured. The
    seed sets data order and dropout. Without a seed the model is scored as the plan gives it, with
    any initial adapters.
    """

    record: FineTune
    title: str  # name of the model for people
    bank: BankSource
    folder: Path  # for the files of the fine-tune
    trained: Path  # folder of what was trained: the adapter in peft's format, or the scales
    config: RunConfig
    data: Path
    scoring: Scoring = Scoring()
    tuned: TunedPlan | None = None  # the tuned rounding of the plan
    merges: FineTuneJob | None = None
    """The fine-tune of the unpacked model whose adapter is merged before the weights are rounded;
    `trained` is then a folder with the whole model."""
    survives_divergence: bool = False  # then a diverged training has the worst score
    trackers: Trackers | None = None
    threads: int = 1

    @property
    def label(self) -> str:
        """The title and the training seed."""
        if self.record.seed is None:
            return f"{self.title} (no fine-tune)"
        return f"{self.title}, training seed {self.record.seed}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the fine-tune's checkpoints, removed once the fine-tune is recorded."""
        return self.folder / "checkpoints"

    @property
    def progress(self) -> Path:
        """File with `done total`, the progress of the job.

        It counts blocks in `tune_rounding`, and training steps in `tune`. In `score` it counts
        lm-eval requests, or the one model if it is scored on no task.
        """
        return self.folder / "progress"


def tune(job: FineTuneJob) -> tuple[FineTune, list[str]]:
    """Fine-tune a plan on all training rows, save what was trained, and score the model.

    The fine-tune begins from the plan's model or the latest checkpoint. If another process
    starts the same fine-tune, this process raises `TakenOver` before its next write.

    Returns:
        The record with what was measured, and errors of experiment trackers. Peak memory is that of
        this process.
    """
    from qpruner.quantization.assembly import cast_adapters
    from qpruner.training.finetune import Share

    started = time.monotonic()
    begin_job(job.threads)
    ownership = Ownership(job.folder / "owner.json")
    is_first = Share.own().rank == 0
    if is_first:
        ownership.take()
    memory = PeakMemory()
    model = build(job)
    try:
        result, tracker_errors = _train(job, model, ownership)
    except TrainingDiverged:
        if not job.survives_divergence:
            raise
        _remove_staging(job)
        seconds = {"seconds": time.monotonic() - started}
        return job.record.model_copy(update=_worst_scores(job) | seconds), []

    peak = memory.bytes()
    cast_adapters(model)
    scores = _scores(job, model)
    digest = ""
    if is_first:
        digest = publish_trained(model, job.trained, job.checkpoints, ownership)
        _remove_staging(job)  # not by the other processes, which may share this machine
    measured = {
        "steps": result.steps,
        "train_loss": result.train_loss,
        "peak_memory_bytes": peak,
        "memory_counter": memory.counter,
        "trained_sha256": digest,
        "seconds": time.monotonic() - started,
    }
    return job.record.model_copy(update=measured | scores), tracker_errors


def score(job: FineTuneJob) -> FineTune:
    """Score a model, and return its record with the scores.

    Raises:
        CorruptFile: If what a fine-tune has trained cannot be read.
    """
    started = time.monotonic()
    begin_job(job.threads)
    model = build_trained(job)
    progress = ProgressFile(job.progress)
    scores = _scores(job, model, progress)
    if not job.scoring.tasks:
        progress.write(1, 1)
    seconds = {"scoring_seconds": time.monotonic() - started}
    return job.record.model_copy(update=scores | seconds)


def build(job: FineTuneJob) -> PeftModel | PreTrainedModel:
    """Build the job's model as its training begins."""
    from qpruner.quantization.assembly import plan_model

    return plan_model(job.bank, job.record.plan, job.bank.seed, tuned=job.tuned)


def build_trained(job: FineTuneJob) -> PeftModel | PreTrainedModel:
    """Build the job's model as its training left it; without a training seed, as it would begin.

    Raises:
        CorruptFile: If what a fine-tune has trained cannot be read.
    """
    if job.merges:
        from qpruner import hf

        return hf.load(fetch(job.trained))
    model = build(job)
    if job.record.seed is not None:
        load_trained(model, job.trained)
    return model


def tune_rounding(job: FineTuneJob) -> TunedRecord:
    """Tune the rounding of the job's plan; the job has one that is tuned."""
    assert job.tuned is not None
    begin_job(job.threads)
    return job.tuned.tune(ProgressFile(job.progress).write)


def _train(
    job: FineTuneJob, model: PeftModel | PreTrainedModel, ownership: Ownership
) -> tuple[TrainingResult, list[str]]:
    from qpruner.training.finetune import Listener, Schedule, Share, finetune
    from qpruner.training.tracked_finetune import tracked

    seed = job.record.seed
    assert seed is not None
    settings = job.config.finetune
    checkpoints = job.checkpoints
    progress = ProgressFile(job.progress)
    listener = Listener(
        on_step=lambda step, total, loss: progress.write(step, total),
        before_save=ownership.check,
        on_save=lambda checkpoint: keep_checkpoint(checkpoint, checkpoints, ownership),
    )
    formats = {f"format/{group}": value for group, value in job.record.plan.items()}
    about = {"row": job.title, "training seed": seed, **formats}
    trackers = job.trackers if Share.own().rank == 0 else None
    with tracked(trackers, job.label, about) as logged:
        result = finetune(
            model,
            load_encoded(job.data / "train"),
            job.config.training,
            Schedule(settings.steps, settings.epochs),
            storage_at(checkpoints).staging,
            seed,
            int(_tokenizer(job).pad_token_id),
            latest_checkpoint(checkpoints),
            listener,
            [logged],
        )
    return result, logged.errors


def _remove_staging(job: FineTuneJob) -> None:
    """Remove the checkpoints of a finished fine-tune from this machine.

    They are here only if they were written to be uploaded.
    """
    staging = storage_at(job.checkpoints).staging
    if staging != job.checkpoints:
        shutil.rmtree(staging, ignore_errors=True)


def _scores(
    job: FineTuneJob,
    model: PeftModel | PreTrainedModel,
    progress: ProgressFile | None = None,
) -> dict[str, Any]:
    """Return the fields of the record that `job.scoring` asks for, and the bytes of the model."""
    from qpruner.data.losses import mean_loss
    from qpruner.quantization.assembly import measured_bytes
    from qpruner.training.evaluate import score_tasks

    asked = job.scoring
    tokenizer = _tokenizer(job)
    pad_id = int(tokenizer.pad_token_id)
    batch_size = job.config.evaluate.batch_size
    scores: dict[str, Any] = {
        "measured_bytes": measured_bytes(model),
        "scored": asked.digest,
        # An earlier scoring may have had a text, or other tasks.
        "text_loss": None,
        "tasks": (),
        "accuracy": None,
        "accuracy_stderr": None,
    }
    if asked.rows:
        rows = load_scored(job.data, asked.rows)
        losses = _recorded(mean_loss(model, rows, pad_id, batch_size))
        scores["losses"] = {**job.record.losses, asked.rows: losses}
    if asked.text:
        scores["text_loss"] = mean_loss(model, load_encoded(asked.text), pad_id, batch_size).mean
    if asked.tasks:
        tasks = score_tasks(
            model,
            tokenizer,
            asked.tasks,
            job.config.evaluate,
            asked.limit,
            asked.num_fewshot,
            skip=asked.skip,
            metric=asked.metric,
            on_progress=progress.write if progress else lambda done, total: None,
        )
        accuracy, stderr = over_tasks([of_task.correct for of_task in tasks])
        scores |= {"tasks": tasks, "accuracy": accuracy, "accuracy_stderr": stderr}
    return scores


def _worst_scores(job: FineTuneJob) -> dict[str, Any]:
    """Return the scores of a training that diverged.

    Its loss is the one at which a training is found to diverge, and no answer is right.
    """
    from qpruner.training.finetune import DIVERGED_BY

    name = job.scoring.rows
    assert name
    worst = math.log(len(_tokenizer(job))) + DIVERGED_BY
    by_row = (worst,) * len(load_scored(job.data, name))
    return {
        "scored": job.scoring.digest,
        "losses": {name: RowLosses(mean=worst, by_row=by_row)},
        "accuracy": 0.0 if job.scoring.tasks else None,
    }


class ProgressFile:
    """Writes `done total` to a file for the driver, at intervals and at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = float("-inf")
        with contextlib.suppress(OSError):  # a model without a fine-tune may have no folder yet
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, done: int, total: int) -> None:
        """Write the progress if all is done or an interval has passed."""
        if done == total or time.monotonic() - self._written >= progress_seconds(self._path):
            self._written = time.monotonic()
            write_progress(self._path, f"{done} {total}")


def _tokenizer(job: FineTuneJob) -> Any:
    return load_tokenizer(str(fetch(job.bank.checkpoint)))


def _recorded(loss: LossResult) -> RowLosses:
    return RowLosses(mean=loss.mean, by_row=tuple(round(value, 4) for value in loss.by_row))
