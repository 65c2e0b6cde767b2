"""The weights that trials start from, as the bank holds them: what the error-based sensitivities look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qpruner.plans.plan import FULL_BITS
from qpruner.quantization.bank import read_plan
from qpruner.quantization.mixed import unpack


class Starts:
    """Dequantized weights with their adapters added, for every (group, bits); read from the bank's files as asked for.

    On the CPU the files are mapped, not copied, so memory is one layer's float32 weight.

    Args:
        bank: Folder of the bank.
        groups: Group -> full paths of its linear layers.
        levels: Bit-widths; 16 bits are the model's own weights and have no start.
        scaling: What the product of the adapters is multiplied with (alpha / rank).

    Raises:
        CorruptFile: Naming the file of the bank that is missing or cannot be read.
    """

    def __init__(self, bank: Path, groups: Mapping[str, Sequence[str]], levels: Sequence[int], scaling: float) -> None:
        self.groups = groups
        self.levels = tuple(bits for bits in levels if bits != FULL_BITS)
        self._scaling = scaling
        self._entries = {(group, bits): read_plan(bank, {group: bits}) for group in groups for bits in self.levels}

    def weight(self, group: str, bits: int, path: str, device: torch.device) -> torch.Tensor:
        """``(rows, columns)`` float32: what the layer at `path` multiplies with at the start of a trial.

        8-bit layers round their inputs too (LLM.int8), which no weight can show.
        """
        own = {
            name.removeprefix(f"{path}."): tensor.to(device)
            for name, tensor in self._entries[group, bits].items()
            if name.startswith(f"{path}.")
        }
        lora_a, lora_b = own.pop("lora_A", None), own.pop("lora_B", None)
        weight = unpack(own, torch.float32)
        if lora_a is None or lora_b is None:  # `lora.init: plain`
            return weight
        return weight.addmm_(lora_b, lora_a, alpha=self._scaling)
