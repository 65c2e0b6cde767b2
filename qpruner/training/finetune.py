"""Train adapters or scales with transformers' Trainer, for trials and the final fine-tune alike.

A checkpoint holds what is trained, optimizer, scheduler and random state, so a resumed training
gives the same result as an uninterrupted one. If torch has a process group, its processes share
every batch and sum their gradients, so that losses equal those of one process. The first process
saves and calls the listener.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from qpruner.config.schema import TrainingConfig
from qpruner.data.encoding import IGNORED_LABEL, collate, row_lengths
from qpruner.data.losses import Rows, labelled_only, predicted_labels
from qpruner.errors import TrainingDiverged
from qpruner.models.families import family_of
from qpruner.quantization.scales import load_changes
from qpruner.runs.storage import retry_storage
from qpruner.training.checkpoints import SECONDS, TRAINED_WEIGHTS, SaveClock, save_trained

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

DIVERGED_BY = 1.0
"""How far above a blind guess the loss of a diverged training is, in nats per token."""

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}
"""transformers' name of each `training.optimizer`."""

MOST_JOINED = 1024
"""Most tokens of a micro-batch whose rows are joined.

With more tokens, attention over all rows, which masks the other rows, takes longer than padding.
"""


@dataclass(frozen=True)
class Schedule:
    """How long to train, and when to save; the last step is always saved."""

    steps: int | None
    """The number of optimizer steps; None trains for `epochs`."""
    epochs: float | None = None
    rungs: Sequence[int] = ()
    """The steps after which the training is saved."""
    save_seconds: float = SECONDS
    """Seconds after which it is saved too (see `SaveClock`)."""


@dataclass(frozen=True)
class Listener:
    """Callbacks of a training, whose errors end it.

    All processes call `on_save`; the first process alone calls the others.
    """

    on_rung: Callable[[int, Path, float], None] = lambda step, checkpoint, loss: None
    """Gets the step, the folder of its checkpoint and the training loss at a rung."""
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None
    """Gets the step, the total number of steps and the training loss after each step."""
    before_save: Callable[[], None] = lambda: None
    on_save: Callable[[Path], None] = lambda checkpoint: None
    """Gets the folder of every checkpoint, before `on_rung`."""


@dataclass(frozen=True)
class Share:
    """The place of this process among those that train together."""

    rank: int
    """The number of this process, from 0; rank 0 saves."""
    processes: int

    @classmethod
    def own(cls) -> Share:
        """Read both from torch's process group; without one, this process is the only one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls(0, 1)
        return cls(distributed.get_rank(), distributed.get_world_size())


class TrainingResult(NamedTuple):
    """What a training reached."""

    steps: int
    """The number of optimizer steps."""
    train_loss: float
    """The training loss of the last step, in nats per token."""


def finetune(
    model: PeftModel | PreTrainedModel,
    rows: Rows,
    settings: TrainingConfig,
    schedule: Schedule,
    output: Path,
    seed: int,
    pad_id: int,
    start: Path | None = None,
    listener: Listener | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train the adapters or the scales of a model (see `plan_model`) in place.

    Args:
        model: The model.
        rows: Encoded rows, the same in all processes.
        settings: Batch size, counted over all processes, learning rate and so on.
        schedule: How long to train, and when to save.
        output: The folder that gets the checkpoints.
        seed: Sets the order of the data and the dropout.
        pad_id: The token id that fills up short rows.
        start: A checkpoint of the same training to resume from.
        listener: Is told of steps, rungs and saves.
        callbacks: Further callbacks of transformers.

    Raises:
        TrainingDiverged: A step's loss or gradient is NaN or infinite, or its loss is more than
            `DIVERGED_BY` above both the first step's loss and the loss of a blind guess,
            ln(vocabulary size).
    """
    share = Share.own()
    batches = _Batches(row_lengths(rows), settings, seed, share)
    listener = listener or Listener()
    joins = not (torch.cuda.is_available() or family_of(model.config).has_learned_positions)
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    callback = _Callback(
        rungs=schedule.rungs,
        listener=listener,
        blind_loss=math.log(vocabulary),
        batches=batches,
        clock=SaveClock(schedule.save_seconds),
    )
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    blank_row = {"input_ids": [pad_id], "labels": [IGNORED_LABEL]}
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, schedule, output, seed, share),
        train_dataset=ConcatDataset([rows, [blank_row]]),  # type: ignore[list-item]
        data_collator=lambda batch: _collate(batch, pad_id, joins),
        callbacks=[callback, *callbacks],
    )
    trainer.batches = batches
    trainer.before_save = listener.before_save
    # It would print every logged loss; the stages emit events of their own.
    trainer.remove_callback(PrinterCallback)

    if share.processes > 1:
        start = _shared(model, start)
    if share.rank:
        # Trainer seeds all processes alike; every rank of every seed needs its own dropout.
        torch.manual_seed(int(np.random.SeedSequence([seed, share.rank]).generate_state(1)[0]))
    state = TrainerState.load_from_json(str(start / "trainer_state.json")) if start else None
    if state and state.global_step == state.max_steps:  # Trainer would train one more step (5.24)
        trainer._load_from_checkpoint(str(start))
        return TrainingResult(state.global_step, _losses(state)[-1])
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    return TrainingResult(int(trainer.state.global_step), callback.train_loss)


def step_losses(checkpoint: Path) -> list[float]:
    """Return the losses of all steps up to a checkpoint, including those before the last resume."""
    return _losses(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")))


def _losses(state: TrainerState) -> list[float]:
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


def _shared(model: PeftModel | PreTrainedModel, start: Path | None) -> Path | None:
    """Let DistributedDataParallel share what is trained: each process has read the rest itself.

    Returns:
        The first process's `start`, in every process. Machines may see different latest checkpoints
        in a network folder.
    """
    ignored = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, ignored
    )
    agreed: list[str | None] = [str(start) if start else None]
    distributed.broadcast_object_list(agreed, src=0)
    return Path(agreed[0]) if agreed[0] else None


class _Batches(Sampler[list[int]]):
    """Samples the micro-batches of one process in an epoch, as row numbers.

    An optimizer batch is the next `batch_size` rows of the epoch's random order, for any number of
    processes. Its rows are sorted by length, longest first, and dealt to the processes in
    micro-batches; this keeps padding short. If no row is left for a process, it gets the blank row,
    which has no labels and comes after all others. Accelerate (1.15) would repeat rows instead, and
    would resume every epoch in the first epoch's order.
    """

    def __init__(
        self, lengths: Sequence[int], settings: TrainingConfig, seed: int, share: Share
    ) -> None:
        self._lengths = lengths
        self._seed = seed
        self._share = share
        self._batch_size = settings.batch_size
        self._size = settings.micro_batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self._lengths) // (self._size * self._share.processes))

    def __iter__(self) -> Iterator[list[int]]:
        # Both numbers are seeds: with their sum, a seed's second epoch would have the order of the
        # next seed's first.
        generator = np.random.default_rng([self._seed, self.epoch])
        order = generator.permutation(len(self._lengths)).tolist()
        blank_row = len(order)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            batch.sort(key=self._lengths.__getitem__, reverse=True)
            for turn in range(0, len(batch), self._size * self._share.processes):
                begin = turn + self._share.rank * self._size
                yield batch[begin : begin + self._size] or [blank_row]


def _collate(rows: Rows, pad_id: int, joins: bool = True) -> dict[str, Any]:
    """Make the tensors of a micro-batch.

    With `joins`, rows are joined to one without padding, which saves a CPU a fifth of a step; their
    positions tell transformers where rows begin. Otherwise, and beyond `MOST_JOINED` tokens, rows
    are padded.

    Returns:
        Tensors int64 ``(batch, positions)``; joined rows have a batch of 1.
    """
    lengths = row_lengths(rows)
    if not joins or sum(lengths) > MOST_JOINED:
        return collate(rows, pad_id)
    ids: list[int] = []
    labels: list[int] = []
    for row in rows:
        ids += row["input_ids"]
        labels += (IGNORED_LABEL, *row["labels"][1:])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": positions[None],
        "labels": torch.tensor([labels]),
    }


class _Trainer(Trainer):  # type: ignore[misc]
    """Trains on `_Batches`, computes logits at labelled tokens only, and retries saves."""

    batches: _Batches
    before_save: Callable[[], None]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any
    ) -> Any:
        with labelled_only(self.model, inputs["labels"]):
            shifted = {"shift_labels": predicted_labels(inputs["labels"])}
            return super().compute_loss(model, inputs | shifted, *arguments, **named)

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        share = Share.own()
        if share.rank == 0:
            self.before_save()
        if share.processes > 1:
            # if `before_save` stops the first process, the others write nothing either
            distributed.barrier()
        retry_storage(
            lambda: super(_Trainer, self)._save_checkpoint(*arguments, **named),
            Path(self.args.output_dir),
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        save_trained(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        changes = Path(resume_from_checkpoint) / TRAINED_WEIGHTS["scales"]
        if changes.exists():
            load_changes(self.model, changes)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def store_flos(self) -> None:
        """Do not count operations.

        The count waits for all processes, so a process that repeats a save would hang.
        """

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )


def _arguments(
    settings: TrainingConfig, schedule: Schedule, output: Path, seed: int, share: Share
) -> TrainingArguments:
    has_gpu = torch.cuda.is_available()
    rows_at_once = settings.micro_batch_size * share.processes
    # The length that is not set stays at transformers' default.
    length: dict[str, Any] = {"max_steps": schedule.steps}
    if schedule.steps is None:
        length = {"num_train_epochs": schedule.epochs}
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // rows_at_once,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,  # a share below 1 since transformers 5
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim=OPTIMIZERS[settings.optimizer],
        seed=seed,
        data_seed=seed,
        use_cache=False,  # with a cache joined rows would see each other
        use_cpu=not has_gpu,
        bf16=has_gpu and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=has_gpu,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        save_strategy="no",  # the callback says when
        save_total_limit=2,
        disable_tqdm=True,
        **length,
    )


@dataclass(eq=False)
class _Callback(TrainerCallback):  # type: ignore[misc]
    """Saves at rungs, by time and at the end, calls the listener and stops a diverging training.

    Loss and gradient norm are over all processes, so all processes stop at the same step. The first
    process has the clock for all.
    """

    rungs: Sequence[int]
    listener: Listener
    blind_loss: float
    batches: _Batches
    clock: SaveClock
    train_loss: float = math.nan
    stepped: float = 0.0  # when the last step ended; saving begins then

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepped = time.monotonic()
        is_due = [self.clock.is_due()]
        if Share.own().processes > 1:
            distributed.broadcast_object_list(is_due, src=0)
        control.should_save = is_due[0] or state.global_step in (*self.rungs, state.max_steps)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self.train_loss = float(logs["loss"])
        norm = float(logs.get("grad_norm", 0.0))
        if not math.isfinite(self.train_loss) or not math.isfinite(norm):
            raise TrainingDiverged(
                f"the training loss is {self.train_loss} and the gradient norm {norm} at step "
                f"{state.global_step}"
            )
        first = next(entry["loss"] for entry in state.log_history if "loss" in entry)
        tolerable = max(self.blind_loss, float(first))
        if self.train_loss > tolerable + DIVERGED_BY:
            raise TrainingDiverged(
                f"the training loss is {self.train_loss:.4g} at step {state.global_step}, "
                f"far above {tolerable:.4g}, the larger of the first step's loss and a blind "
                "guess's loss"
            )
        if state.is_world_process_zero:
            self.listener.on_step(state.global_step, state.max_steps, self.train_loss)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.listener.on_save(checkpoint)
        self.clock.saved(self.stepped)
        if state.global_step in self.rungs and state.is_world_process_zero:
            self.listener.on_rung(state.global_step, checkpoint, self.train_loss)
