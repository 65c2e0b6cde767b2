"""Measure what a model costs to use: memory of a generation, and tokens a second of prefill and of decode.

Timings differ more over minutes than within one, so models that are compared are timed in turns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qpruner.models.memory import PeakMemory, read_weights, release
from qpruner.quantization.assembly import measured_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Turn:
    """One generation of one sequence: tokens a second, peak memory with the model's own, and what that counts."""

    prefill: float
    decode: float
    memory_bytes: int
    memory_counter: str


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Record when transformers' `generate` has read the prompt and when it has each new token."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter())  # the tokens are on the CPU, so the GPU has done its part

    def end(self) -> None:
        pass


def _generate(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> tuple[float, float]:
    """Generate 2 or more tokens greedily; return tokens a second of prefill, with the first one, and of decode."""
    clock = _Clock()
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        ),
        streamer=clock,
    )
    started, read, *_, written = clock.seconds
    return prompt.numel() / (read - started), (num_tokens - 1) / (written - read)


def take_turn(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> Turn:
    """Generate from one sequence, after a short generation that warms up.

    Memory is CUDA's peak on a GPU; on a CPU the packed tensors and the rise of resident memory above the loaded model.
    """
    ids = torch.tensor([prompt], device=model.device)
    model.eval()
    release()
    read_weights(model)
    memory = PeakMemory()
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else measured_bytes(model)
    _generate(model, ids[:, :WARM_UP_TOKENS], 2)
    prefill, decode = _generate(model, ids, num_tokens)
    counter = "tensors of the model, and " + memory.counter
    return Turn(prefill, decode, held + memory.bytes(), memory.counter if torch.cuda.is_available() else counter)
