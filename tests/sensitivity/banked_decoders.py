"""Make tiny random decoders with a real bank, and samples for scoring their groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mixed_models import fill_bank
from tiny_decoders import PAD, rows_of, tiny

from qpruner.config.schema import LoraConfig
from qpruner.data.calibration import Samples
from qpruner.quantization.bank import Starts
from qpruner.sensitivity.methods import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEVELS = (4, 8, 16)
LORA = LoraConfig(rank=2, alpha=6)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Widths that the 4-bit CPU kernel decodes correctly."""


@dataclass(frozen=True)
class Banked:
    """A model with its bank and samples."""

    model: PreTrainedModel
    subject: Subject

    @cached_property
    def starts(self) -> Starts:
        return self.subject.starts(self.model)

    def errors(self, group: str, bits: int) -> dict[str, torch.Tensor]:
        """Compute the difference between the initial weights of a trial and the weights, for each layer of a group."""
        weights = {path: self.model.get_parameter(f"{path}.weight").detach() for path in self.starts.groups[group]}
        return {path: self.starts.weight(group, bits, path, each.device) - each for path, each in weights.items()}

    def samples(self, batch_size: int = 2) -> Samples:
        return replace(self.subject.samples, batch_size=batch_size)


def samples_of(lengths: Sequence[int] = (9, 16, 12, 7, 16), unlabelled: int = 3) -> Samples:
    """Make random samples of these lengths, without labels on the first tokens."""
    rows = [row | {"labels": [-100] * unlabelled + row["labels"][unlabelled:]} for row in rows_of(lengths)]
    return Samples(rows, PAD, batch_size=2)


def banked(
    folder: Path,
    name: str = "llama",
    group: str = "projection",
    init: str = "loftq",
    double_quant: bool = False,
    **options: Any,
) -> Banked:
    """Save a tiny decoder in the subfolder `model`, and pack all its groups at 4 and 8 bits."""
    model = tiny(name, **WIDE | options)
    model.save_pretrained(folder / "model")
    fill_bank(folder / "model", folder, double_quant, LORA.model_copy(update={"init": init}), "float32", group)
    return Banked(model, Subject(samples_of(), LEVELS, group, folder, LORA.alpha / LORA.rank))
