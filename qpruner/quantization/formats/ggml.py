"""The simple formats of llama.cpp (ggml-quants.c): blocks of 32 weights with one scale in float16.

Rows have the bytes of a GGUF file. They are those that llama.cpp's reference and the `gguf` package write.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import Capability, GridFormat
from qpruner.quantization.formats.rows import decode_rows, read_as

if TYPE_CHECKING:
    import torch

    from qpruner.quantization.formats.format import Tensors

BLOCK_SIZE = 32
BELOW_HALF = 0.49999997  # largest float32 below 0.5; added to a number, it rounds halves away from zero as C's roundf
# A byte times ONES is 8 copies of it, of which BIT_OF_BYTE keeps one bit each (as int64, lowest byte first).
ONES = 0x0101010101010101
BIT_OF_BYTE = 0x8040201008040201 - 2**64


@dataclass(frozen=True, kw_only=True)
class Blocks(GridFormat):
    """Blocks of 32 weights: a scale, then the codes."""

    group_size: int | None = BLOCK_SIZE
    block_bytes: int

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """Count the bytes of all blocks."""
        return rows * (columns // BLOCK_SIZE) * self.block_bytes

    def refusal(self, columns: int, capability: Capability | None) -> str | None:
        """Refuse rows that are no whole number of blocks."""
        return f"{columns} columns do not divide by {BLOCK_SIZE}" if columns % BLOCK_SIZE else None

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Compute the weights that codes stand for, with the scale as it is stored."""
        return scale.half().float() * (codes - zero)

    def store(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Tensors:
        """Write scales and codes block by block."""
        import torch

        header = scales.half().unsqueeze(-1).view(torch.uint8)  # (rows, blocks, 2)
        body = self._to_bytes(codes.reshape(len(codes), -1, BLOCK_SIZE))
        return {"weight": torch.cat([header, body], dim=-1).flatten(1)}

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Multiply codes by the scale of their block."""
        return decode_rows(tensors["weight"], columns, dtype, self._decode)

    def _decode(self, packed: torch.Tensor) -> torch.Tensor:
        import torch

        blocks = packed.reshape(-1, self.block_bytes)
        scale = read_as(blocks[:, :2], torch.float16).float()
        return self._to_codes(blocks).float().mul_(scale)

    @abstractmethod
    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        """Turn codes ``(rows, blocks, 32)`` into the bytes after the scale."""

    @abstractmethod
    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """Read signed codes, int8 ``(blocks, 32)``, from uint8 ``(blocks, block bytes)``."""


@dataclass(frozen=True, kw_only=True)
class Signed(Blocks):
    """Blocks whose scale has the sign that maps their largest weight to code 0, the one code without a partner."""

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the scale that maps the first of the largest weights to code 0."""
        import torch

        zero = self.num_codes // 2
        largest = weight.gather(-1, weight.abs().argmax(dim=-1, keepdim=True))
        scale = largest / -zero
        return scale, torch.full_like(scale, zero)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round as llama.cpp does: halves up."""
        return (weight * _inverse(scale)).add_(zero + 0.5).clamp_(0, self.num_codes - 1).trunc_()


@dataclass(frozen=True, kw_only=True)
class Q4(Signed):
    """A scale and 16 bytes: the first 16 weights in the lower halves, the others in the upper."""

    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        return _join_nibbles(codes)

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        return _split_nibbles(blocks, 2).view(torch.int8).sub_(8)


@dataclass(frozen=True, kw_only=True)
class Q5(Signed):
    """As `Q4`, with the fifth bits of all weights in 4 bytes before the others."""

    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        high = (codes >> 4).view(*codes.shape[:2], 4, 8)
        bits = high[..., 0].clone()
        for index in range(1, 8):
            bits |= high[..., index] << index
        return torch.cat([bits, _join_nibbles(codes & 15)], dim=-1)

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        bits = blocks[:, 2:6].to(torch.int64).mul_(ONES).bitwise_and_(BIT_OF_BYTE)
        # Adding 127 sets the highest bit of every byte that is not 0; it is moved to the fifth.
        high = bits.add_(127 * ONES).bitwise_right_shift_(3).bitwise_and_(16 * ONES).view(torch.uint8)
        return _split_nibbles(blocks, 6).bitwise_or_(high).view(torch.int8).sub_(16)


@dataclass(frozen=True, kw_only=True)
class Q8(Blocks):
    """A scale and 32 signed bytes."""

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale the largest weight of each block to 127 steps."""
        import torch

        largest = weight.abs().amax(dim=-1, keepdim=True)
        scale = largest / torch.full_like(largest, 127)  # GPUs divide by a plain number less exactly
        return scale, torch.full_like(scale, 127)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round as llama.cpp does: halves away from zero."""
        import torch

        steps = weight * _inverse(scale)
        half = torch.copysign(torch.full_like(steps, BELOW_HALF), steps)
        return steps.add_(half).trunc_().add_(zero).clamp_(0, self.num_codes - 1)

    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        return codes - 127  # modulo 256, as int8 wants it

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        return blocks.view(torch.int8)[:, 2:]


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    lower, upper = codes.chunk(2, dim=-1)
    return lower | (upper << 4)


def _split_nibbles(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Read codes ``(blocks, 32)`` from the halves of the bytes from `start` on."""
    import torch

    # Whole blocks are split, scales too: with rows of 16 bytes torch takes five times as long.
    halves = blocks & 15, blocks >> 4
    return torch.cat([half[:, start:] for half in halves], dim=1)


Q4_0 = Q4(name="q4_0", ggml_type="Q4_0", bits=4, letter="a", colour="#c7e9c0", num_codes=16, block_bytes=18)
Q5_0 = Q5(name="q5_0", ggml_type="Q5_0", bits=5, letter="b", colour="#74c476", num_codes=32, block_bytes=22)
Q8_0 = Q8(name="q8_0", ggml_type="Q8_0", bits=8, letter="c", colour="#238b45", num_codes=255, block_bytes=34)
