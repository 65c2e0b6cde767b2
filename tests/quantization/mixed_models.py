"""Mixed-precision models made as the pipeline makes them: a bank of packed groups, then a plan put together from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qpruner.config import LoraConfig
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.quantization.assembly import assemble
from qpruner.quantization.bank import EntrySettings, build_entry, write_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA = LoraConfig(rank=4, alpha=8)
GROUP = "projection"
DTYPE = "bfloat16"


def fill_bank(
    checkpoint: Path, bank: Path, double_quant: bool, lora: LoraConfig = LORA, dtype: str = DTYPE, group: str = GROUP
) -> list[str]:
    """Write every (group, 4 and 8 bits) of a checkpoint; returns the names of the groups."""
    model = load_dense(str(checkpoint), dtype)
    groups = group_linears(model.config, group)
    for name, paths in groups.items():
        weights = {path: model.get_submodule(path).weight for path in paths}
        for bits in (4, 8):
            write_entry(bank, name, bits, build_entry(weights, bits, EntrySettings(lora, double_quant, seed=0)))
    return list(groups)


def mixed_plan(names: list[str], pattern: tuple[int, ...]) -> dict[str, int]:
    """The groups at the pattern's widths, over and over."""
    return {name: pattern[position % len(pattern)] for position, name in enumerate(names)}


def mixed_model(checkpoint: Path, bank: Path, plan: Mapping[str, int], double_quant: bool) -> PreTrainedModel:
    return assemble(checkpoint, bank, GROUP, plan, DTYPE, double_quant)[0].eval()


def token_ids() -> torch.Tensor:
    """``(2, 11)``."""
    return torch.randint(3, 400, (2, 11), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=token_ids(), use_cache=False).logits
    return logits
