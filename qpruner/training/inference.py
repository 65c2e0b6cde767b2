"""Measure a model's memory while it generates, and its speed, in turns with other models: speeds
drift over minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qpruner.config.schema import RunConfig
from qpruner.data.encoding import load_encoded
from qpruner.models.memory import PeakMemory, begin_job, read_weights, release
from qpruner.quantization.assembly import measured_bytes
from qpruner.runs.records import Inference, InferenceSetting
from qpruner.training.checkpoints import load_adapter
from qpruner.training.table_rows import Candidate, ProgressFile, build
from qpruner.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 128, 16, 16
NUM_TURNS = 3  # number of timed generations per row of the final table


@dataclass(frozen=True)
class InferenceJob:
    """Table rows whose fine-tuned models one process times in turns; the file `progress` gets `done
    total` turns."""

    config: RunConfig
    candidates: tuple[Candidate, ...]
    data: Path  # the confirmation rows there give the prompt
    threads: int
    progress: Path


def measure_inference(job: InferenceJob) -> tuple[InferenceSetting, list[Inference]]:
    """Measure memory and speed of the model of each row in the final table."""
    begin_job(job.threads)
    ids = [token for row in load_encoded(job.data / "confirmation") for token in row["input_ids"]]
    prompt = (ids * -(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
    turns: list[list[tuple[float, float, int]]] = [[] for _ in job.candidates]
    progress, num_turns = ProgressFile(job.progress), NUM_TURNS * len(job.candidates)
    progress.write(0, num_turns)
    for turn in range(num_turns):
        position = turn % len(turns)
        release()  # the model of the turn before
        turns[position].append(take_turn(_fine_tuned(job.candidates[position]), prompt, NEW_TOKENS))
        progress.write(turn + 1, num_turns)
    setting = InferenceSetting(
        device=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else counted(job.threads, "CPU core"),
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        memory_counter=("" if torch.cuda.is_available() else "tensors of the model, and ")
        + PeakMemory().counter,
    )
    found = [
        Inference(
            memory_bytes=max(memory),
            prefill_tokens_per_second=prefill,
            decode_tokens_per_second=decode,
        )
        for prefill, decode, memory in (zip(*of_row, strict=True) for of_row in turns)
    ]
    return setting, found


def _fine_tuned(candidate: Candidate) -> Any:
    model = build(candidate)
    load_adapter(model, candidate.adapter)
    return model


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Records when transformers' `generate` starts and when it yields each new token."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(
            time.perf_counter()
        )  # the tokens are on the CPU, so the GPU has finished

    def end(self) -> None:
        pass


def _generate(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> tuple[float, float]:
    """Generate at least 2 tokens greedily; return tokens per second of prefill (until the first
    token) and decode."""
    clock = _Clock()
    length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    settings = GenerationConfig(**length, do_sample=False, pad_token_id=0)
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
    """Generate once; return tokens per second of prefill and of decode, and the memory in bytes.

    On a GPU this is CUDA's peak; on a CPU, packed tensors plus the rise of resident memory over the
    loaded model.
    """
    ids = torch.tensor([prompt], device=model.device)
    model.eval()
    release()
    read_weights(model)
    memory = PeakMemory()
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else measured_bytes(model)
    _generate(model, ids[:, :WARM_UP_TOKENS], 2)
    return *_generate(model, ids, num_tokens), held + memory.bytes()
