"""The bank: for every (group, bits) the packed weights and the adapter start, computed once, shared by all trials.

The start of a group depends on the group and its bits, not on the rest of the plan. One safetensors file an entry:
the layers' serialized bitsandbytes tensors, and `<layer>.lora_A` / `<layer>.lora_B`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qpruner.config import LoraConfig
from qpruner.errors import CorruptFile
from qpruner.plan import FULL_BITS
from qpruner.quantization.loftq import loftq_start
from qpruner.quantization.mixed import pack


@dataclass(frozen=True)
class EntrySettings:
    """What an entry depends on besides the weights and the bits."""

    lora: LoraConfig
    double_quant: bool
    seed: int


@dataclass(frozen=True)
class Entry:
    """Tensors of one (group, bits) and how much of the quantization error the adapters gave back.

    Attributes:
        tensors: What the entry's file holds.
        residual_ratio: Frobenius norm of the error left over that of plain quantization; 1 without LoftQ.
    """

    tensors: dict[str, torch.Tensor]
    residual_ratio: float


def build_entry(weights: Mapping[str, torch.Tensor], bits: int, settings: EntrySettings) -> Entry:
    """Quantize a group's layers; a pure function of its arguments.

    Args:
        weights: Layer path -> weight ``(rows, columns)``.
        bits: 4 or 8.
        settings: Adapter and quantization settings.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain, left = 0.0, 0.0
    for path, weight in weights.items():
        if settings.lora.init == "plain":
            packed = pack(weight, bits, settings.double_quant)
        else:
            start = loftq_start(
                weight,
                bits,
                rank=settings.lora.rank,
                scaling=settings.lora.alpha / settings.lora.rank,
                iterations=settings.lora.loftq_iterations,
                svd=settings.lora.svd,
                double_quant=settings.double_quant,
                seed=settings.seed,
            )
            packed = start.packed
            tensors |= {f"{path}.lora_A": start.lora_a.contiguous(), f"{path}.lora_B": start.lora_b.contiguous()}
            plain += start.plain_error**2
            left += start.error**2
        tensors |= {f"{path}.{name}": tensor for name, tensor in packed.items()}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return Entry(on_cpu, (left / plain) ** 0.5 if plain else 1.0)


def entry_file(bank: Path, group: str, bits: int) -> Path:
    """Where the entry of a (group, bits) lies."""
    return bank / f"{bits}bit" / f"{group}.safetensors"


def write_entry(bank: Path, group: str, bits: int, entry: Entry) -> Path:
    """Write an entry's file; returns its path."""
    path = entry_file(bank, group, bits)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(entry.tensors, path)
    return path


def read_plan(bank: Path, bits_by_group: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The tensors of all groups that a plan quantizes.

    Raises:
        CorruptFile: Naming the file that is missing or cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for group, bits in bits_by_group.items():
        if bits == FULL_BITS:
            continue
        path = entry_file(bank, group, bits)
        try:
            tensors |= load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise CorruptFile(
                f"bank file {path} cannot be read: {error}; delete the bank folder to rebuild it", path
            ) from error
    return tensors
