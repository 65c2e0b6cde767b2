"""Read the weights that trials start from, for the error-based sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qpruner.plans.plan import FULL_BITS
from qpruner.quantization.bank import read_plan
from qpruner.quantization.mixed import unpack


class Starts:
    """Dequantized weights with their adapters added, for every (group, bits) below 16 in the bank.

    Files of the bank are mapped, not copied, so on a CPU memory is one layer's float32 weight. `groups` maps each
    group to the paths of its linear layers; `scaling` is the factor of the adapters' product (alpha / rank).
    """

    def __init__(self, bank: Path, groups: Mapping[str, Sequence[str]], levels: Sequence[int], scaling: float) -> None:
        self.groups = groups
        self.levels = tuple(bits for bits in levels if bits != FULL_BITS)
        self._scaling = scaling
        self._entries = {(group, bits): read_plan(bank, {group: bits}) for group in groups for bits in self.levels}

    def weight(self, group: str, bits: int, path: str, device: torch.device) -> torch.Tensor:
        """Compute the weight ``(rows, columns)`` float32 of the layer at `path` at the start of a trial.

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
