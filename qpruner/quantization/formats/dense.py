"""The format of unpacked weights, as they are in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import Format

if TYPE_CHECKING:
    import torch

    from qpruner.quantization.formats.format import Tensors


@dataclass(frozen=True, kw_only=True)
class Dense(Format):
    """Weights in `model.dtype`; there is nothing to pack."""

    @property
    def is_packed(self) -> bool:
        """Whether weights are stored in other tensors than in the checkpoint."""
        return False

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """Count the bytes of a weight."""
        return rows * columns * element_bytes

    def pack(self, weight: torch.Tensor) -> Tensors:
        """Take the weight as it is."""
        return {"weight": weight}

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in this type."""
        return tensors["weight"].to(dtype)


BF16 = Dense(name="bf16", bits=16, letter="F", colour="#0c3357")
