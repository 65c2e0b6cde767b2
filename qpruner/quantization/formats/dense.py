"""The format of unpacked weights, as they are in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from qpruner.quantization.formats.format import Format


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


BF16 = Dense(name="bf16", bits=16, letter="F", colour="#0c3357")
