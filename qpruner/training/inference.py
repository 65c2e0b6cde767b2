"""Measure a model's memory and speed while it generates.

Models take turns, because the speed of a machine drifts over minutes.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qpruner.data.encoding import load_encoded
from qpruner.models.memory import PeakMemory, begin_job, read_weights, release
from qpruner.quantization.assembly import measured_bytes
from qpruner.runs.records import Inference, InferenceSetting
from qpruner.training.jobs import FineTuneJob, ProgressFile, build_trained
from qpruner.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 128
NEW_TOKENS = 16
WARM_UP_TOKENS = 16
NUM_TURNS = 3  # number of timed generations per row of the final table


@dataclass(frozen=True)
class InferenceJob:
    """Fine-tuned models that one process times in turns."""

    models: tuple[FineTuneJob, ...]
    data: Path
    """The folder of encoded rows; the confirmation rows give the prompt."""
    threads: int
    progress: Path
    """The file that gets the number of turns that are done, and of all."""


def measure_inference(job: InferenceJob) -> tuple[InferenceSetting, list[Inference]]:
    """Measure memory and speed of each model.

    Returns:
        How it was measured, and the figures of the models in their order.
    """
    begin_job(job.threads)
    has_gpu = torch.cuda.is_available()
    prompt = prompt_of(job.data)
    turns: list[list[tuple[float, float, int]]] = [[] for _ in job.models]
    progress = ProgressFile(job.progress)
    num_turns = NUM_TURNS * len(job.models)
    progress.write(0, num_turns)
    for turn in range(num_turns):
        position = turn % len(turns)
        release()  # the model of the turn before
        turns[position].append(take_turn(build_trained(job.models[position]), prompt, NEW_TOKENS))
        progress.write(turn + 1, num_turns)

    counter = PeakMemory().counter
    setting = InferenceSetting(
        device=torch.cuda.get_device_name() if has_gpu else counted(job.threads, "CPU core"),
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        memory_counter=counter if has_gpu else f"tensors of the model, and {counter}",
    )
    figures = []
    for turns_of_row in turns:
        prefill, decode, memory = zip(*turns_of_row, strict=True)
        figures.append(
            Inference(
                memory_bytes=max(memory),
                prefill_tokens_per_second=prefill,
                decode_tokens_per_second=decode,
            )
        )
    return setting, figures


def prompt_of(data: Path) -> list[int]:
    """Return the tokens of a prompt: the first of the confirmation rows, again if they are few."""
    rows = load_encoded(data / "confirmation")
    tokens = itertools.chain.from_iterable(row["input_ids"] for row in rows)
    return list(itertools.islice(itertools.cycle(tokens), PROMPT_TOKENS))


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Records when transformers' `generate` starts and when it yields each new token."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        # The tokens are on the CPU, so the GPU has finished.
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> tuple[float, float]:
    """Generate at least 2 tokens greedily.

    Args:
        model: The model.
        prompt: Token ids int64 ``(1, positions)``.
        num_tokens: How many tokens are generated.

    Returns:
        Tokens per second of prefill, which lasts until the first token, and of decoding.
    """
    clock = _Clock()
    settings = GenerationConfig(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        streamer=clock,
    )
    started, read, *_, written = clock.seconds
    return prompt.numel() / (read - started), (num_tokens - 1) / (written - read)


def take_turn(
    model: PreTrainedModel, prompt: list[int], num_tokens: int
) -> tuple[float, float, int]:
    """Generate once, after a short warm-up.

    Returns:
        Tokens per second of prefill and of decoding, and the memory in bytes. On a GPU the memory
        is CUDA's peak. On a CPU it is that of the packed tensors plus the rise of resident memory
        over the loaded model.
    """
    ids = torch.tensor([prompt], device=model.device)
    model.eval()
    release()
    read_weights(model)
    memory = PeakMemory()
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else measured_bytes(model)
    _generate(model, ids[:, :WARM_UP_TOKENS], 2)
    return *_generate(model, ids, num_tokens), held + memory.bytes()
