"""8-bit integers with a scale for each row, the codes of LLM.int8() (arXiv 2208.07339), without its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import GridFormat
from qpruner.quantization.formats.rows import decode_rows, read_as

if TYPE_CHECKING:
    import torch

    from qpruner.quantization.formats.format import Tensors


@dataclass(frozen=True, kw_only=True)
class Int8(GridFormat):
    """Rows of int8 codes, each followed by its scale in float32.

    A grid is the row's largest weight, 127 times its scale: LLM.int8() multiplies by ``127 / largest``, which a rounded
    scale does not give back.
    """

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """Count the bytes of codes and scales."""
        return rows * (columns + 4)

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest weight of each row, which gets code 127, and the code of 0."""
        import torch

        largest = weight.abs().amax(dim=-1, keepdim=True)
        return largest, torch.full_like(largest, 128)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round before the zero is added, as added to it a weight would lose bits."""
        import torch

        inverse = torch.where(scale == 0, torch.zeros_like(scale), 127 / scale)
        return (weight * inverse).round_().add_(zero).clamp_(0, self.num_codes - 1)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Compute the weights that codes stand for once the grid is stored."""
        return _stored(scale) * (codes - zero)

    def store(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Tensors:
        """Append each row's scale to its codes, which become signed bytes."""
        import torch

        return {"weight": torch.cat([codes ^ 128, _stored(scales).contiguous().view(torch.uint8)], dim=1)}

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Multiply codes by their row's scale."""
        import torch

        def decode(packed: torch.Tensor) -> torch.Tensor:
            scale = read_as(packed[:, columns:], torch.float32)
            return packed[:, :columns].view(torch.int8).float().mul_(scale)

        return decode_rows(tensors["weight"], columns, dtype, decode)


def _stored(largest: torch.Tensor) -> torch.Tensor:
    """Return the scale of rows with these largest weights."""
    import torch

    return largest / torch.full_like(largest, 127)  # GPUs divide by a plain number less exactly


INT8 = Int8(name="int8", version=2, bits=8, letter="8", colour="#2a73b0", group_size=None, num_codes=256)
