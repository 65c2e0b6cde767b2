"""Store 8-bit integers with a scale for each row: the codes of LLM.int8().

The codes are those of arXiv 2208.07339; its arithmetic is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import (
    GridFormat,
    Tensors,
    decode_rows,
    inverse_of,
    over_127,
    read_as,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Int8(GridFormat):
    """Rows of int8 codes, each followed by its scale in float32.

    A grid is the row's largest weight: LLM.int8() multiplies by ``127 / largest``, which a rounded
    scale loses.
    """

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        return rows * (columns + 4)

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = weight.abs().amax(dim=-1, keepdim=True)
        return largest, largest.new_full(largest.shape, 128)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        # The zero is added after rounding, as added to it a weight would lose bits.
        return (weight * inverse_of(scale, 127)).round_().add_(zero).clamp_(0, self.num_codes - 1)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return over_127(scale) * (codes - zero)

    def store(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Tensors:
        import torch

        scale_bytes = over_127(scales).contiguous().view(torch.uint8)
        return {"weight": torch.cat([codes ^ 128, scale_bytes], dim=1)}

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        def decode(packed: torch.Tensor) -> torch.Tensor:
            scale = read_as(packed[:, columns:], torch.float32)
            return packed[:, :columns].view(torch.int8).float().mul_(scale)

        return decode_rows(tensors["weight"], columns, dtype, decode)


INT8 = Int8(
    name="int8", version=2, bits=8, letter="8", colour="#2a73b0", group_size=None, num_codes=256
)
