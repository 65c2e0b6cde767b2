"""Parts of `gpu_7b.py`: speed and memory of a fine-tune beside Trainer with peft's QLoRA, and
beside LLM-Pruner's."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from gpu_setup import PAD_ID, Figures, Rows, Setup, now
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

import qpruner.hf  # noqa: F401  (plain transformers then loads blocks of different widths)
from qpruner.data.encoding import collate
from qpruner.models.memory import PeakMemory, release
from qpruner.quantization.assembly import plan_model
from qpruner.runs.storage import working_folder
from qpruner.training.finetune import Schedule, finetune

TURNS = 3
TURNS_SECONDS = 300.0
"""Timed turns of the two fine-tunes, at most, and seconds after which none begins."""


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the begin of a training to the end of its last step."""

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self.started = now()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.seconds = now() - self.started


def our_model(setup: Setup, *formats: str) -> Any:
    """The pruned model as a trial gets it."""
    return plan_model(setup.source, setup.plan(*formats), setup.config.seed)


def train_ours(setup: Setup, model: Any, rows: Rows) -> float:
    """An epoch of `qpruner.training.finetune`; returns seconds."""
    clock = Clock()
    config = setup.config
    schedule = Schedule(steps=len(rows) // setup.batch_size)
    with working_folder("qpruner-gpu-") as folder:
        finetune(
            model, rows, config.training, schedule, folder, config.seed, PAD_ID, callbacks=[clock]
        )
    return clock.seconds


def plain_model(setup: Setup, bits: int, checkpointing: bool = True) -> Any:
    """Make the pruned model by transformers and peft alone.

    At 4 bits it is trained by QLoRA, at 16 bits by LoRA on bf16 weights.
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": nf4} if bits == 4 else {}
    # A bare "cuda" is another device to Trainer than its own.
    place = {"": 0 if torch.cuda.is_available() else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        setup.pruned, dtype=torch.bfloat16, device_map=place, **options
    )
    model.config.use_cache = False
    if bits == 4:
        model = peft.prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False})
    elif checkpointing:
        model.enable_input_require_grads()
    lora, targets = setup.config.lora, "all-linear"  # but the head
    adapters = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, adapters)


def train_plainly(model: Any, rows: Rows, setup: Setup, checkpointing: bool = True) -> float:
    """An epoch of transformers' Trainer with the same settings; returns seconds."""
    clock = Clock()
    settings = setup.config.training
    has_gpu = torch.cuda.is_available()
    with working_folder("qpruner-gpu-") as folder:
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
            max_steps=len(rows) // settings.batch_size,
            learning_rate=settings.learning_rate,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            optim="adamw_torch",
            bf16=has_gpu,
            use_cpu=not has_gpu,
            dataloader_pin_memory=has_gpu,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        collator = partial(collate, pad_id=PAD_ID)
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


def throughput(setup: Setup) -> Figures:
    """Non-padding tokens a second of our fine-tune and of Trainer with peft's QLoRA, both at 4
    bits."""
    rows = setup.train_rows
    ours = our_model(setup, "nf4_double")
    plain = plain_model(setup, 4)
    turns: list[tuple[float, float]] = []
    started = time.monotonic()
    while len(turns) < 2 or (len(turns) <= TURNS and time.monotonic() - started < TURNS_SECONDS):
        turns.append((train_ours(setup, ours, rows), train_plainly(plain, rows, setup)))
    timed, tokens = turns[1:], sum(len(row["input_ids"]) for row in rows)  # the first turn warms up
    mine, theirs = (statistics.median(seconds) for seconds in zip(*timed, strict=True))
    return {
        "qpruner_tokens_a_second": tokens / mine,
        "plain_tokens_a_second": tokens / theirs,
        "times_as_fast": statistics.median(their / my for my, their in timed),
        "turns": timed,
    }


def peaks(setup: Setup) -> Figures:
    """Peak memory of a step on the longest rows, weights included; null for what the GPU has too
    little memory for."""
    rows = setup.longest_rows
    arms: dict[str, Callable[[], float]] = {
        "qpruner_4_and_8_bits": lambda: train_ours(
            setup, our_model(setup, "nf4_double", "int8"), rows
        ),
        "plain_qlora": lambda: train_plainly(plain_model(setup, 4), rows, setup),
        "bf16_lora": lambda: train_plainly(plain_model(setup, 16), rows, setup),
        # As its post_training.py: weights in half precision, no checkpointing.
        "llm_pruner": lambda: train_plainly(plain_model(setup, 16, False), rows, setup, False),
    }
    found: Figures = {}
    for name, arm in arms.items():
        release()
        peak = PeakMemory()
        try:
            arm()
            found[f"{name}_bytes"] = peak.bytes()
        except torch.OutOfMemoryError:
            found[f"{name}_bytes"] = None
    return found
