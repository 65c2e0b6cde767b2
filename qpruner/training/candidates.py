"""The rows of the final table: each gets the same fine-tune and the same evaluation.

The functions here are what a worker process runs for one row, alone or, a fine-tune, in a group; they know nothing of
Ray.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile, TakenOver
from qpruner.runs.records import FinalistScore, Inference, InferenceSetting, TaskScore
from qpruner.runs.storage import (
    FILES,
    FileList,
    fetch,
    file_digest,
    folder_digests,
    list_path,
    progress_seconds,
    publish_folder,
    published_folders,
    put_folder,
    read_existing,
    remove,
    retry_storage,
    share_files,
    staging_path,
    storage_at,
    verify_folder,
    write_json,
    write_progress,
    write_text,
    writing_folder,
)
from qpruner.training.trackers import Trackers
from qpruner.wording import counted

if TYPE_CHECKING:
    from peft import PeftModel

    from qpruner.data.losses import LossResult

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Candidate:
    """One row: a plan on a checkpoint.

    Attributes:
        name: As the records have it.
        title: As people read it.
        checkpoint: Folder (or hub id) of the dense model.
        bank: Folder of the bank.
        plan: Bits by group; all 16 for the unquantized rows.
        folder: Where its adapter and checkpoints go.
        seed: Seeds data order and dropout of its fine-tune; None for a row that is scored without one,
            quantized layers with their adapter start.
    """

    name: str
    title: str
    checkpoint: Path
    bank: Path
    plan: Mapping[str, int]
    folder: Path
    seed: int | None

    @property
    def label(self) -> str:
        """Its title, with what tells it from others of that title."""
        return f"{self.title} (no fine-tune)" if self.seed is None else f"{self.title}, training seed {self.seed}"

    @property
    def adapter(self) -> Path:
        """The fine-tuned adapter, in peft's format."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What its fine-tune can go on from, until that is recorded."""
        return self.folder / "checkpoints"

    @property
    def owner(self) -> Path:
        """Which process its fine-tune is."""
        return self.folder / "owner.json"

    @property
    def progress(self) -> Path:
        """`step total` of a fine-tune under way."""
        return self.folder / "progress"

    @property
    def scoring_progress(self) -> Path:
        """`done total` of its answers to the held-out tasks."""
        return self.folder / "scoring"


@dataclass(frozen=True)
class CandidateJob:
    """A row and what a worker needs for it."""

    config: RunConfig
    candidate: Candidate
    data: Path
    threads: int
    text: Path | None = None
    """Held-out text for `evaluate_candidate`, in windows."""
    trackers: Trackers | None = None
    """Told of `finetune_candidate`."""


@dataclass(frozen=True)
class FinetuneOutcome:
    """What a fine-tune ended with; bytes are those of one process, `untold` is why trackers did not hear all of it."""

    seconds: float
    steps: int
    train_loss: float
    validation_loss: float
    confirmation_loss: float
    confirmation_losses: tuple[float, ...]
    measured_bytes: int
    peak_memory_bytes: int
    memory_counter: str
    adapter_sha256: str
    untold: tuple[str, ...] = ()


def finetune_candidate(job: CandidateJob) -> FinetuneOutcome:
    """Fine-tune a row from its LoftQ start on all training rows and save the adapter; goes on from a checkpoint.

    Checkpoints stay, to be removed by who records the outcome.

    Raises:
        TakenOver: If another process has begun the same since, before anything more is written.
    """
    # Imported before memory is measured: the rise should be the model's, not the libraries'.
    import peft  # noqa: F401

    from qpruner.data.encoding import load_confirmation, load_encoded
    from qpruner.data.losses import mean_loss
    from qpruner.models.loading import load_tokenizer
    from qpruner.models.memory import PeakMemory
    from qpruner.quantization.assembly import measured_bytes
    from qpruner.training.finetune import Listener, Schedule, Share, finetune
    from qpruner.training.tracked_finetune import tracked

    started = time.monotonic()
    _start(job.threads)
    config, candidate = job.config, job.candidate
    assert candidate.seed is not None
    train, validation = (load_encoded(job.data / name) for name in ("train", "validation"))
    fresh = load_confirmation(job.data, "judge")
    pad_id = int(load_tokenizer(str(fetch(candidate.checkpoint))).pad_token_id)
    is_first = Share.own().rank == 0
    claim = _Claim(candidate.owner)
    if is_first:
        claim.make()
    memory = PeakMemory()
    model = build(config, candidate)
    signs = _Signs(candidate.progress)
    work = candidate.checkpoints
    trackers = job.trackers if is_first else None
    bits = {f"bits/{group}": value for group, value in candidate.plan.items()}
    about = {"row": candidate.title, "training seed": candidate.seed, **bits}
    with tracked(trackers, candidate.folder.name, candidate.label, about) as told_trackers:
        result = finetune(
            model,
            train,
            config.training,
            Schedule(config.finetune.steps, config.finetune.epochs, save_steps=config.finetune.save_steps),
            staging_path(work),
            candidate.seed,
            pad_id,
            start=latest_checkpoint(work),
            listener=Listener(
                on_step=lambda step, total, loss: signs.tell(step, total),
                before_save=claim.check,
                on_save=lambda checkpoint: _keep(checkpoint, work, claim),
            ),
            callbacks=[told_trackers],
        )
    peak = memory.bytes()
    loss = mean_loss(model, validation, pad_id, config.evaluate.batch_size).mean
    fresh_loss = mean_loss(model, fresh, pad_id, config.evaluate.batch_size)
    digest = _publish(model, candidate, claim) if is_first else ""
    storage_at(work).forget_staging()
    size = measured_bytes(model)
    seconds = time.monotonic() - started
    return FinetuneOutcome(
        seconds=seconds,
        steps=result.steps,
        train_loss=result.train_loss,
        validation_loss=loss,
        confirmation_loss=fresh_loss.mean,
        confirmation_losses=_rounded(fresh_loss),
        measured_bytes=size,
        peak_memory_bytes=peak,
        memory_counter=memory.counter,
        adapter_sha256=digest,
        untold=tuple(told_trackers.troubles),
    )


@dataclass(frozen=True)
class Evaluation:
    """A row's scores on the held-out tasks, its loss on the held-out text, if there is one, in nats per token, and the
    seconds that this took."""

    scores: tuple[TaskScore, ...]
    text_loss: float | None
    seconds: float


def evaluate_candidate(job: CandidateJob) -> Evaluation:
    """Score a row on what is held out.

    Raises:
        CorruptFile: If the row was fine-tuned and its adapter cannot be read.
    """
    from qpruner.data.encoding import load_encoded
    from qpruner.data.losses import mean_loss
    from qpruner.models.loading import load_tokenizer
    from qpruner.training.evaluate import score_tasks

    started = time.monotonic()
    _start(job.threads)
    settings = job.config.evaluate
    model = build(job.config, job.candidate)
    if job.candidate.seed is not None:  # else what a fine-tune begins with: unquantized layers start at zero
        load_adapter(model, job.candidate.adapter)
    tokenizer = load_tokenizer(str(fetch(job.candidate.checkpoint)))
    loss = None
    if job.text:
        loss = mean_loss(model, load_encoded(job.text), int(tokenizer.pad_token_id), settings.batch_size).mean
    scores = score_tasks(
        model,  # type: ignore[arg-type]
        tokenizer,
        settings.tasks,
        settings.include_path,
        settings.limit,
        settings.batch_size,
        settings.num_fewshot,
        told=_Signs(job.candidate.scoring_progress).tell,
    )
    return Evaluation(scores, loss, time.monotonic() - started)


PROMPT_TOKENS, NEW_TOKENS, TURNS = 128, 16, 3


@dataclass(frozen=True)
class InferenceJob:
    """Fine-tuned rows that take turns in one process.

    Attributes:
        config: The run's configuration.
        candidates: Rows of different models.
        data: Folder of the encoded rows; the prompt is the confirmation rows' beginning.
        threads: Cores to use on a CPU.
        progress: File for `done total` of the turns.
    """

    config: RunConfig
    candidates: tuple[Candidate, ...]
    data: Path
    threads: int
    progress: Path


def measure_inference(job: InferenceJob) -> tuple[InferenceSetting, list[Inference]]:
    """What each row's model takes to use. Rows of one checkpoint should follow one another: only their groups are
    exchanged."""
    import torch

    from qpruner.data.encoding import load_encoded
    from qpruner.training.inference import Turn, take_turn

    _start(job.threads)
    ids = [token for row in load_encoded(job.data / "confirmation") for token in row["input_ids"]]
    prompt = (ids * -(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
    turns: list[list[Turn]] = [[] for _ in job.candidates]
    signs, num_turns = _Signs(job.progress), TURNS * len(job.candidates)
    signs.tell(0, num_turns)
    for turn in range(num_turns):
        candidate, seen = job.candidates[turn % len(turns)], turns[turn % len(turns)]
        model = build(job.config, candidate)
        load_adapter(model, candidate.adapter)
        seen.append(take_turn(model, prompt, NEW_TOKENS))  # type: ignore[arg-type]
        signs.tell(turn + 1, num_turns)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else counted(job.threads, "CPU core")
    setting = InferenceSetting(
        device=device,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        memory_counter=turns[0][0].memory_counter,
    )
    return setting, [
        Inference(
            memory_bytes=max(turn.memory_bytes for turn in seen),
            prefill_tokens_per_second=tuple(turn.speed.prefill for turn in seen),
            decode_tokens_per_second=tuple(turn.speed.decode for turn in seen),
        )
        for seen in turns
    ]


@dataclass(frozen=True)
class ConfirmationJob:
    """A finished trial to be scored on the confirmation rows that choose."""

    config: RunConfig
    candidate: Candidate
    checkpoint: Path
    data: Path
    threads: int


def confirm_trial(job: ConfirmationJob) -> FinalistScore:
    """Score a trial's last rung on what no trial was scored on: the confirmation rows that choose and, where accuracy
    is searched, as many questions again of every task, those that come after the trials'."""
    from qpruner.data.encoding import load_confirmation
    from qpruner.data.losses import mean_loss
    from qpruner.models.loading import load_tokenizer
    from qpruner.training.evaluate import mean_accuracy, score_tasks

    _start(job.threads)
    model = build(job.config, job.candidate)
    load_adapter(model, job.checkpoint)
    tokenizer = load_tokenizer(str(fetch(job.candidate.checkpoint)))
    search, settings = job.config.search, job.config.evaluate
    rows = load_confirmation(job.data, "choose")
    loss = mean_loss(model, rows, int(tokenizer.pad_token_id), settings.batch_size)
    score = FinalistScore(loss=loss.mean, stderr=loss.stderr, losses=_rounded(loss))
    if search.metric == "loss":
        return score
    assert search.limit is not None
    scores = score_tasks(
        model,  # type: ignore[arg-type]
        tokenizer,
        search.tasks,
        settings.include_path,
        search.limit,
        settings.batch_size,
        skip=search.limit,
        metric=search.named_metric,
    )
    accuracy, stderr = mean_accuracy(scores)
    return score.model_copy(update={"accuracy": accuracy, "accuracy_stderr": stderr})


def _rounded(loss: LossResult) -> tuple[float, ...]:
    """What rows say of a mean, in as many digits as a record keeps."""
    return tuple(round(each, 4) for each in loss.by_row)


def build(config: RunConfig, candidate: Candidate) -> PeftModel:
    """The row's model with its adapter start."""
    from qpruner.quantization.assembly import plan_assembler

    quantize = config.quantize
    checkpoint, dtype = fetch(candidate.checkpoint), config.model.dtype
    bench = plan_assembler(checkpoint, candidate.bank, quantize.group, dtype, quantize.double_quant, config.lora)
    return bench.model(candidate.plan, config.seed)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put saved adapter weights into a model that already has adapters.

    Raises:
        CorruptFile: If the file is missing or cut short.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = fetch(folder) / ADAPTER_WEIGHTS
    try:
        state: dict[str, Any] = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CorruptFile(f"adapter {path} cannot be read: {error}", path) from error
    set_peft_model_state_dict(model, state)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of an interrupted fine-tune, which has its state and a random state; on this machine,
    where it was in an object store."""
    found = [path for path in published_folders(folder) if path.name.startswith("checkpoint-")]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            verify_folder(path)
            checkpoint = fetch(path)
        except CorruptFile:
            continue
        if _has_state(checkpoint) and any(checkpoint.glob("rng_state*.pth")):
            return checkpoint
    return None


def _has_state(checkpoint: Path) -> bool:
    """Whether transformers came to the end of its last file, which it writes in place (5.24)."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True


def is_damaged(checkpoint: Path) -> bool:
    """Whether a fine-tune's checkpoint is not as it was saved; one in an object store is compared there.

    One whose process was killed before it wrote down what it had saved is none.
    """
    try:
        verify_folder(checkpoint)
    except CorruptFile:
        return True
    return False


def _digests(checkpoint: Path) -> dict[str, str]:
    """Of what a fine-tune goes on with; random states are each worker's own, and may come after the first's list."""
    return {name: digest for name, digest in folder_digests(checkpoint).items() if not name.startswith("rng_state")}


class _Owner(BaseModel):
    """Of all processes that worked on a fine-tune the latest, of a group's its first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    worker: str


class _Claim:
    """One process's on a fine-tune: if it is taken for dead and is not, it must write nothing more.

    Args:
        path: File that says whose the fine-tune is.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.worker = path, uuid.uuid4().hex

    def make(self) -> None:
        """Take the fine-tune over from whoever had it."""
        write_json(self._path, _Owner(worker=self.worker))

    def check(self) -> None:
        """Raises `TakenOver` if it is another's by now."""
        if read_existing(self._path, _Owner).worker != self.worker:
            raise TakenOver


def _publish(model: PeftModel, candidate: Candidate, claim: _Claim) -> str:
    """Put the adapter where it belongs, from a place of this process's own; returns the digest of its weights."""
    aside = staging_path(candidate.checkpoints / f"adapter-{claim.worker}")
    with writing_folder(aside):
        retry_storage(lambda: model.save_pretrained(aside), aside)
    digest = file_digest(aside / ADAPTER_WEIGHTS)
    claim.check()
    publish_folder(aside, candidate.adapter)
    return digest


def _keep(checkpoint: Path, work: Path, claim: _Claim) -> None:
    """Leave a fine-tune's checkpoint where the next process looks for one, with the sha256 of its files, in place of
    the one before it.

    The random states of workers on other machines than the first one's stay there: where such a fine-tune is
    interrupted, their dropout begins anew.
    """
    from torch import distributed

    from qpruner.training.finetune import Share

    share = Share.own()
    if checkpoint.parent == work:  # it lies there, and the one before it no longer does
        if share.rank == 0:
            claim.check()  # saving took its time
            for old in set(work.glob(f"*{FILES}")) - {list_path(checkpoint)}:
                old.unlink()
            share_files(checkpoint)
            write_text(list_path(checkpoint), FileList(sha256=_digests(checkpoint)).model_dump_json())
        return
    if share.processes > 1:
        distributed.barrier()  # each has left its random state
    if share.rank > 0:
        return
    put_folder(checkpoint, work / checkpoint.name)
    claim.check()  # sending took its time
    for old in published_folders(work):
        if old.name != checkpoint.name:
            remove(old)


class _Signs:
    """Tells the driver of progress, now and then and at the end.

    Args:
        path: The file that holds `done total`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._told = path, float("-inf")
        with contextlib.suppress(OSError):  # a row that is not fine-tuned has no folder before its scores
            path.parent.mkdir(exist_ok=True)

    def tell(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._told >= progress_seconds(self._path):
            self._told = time.monotonic()
            write_progress(self._path, f"{done} {total}")


def _start(threads: int) -> None:
    """Begin a job in a worker that may have done others: give back their memory, take no more cores than reserved."""
    import torch

    from qpruner.models.memory import release

    release()
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
