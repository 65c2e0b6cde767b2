"""Shared by the parts of `gpu_7b.py`: shapes, settings, rows, paths of the work folder, a clock."""

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prune_7b import llama_7b
from transformers import AutoConfig, LlamaConfig

from qpruner.config.schema import RunConfig
from qpruner.data.encoding import IGNORED_LABEL
from qpruner.models.layout import group_linears
from qpruner.plans.plan import EMBEDDINGS, HEAD
from qpruner.quantization.bank import BankSource
from qpruner.quantization.formats import DENSE

PAD_ID = 0
SPREAD = 0.5
"""Standard deviation of the log of a row's tokens. With a mean of 110 the longest of four has
168 on average, as Alpaca's rows (165)."""
Figures = dict[str, Any]
Rows = list[dict[str, list[int]]]


def llama_tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=64,
    )


@dataclass(frozen=True)
class Setup:
    """Describe what is measured, and the files that one part leaves for the next.

    Attributes:
        shape: Name of the model's shape.
        work: The work folder.
        base: Makes the model's config.
        cut_blocks: First and last block that may be cut.
        tokens: Tokens of a row: mean, and at most.
        batch_size: Rows of an optimizer step.
        num_validation: Rows that score a trial.
    """

    shape: str
    work: Path
    base: Callable[[], LlamaConfig]
    cut_blocks: tuple[int, int]
    tokens: tuple[int, int]
    batch_size: int
    num_validation: int

    @property
    def pruned(self) -> Path:
        return self.work / "pruned"

    @property
    def bank(self) -> Path:
        return self.work / "bank"

    @property
    def source(self) -> BankSource:
        quantize = self.config.quantize
        config = self.config
        return BankSource(
            self.bank, self.pruned, quantize.group, config.model.dtype, config.lora, config.seed
        )

    @property
    def config(self) -> RunConfig:
        """LLM-Pruner's cut and fine-tune as the Llama-2-7B recipe has them, and a trial of 8 steps;
        nothing is read."""
        rows = [{"source": "none.jsonl", "format": "text"}]
        (first, last) = self.cut_blocks
        cut = {
            "rate": 0.2,
            "importance": "taylor",
            "selection": "per_layer",
            "compensation": "none",
        }
        return RunConfig.model_validate(
            {
                "output": str(self.work),
                "model": {"source": str(self.pruned)},
                "data": {
                    "train": rows,
                    "validation": rows,
                    "confirmation": rows,
                    "max_length": self.tokens[1],
                },
                "calibration": {
                    "packing": False,
                    "num_samples": 10,
                    "batch_size": 10,
                    "max_length": 64,
                },
                "prune": {**cut, "first_layer": first, "last_layer": last},
                "quantize": {
                    "group": "block",
                    "formats": ["nf4_double", "int8"],
                    "budget": {"fraction": 0.5},
                },
                "lora": {"rank": 8, "alpha": 16, "dropout": 0.05},
                "training": {
                    "batch_size": self.batch_size,
                    "micro_batch_size": 4,
                    "gradient_checkpointing": True,
                },
                "search": {"max_trials": 1, "steps": 8, "first_rung": 4},
                "finetune": {"steps": 4, "compare": False},
                "evaluate": {"tasks": ["none"]},
            }
        )

    @property
    def train_rows(self) -> Rows:
        """Of four optimizer steps."""
        return self._rows(4 * self.batch_size, seed=0)

    @property
    def validation_rows(self) -> Rows:
        return self._rows(self.num_validation, seed=1)

    @property
    def longest_rows(self) -> Rows:
        """Of one optimizer step, as long as rows may be."""
        return [self._row(self.tokens[1], random.Random(seed)) for seed in range(self.batch_size)]

    def _rows(self, count: int, seed: int) -> Rows:
        drawn = random.Random(seed)
        (mean, most) = self.tokens
        lengths = [
            drawn.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD) for _ in range(count)
        ]
        return [self._row(min(most, max(4, round(length))), drawn) for length in lengths]

    def _row(self, length: int, drawn: random.Random) -> dict[str, list[int]]:
        """Random tokens, the first half of them a prompt."""
        vocabulary = self.base().vocab_size
        ids = [drawn.randrange(3, vocabulary) for _ in range(length)]
        return {"input_ids": ids, "labels": [IGNORED_LABEL] * (length // 2) + ids[length // 2 :]}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        return group_linears(AutoConfig.from_pretrained(self.pruned), self.config.quantize.group)

    def plan(self, *formats: str) -> dict[str, str]:
        """The groups in these formats, over and over; embeddings and head are not packed."""
        packed = dict(zip(self.groups, itertools.cycle(formats), strict=False))
        return {EMBEDDINGS: DENSE} | packed | {HEAD: DENSE}


SHAPES = {
    "7b": partial(
        Setup,
        base=llama_7b,
        cut_blocks=(4, 29),
        tokens=(110, 256),
        batch_size=64,
        num_validation=256,
    ),
    "tiny": partial(
        Setup, base=llama_tiny, cut_blocks=(0, -1), tokens=(14, 32), batch_size=8, num_validation=8
    ),
}


class Laps:
    """Seconds of one step after the other, the GPU's queue included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = now()

    def end(self, name: str) -> None:
        ended = now()
        self.seconds[name] = ended - self._started
        self._started = ended


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
