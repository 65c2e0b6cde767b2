"""Fine-tune and evaluate the rows of the final table, each row in the same way.

Worker processes run these functions, one row at a time; several processes may share a fine-tune.
Ray is not used here.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import RunConfig
from qpruner.data.encoding import load_confirmation, load_encoded
from qpruner.data.measures import over_tasks
from qpruner.errors import TrainingDiverged
from qpruner.models.loading import load_tokenizer
from qpruner.models.memory import PeakMemory, begin_job
from qpruner.plans.plan import UNPRUNED
from qpruner.runs.records import FreshScore
from qpruner.runs.storage import fetch, progress_seconds, storage_at, write_progress
from qpruner.training.checkpoints import (
    Ownership,
    keep_checkpoint,
    latest_checkpoint,
    load_adapter,
    publish_adapter,
)
from qpruner.training.trackers import Trackers

if TYPE_CHECKING:
    from peft import PeftModel

    from qpruner.data.losses import LossResult, Rows
    from qpruner.quantization.bank import BankSource
    from qpruner.training.finetune import TrainingResult


@dataclass(frozen=True)
class Candidate:
    """A row of the final table: the model of a bank quantized by a plan.

    `folder` is for the fine-tune's files. `name` is used in records, `title` in the table; `origin`
    says where the plan comes from. `seed` sets data order and dropout of the fine-tune. A row
    without a seed is scored without a fine-tune, with its initial adapters.
    """

    name: str
    title: str
    bank: BankSource
    plan: Mapping[str, str]
    folder: Path
    seed: int | None
    origin: str = ""
    cut: str = UNPRUNED
    micro_batch_size: int | None = None  # if memory was too small for `training.micro_batch_size`

    @property
    def label(self) -> str:
        """The row's title and training seed."""
        return (
            f"{self.title} (no fine-tune)"
            if self.seed is None
            else f"{self.title}, training seed {self.seed}"
        )

    @property
    def adapter(self) -> Path:
        """Folder of the fine-tuned adapter, in peft's format."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folder of the fine-tune's checkpoints, removed once the fine-tune is recorded."""
        return self.folder / "checkpoints"

    @property
    def progress(self) -> Path:
        """File with `done total`, the progress of the row.

        It counts steps during the fine-tune, and lm-eval requests during the evaluation.
        """
        return self.folder / "progress"


@dataclass(frozen=True)
class CandidateJob:
    """A worker's job for one row.

    `text` is a folder with windows of held-out text, which `evaluate_candidate` scores. For
    `confirm_trial` the row is a finished trial, and the row's folder is the trial's last
    checkpoint.
    """

    config: RunConfig
    candidate: Candidate
    data: Path
    threads: int
    text: Path | None = None
    trackers: Trackers | None = None


def finetune_candidate(job: CandidateJob) -> tuple[dict[str, Any], list[str]]:
    """Fine-tune a candidate on all training rows, and save the adapter.

    The fine-tune begins from the initial adapters or the latest checkpoint. Return the measured
    fields of the candidate's record, and errors of experiment trackers. Peak memory is that of this
    process. If another process starts the same fine-tune, this process raises `TakenOver` before
    its next write.
    """
    from qpruner.data.losses import mean_loss
    from qpruner.quantization.assembly import cast_adapters, measured_bytes
    from qpruner.training.finetune import Share

    started = time.monotonic()
    begin_job(job.threads)
    config, candidate = job.config, job.candidate
    train = load_encoded(job.data / "train")
    pad_id = int(_tokenizer(candidate).pad_token_id)
    ownership = Ownership(candidate.folder / "owner.json")
    is_first = Share.own().rank == 0
    if is_first:
        ownership.take()
    memory = PeakMemory()
    model = build(candidate)
    result, tracker_errors = _train(job, model, train, pad_id, ownership)
    peak = memory.bytes()
    cast_adapters(model)
    confirmation = mean_loss(
        model, load_confirmation(job.data, "judge"), pad_id, config.evaluate.batch_size
    )
    digest = (
        publish_adapter(model, candidate.adapter, candidate.checkpoints, ownership)
        if is_first
        else ""
    )
    _remove_staging(candidate)
    measured = {
        "seconds": time.monotonic() - started,
        "steps": result.steps,
        "train_loss": result.train_loss,
        "confirmation_loss": confirmation.mean,
        "confirmation_losses": _rounded(confirmation),
        "measured_bytes": measured_bytes(model),
        "peak_memory_bytes": peak,
        "memory_counter": memory.counter,
        "adapter_sha256": digest,
    }
    return measured, tracker_errors


def _train(
    job: CandidateJob, model: PeftModel, rows: Rows, pad_id: int, ownership: Ownership
) -> tuple[TrainingResult, list[str]]:
    from qpruner.training.finetune import Listener, Schedule, Share, finetune
    from qpruner.training.tracked_finetune import tracked

    candidate, config, settings = job.candidate, job.config, job.config.finetune
    assert candidate.seed is not None
    checkpoints, progress = candidate.checkpoints, ProgressFile(candidate.progress)
    schedule = Schedule(settings.steps, settings.epochs)
    listener = Listener(
        on_step=lambda step, total, loss: progress.write(step, total),
        before_save=ownership.check,
        on_save=lambda checkpoint: keep_checkpoint(checkpoint, checkpoints, ownership),
    )
    formats = {f"format/{group}": value for group, value in candidate.plan.items()}
    about = {"row": candidate.title, "training seed": candidate.seed, **formats}
    work, start = storage_at(checkpoints).staging, latest_checkpoint(checkpoints)
    with tracked(job.trackers if Share.own().rank == 0 else None, candidate.label, about) as logged:
        result = finetune(
            model,
            rows,
            config.training,
            schedule,
            work,
            candidate.seed,
            pad_id,
            start,
            listener,
            [logged],
        )
    return result, logged.errors


def _remove_staging(candidate: Candidate) -> None:
    """Remove the checkpoints of a finished fine-tune from this machine.

    They are here only if they were written to be uploaded.
    """
    if (staging := storage_at(candidate.checkpoints).staging) != candidate.checkpoints:
        shutil.rmtree(staging, ignore_errors=True)


def evaluate_candidate(job: CandidateJob) -> tuple[dict[str, Any], float]:
    """Score a row on held-out tasks and text.

    Return `scores` and `text_loss` of the row's record, and the seconds that both took. Raises
    `CorruptFile` if a fine-tuned adapter cannot be read.
    """
    from qpruner.data.losses import mean_loss
    from qpruner.training.evaluate import score_tasks

    started = time.monotonic()
    begin_job(job.threads)
    settings, candidate = job.config.evaluate, job.candidate
    model = build(candidate)
    if candidate.seed is not None:
        load_adapter(model, candidate.adapter)
    tokenizer, loss = _tokenizer(candidate), None
    if job.text:
        loss = mean_loss(
            model, load_encoded(job.text), int(tokenizer.pad_token_id), settings.batch_size
        ).mean
    report = ProgressFile(candidate.progress).write
    few, limit = settings.num_fewshot, settings.limit
    scores = score_tasks(model, tokenizer, settings.tasks, settings, limit, few, on_progress=report)
    return {"scores": scores, "text_loss": loss}, time.monotonic() - started


def confirm_trial(job: CandidateJob) -> FreshScore:
    """Score a trial's last checkpoint on the confirmation rows that choose the winner.

    In a search by accuracy, also score it on `search.limit` questions of each task: those after the
    trials' questions.
    """
    begin_job(job.threads)
    model = build(job.candidate)
    load_adapter(model, job.candidate.folder)
    return _fresh_score(job, model)


def confirm_seed(job: CandidateJob) -> FreshScore:
    """Train a finalist as long as a trial, under the candidate's seed, and score it.

    It is scored as `confirm_trial` does. A training that diverges counts as a loss at which it is
    found to diverge, and no right answer.
    """
    from qpruner.quantization.assembly import cast_adapters
    from qpruner.training.finetune import DIVERGED_BY

    begin_job(job.threads)
    config, candidate = job.config, job.candidate
    size = candidate.micro_batch_size or config.training.micro_batch_size
    length = config.finetune.model_copy(update={"steps": config.search.steps, "epochs": None})
    training = config.training.model_copy(update={"micro_batch_size": size})
    job = replace(job, config=config.model_copy(update={"finetune": length, "training": training}))
    ownership = Ownership(candidate.folder / "owner.json")
    ownership.take()
    model, tokenizer = build(candidate), _tokenizer(candidate)
    try:
        _train(job, model, load_encoded(job.data / "train"), int(tokenizer.pad_token_id), ownership)
    except TrainingDiverged:
        _remove_staging(candidate)
        worst = math.log(len(tokenizer)) + DIVERGED_BY
        losses = (worst,) * len(load_confirmation(job.data, "choose"))
        accuracy = 0.0 if config.search.by_accuracy else None
        return FreshScore(loss=worst, losses=losses, accuracy=accuracy)
    _remove_staging(candidate)
    cast_adapters(model)
    return _fresh_score(job, model)


def _fresh_score(job: CandidateJob, model: PeftModel) -> FreshScore:
    from qpruner.data.losses import mean_loss
    from qpruner.training.evaluate import score_tasks

    search, settings, tokenizer = job.config.search, job.config.evaluate, _tokenizer(job.candidate)
    loss = mean_loss(
        model,
        load_confirmation(job.data, "choose"),
        int(tokenizer.pad_token_id),
        settings.batch_size,
    )
    score = FreshScore(loss=loss.mean, losses=_rounded(loss))
    if search.metric == "loss":
        return score
    limit, metric = search.limit, search.named_metric
    assert limit is not None
    scores = score_tasks(model, tokenizer, search.tasks, settings, limit, skip=limit, metric=metric)
    accuracy, stderr = over_tasks([each.correct for each in scores])
    return score.model_copy(update={"accuracy": accuracy, "accuracy_stderr": stderr})


def build(candidate: Candidate) -> PeftModel:
    """Build the row's model with its initial adapters."""
    from qpruner.quantization.assembly import plan_model

    return plan_model(candidate.bank, candidate.plan, candidate.bank.seed)


class ProgressFile:
    """Writes `done total` to a file for the driver, at intervals and at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._written = path, float("-inf")
        with contextlib.suppress(OSError):  # a row without a fine-tune may have no folder yet
            path.parent.mkdir(exist_ok=True)

    def write(self, done: int, total: int) -> None:
        """Write the progress if all is done or an interval has passed."""
        if done == total or time.monotonic() - self._written >= progress_seconds(self._path):
            self._written = time.monotonic()
            write_progress(self._path, f"{done} {total}")


def _tokenizer(candidate: Candidate) -> Any:
    return load_tokenizer(str(fetch(candidate.bank.checkpoint)))


def _rounded(loss: LossResult) -> tuple[float, ...]:
    return tuple(round(each, 4) for each in loss.by_row)
