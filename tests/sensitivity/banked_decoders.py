"""Make tiny random decoders with a real bank, and samples for scoring their groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mixed_models import bank_source
from tiny_decoders import PAD, rows_of, tiny

from qpruner.config.schema import BudgetConfig, LoraConfig, QuantizeConfig
from qpruner.data.calibration import Samples
from qpruner.models.layout import layout_of
from qpruner.quantization.bank import Starts
from qpruner.sensitivity.methods import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEVELS = ("nf4", "int8", "bf16")
LORA = LoraConfig(rank=2, alpha=6)
BUDGET = BudgetConfig(bytes=10**9)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Widths that the 4-bit CPU kernel decodes correctly."""


@dataclass(frozen=True)
class Banked:
    """A model with its bank and samples."""

    model: PreTrainedModel
    subject: Subject

    @cached_property
    def starts(self) -> Starts:
        return self.subject.starts

    @cached_property
    def starts_of_blocks(self) -> Starts:
        return self.subject.blocks.starts

    def weights(self, group: str, name: str) -> dict[str, torch.Tensor]:
        """Compute the initial weights of a trial for each layer of a group in a format."""
        layers = {
            linear.name: self.model.get_parameter(f"{linear.name}.weight")
            for linear in self.starts.groups[group].linears
        }
        return {path: self.starts.weight(group, name, path, each) for path, each in layers.items()}

    def samples(self, batch_size: int = 2) -> Samples:
        return replace(self.subject.samples, batch_size=batch_size)


def samples_of(
    lengths: Sequence[int] = (9, 16, 12, 7, 16), unlabelled: int = 3, batch_size: int = 2
) -> Samples:
    """Make random samples of these lengths, without labels on the first tokens."""
    rows = rows_of(lengths)
    for row in rows:
        row["labels"] = [-100] * unlabelled + row["labels"][unlabelled:]
    return Samples(rows, PAD, batch_size)


def banked(
    folder: Path,
    name: str = "llama",
    group: str = "projection",
    init: str = "loftq",
    levels: tuple[str, ...] = LEVELS,
    embeddings: tuple[str, ...] = ("bf16",),
    **options: Any,
) -> Banked:
    """Save a tiny decoder in the subfolder `model`; its groups are packed when their starts are
    read."""
    model = tiny(name, **WIDE | options)
    model.save_pretrained(folder / "model")
    quantize = QuantizeConfig(group=group, formats=levels, embeddings=embeddings, budget=BUDGET)
    groups = layout_of(model.config, quantize, 4, LORA.rank, on_gpu=False).groups
    lora = LORA.model_copy(update={"init": init})
    bank = bank_source(folder / "model", folder, lora, "float32", group)
    return Banked(model, Subject(samples_of(), groups, bank))


def predictions_of(
    model: torch.nn.Module, samples: Samples
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits ``(positions, vocabulary)`` and labels where a labelled token is predicted."""
    for row in samples.rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits
        labels = torch.tensor(row["labels"])[1:]
        yield logits[0, :-1][labels != -100], labels[labels != -100]
