"""The format of unpacked weights, as they are in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import Format, Tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Dense(Format):
    """Weights in `model.dtype`; there is nothing to pack."""

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        return rows * columns * element_bytes

    def pack(self, weight: torch.Tensor) -> Tensors:
        return {"weight": weight}

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return tensors["weight"].to(dtype)


BF16 = Dense(name="bf16", bits=16, letter="F", colour="#0c3357", is_packed=False)
