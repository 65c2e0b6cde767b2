"""Store blocks of 32 weights with one float16 scale: the simple formats of llama.cpp.

Blocks have the bytes of GGUF files, as ggml-quants.c writes them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import (
    Capability,
    Format,
    ScaledFormat,
    Tensors,
    decode_rows,
    inverse_of,
    over_127,
    read_as,
)

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 32
# largest float32 below 0.5; added to a number, it rounds halves away from zero as C's roundf
BELOW_HALF = 0.49999997
# A byte times ONES is 8 copies of it, of which BIT_OF_BYTE keeps one bit each (as int64, lowest
# byte first).
ONES = 0x0101010101010101
BIT_OF_BYTE = 0x8040201008040201 - 2**64


@dataclass(frozen=True, kw_only=True)
class Blocks(Format):
    """Rows of blocks, as GGUF files have them."""

    block_size: int
    block_bytes: int

    @property
    def ggml_type(self) -> str:
        return self.name.upper()

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        return rows * (columns // self.block_size) * self.block_bytes

    def refusal(self, columns: int, capability: Capability | None) -> str | None:
        if columns % self.block_size:
            return f"{columns} columns do not divide by {self.block_size}"
        return None

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        def decode(packed: torch.Tensor) -> torch.Tensor:
            return self._decode(packed.reshape(-1, self.block_bytes))

        return decode_rows(tensors["weight"], columns, dtype, decode)

    @abstractmethod
    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """Compute float32 weights from uint8 ``(blocks, block bytes)``."""


@dataclass(frozen=True, kw_only=True)
class Simple(Blocks, ScaledFormat):
    """Blocks of 32 weights: a scale, in some formats a minimum, then the codes."""

    group_size: int = BLOCK_SIZE
    block_size: int = BLOCK_SIZE
    scale_type: str = "float16"

    @property
    def header_bytes(self) -> int:
        """The bytes of a block's scale and minimum."""
        return 2 * self.num_scales

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return scale.half().float() * (codes - zero)

    def store(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Tensors:
        import torch

        header = self._header(scales, zeros).half().contiguous().view(torch.uint8)
        body = self._to_bytes(codes.reshape(len(codes), -1, BLOCK_SIZE))
        return {"weight": torch.cat([header, body], dim=-1).flatten(1)}

    def read_scales(self, packed: torch.Tensor, columns: int) -> torch.Tensor:
        import torch

        blocks = packed.view(len(packed), -1, self.block_bytes)
        return read_as(blocks[..., : self.header_bytes], torch.float16)

    def write_scales(
        self, packed: torch.Tensor, columns: int, scales: torch.Tensor
    ) -> torch.Tensor:
        import torch

        blocks = packed.view(len(packed), -1, self.block_bytes)
        header = scales.half().contiguous().view(torch.uint8)
        return torch.cat([header, blocks[..., self.header_bytes :]], dim=-1).flatten(1)

    def _header(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Return what is stored before the codes: float32 ``(rows, blocks, num_scales)``."""
        return scales.unsqueeze(-1)

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._to_codes(blocks).float().mul_(float16(blocks[:, :2]))

    @abstractmethod
    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        """Turn codes ``(rows, blocks, 32)`` into the bytes after the header."""

    @abstractmethod
    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """Read codes without their offset, int8 ``(blocks, 32)``, from whole blocks of uint8."""


@dataclass(frozen=True, kw_only=True)
class Signed(Simple):
    """Blocks whose scale is signed, so that their largest weight gets code 0.

    Code 0 is the one code without a partner.
    """

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        zero = self.num_codes // 2
        largest = weight.gather(-1, weight.abs().argmax(dim=-1, keepdim=True))
        scale = largest / -zero
        return scale, scale.new_full(scale.shape, zero)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        # As llama.cpp does, halves are rounded up.
        return (weight * inverse_of(scale)).add_(zero + 0.5).clamp_(0, self.num_codes - 1).trunc_()


@dataclass(frozen=True, kw_only=True)
class Ranged(Simple):
    """Blocks with a scale and a minimum, which span their range: ``scale * code + minimum``.

    The minimum takes the place of the zero in the arguments of a grid format.
    """

    num_scales: int = 2

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        minimum = weight.amin(dim=-1, keepdim=True)
        span = weight.amax(dim=-1, keepdim=True) - minimum
        # GPUs divide by a plain number less exactly.
        return span / span.new_full(span.shape, self.num_codes - 1), minimum

    def narrowed(self, scale: torch.Tensor, zero: torch.Tensor, share: float) -> torch.Tensor:
        return zero + scale * ((1 - share) * (self.num_codes - 1) / 2)

    def regression(
        self,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        importance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        total = importance.sum()
        mean_code = (codes * importance).sum(dim=-1, keepdim=True) / total
        mean_weight = (weight * importance).sum(dim=-1, keepdim=True) / total
        levels = codes - mean_code
        weighted = levels * importance
        square = (weighted * levels).sum(dim=-1, keepdim=True)
        product = (weighted * weight).sum(dim=-1, keepdim=True)
        scale = torch.where(square > 0, product / square, scale)
        return scale, mean_weight - scale * mean_code

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        # As llama.cpp does, halves are rounded up.
        steps = (weight - zero).mul_(inverse_of(scale)).add_(0.5)
        return steps.clamp_(0, self.num_codes - 1).trunc_()

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return scale.half().float() * codes + zero.half().float()

    def _header(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.stack([scales, zeros], dim=-1)

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        return super()._decode(blocks).add_(float16(blocks[:, 2:4]))


class Nibbles:
    """16 bytes of codes: the first 16 weights in the lower halves, the others in the upper."""

    header_bytes: int

    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        return _join_nibbles(codes)

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        return _split_nibbles(blocks, self.header_bytes).view(torch.int8)


class FiveBits:
    """As `Nibbles`, with the fifth bits of all weights in 4 bytes before the others."""

    header_bytes: int

    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        high = (codes >> 4).view(*codes.shape[:2], 4, 8)
        bits = high[..., 0].clone()
        for index in range(1, 8):
            bits |= high[..., index] << index
        return torch.cat([bits, _join_nibbles(codes & 15)], dim=-1)

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        start = self.header_bytes
        high = blocks[:, start : start + 4]
        bits = high.to(torch.int64).mul_(ONES).bitwise_and_(BIT_OF_BYTE)
        # Adding 127 sets the highest bit of every byte that is not 0; it is moved to the fifth.
        bits.add_(127 * ONES).bitwise_right_shift_(3).bitwise_and_(16 * ONES)
        codes = _split_nibbles(blocks, start + 4).bitwise_or_(bits.view(torch.uint8))
        return codes.view(torch.int8)


@dataclass(frozen=True, kw_only=True)
class Q4(Nibbles, Signed):
    """A scale, then 4 bits a weight."""

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return super()._to_codes(blocks).sub_(8)


@dataclass(frozen=True, kw_only=True)
class Q4Ranged(Nibbles, Ranged):
    """A scale and a minimum, then 4 bits a weight."""


@dataclass(frozen=True, kw_only=True)
class Q5(FiveBits, Signed):
    """A scale, then 5 bits a weight."""

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return super()._to_codes(blocks).sub_(16)


@dataclass(frozen=True, kw_only=True)
class Q5Ranged(FiveBits, Ranged):
    """A scale and a minimum, then 5 bits a weight."""


@dataclass(frozen=True, kw_only=True)
class Q8(Simple):
    """A scale and 32 signed bytes."""

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = over_127(weight.abs().amax(dim=-1, keepdim=True))
        return scale, scale.new_full(scale.shape, 127)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        # As llama.cpp does, halves are rounded away from zero.
        steps = weight * inverse_of(scale)
        half = steps.new_full(steps.shape, BELOW_HALF).copysign_(steps)
        return steps.add_(half).trunc_().add_(zero).clamp_(0, self.num_codes - 1)

    def _to_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        return codes - 127  # modulo 256, as int8 wants it

    def _to_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        return blocks.view(torch.int8)[:, 2:]


def float16(header: torch.Tensor) -> torch.Tensor:
    """Read two bytes of each block as a float16 number, in float32."""
    import torch

    return read_as(header, torch.float16).float()


def _join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    lower, upper = codes.chunk(2, dim=-1)
    return lower | (upper << 4)


def _split_nibbles(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Read codes ``(blocks, 32)`` from the halves of the bytes from `start` on."""
    import torch

    # Whole blocks are split, scales too: with rows of 16 bytes torch takes five times as long.
    return torch.cat([half[:, start:] for half in (blocks & 15, blocks >> 4)], dim=1)


Q4_0 = Q4(
    name="q4_0",
    bits=4,
    letter="a",
    colour="#c7e9c0",
    num_codes=16,
    block_bytes=18,
)
Q4_1 = Q4Ranged(
    name="q4_1",
    bits=4,
    letter="l",
    colour="#a1d99b",
    num_codes=16,
    block_bytes=20,
)
Q5_0 = Q5(
    name="q5_0",
    bits=5,
    letter="b",
    colour="#74c476",
    num_codes=32,
    block_bytes=22,
)
Q5_1 = Q5Ranged(
    name="q5_1",
    bits=5,
    letter="m",
    colour="#41ab5d",
    num_codes=32,
    block_bytes=24,
)
Q8_0 = Q8(
    name="q8_0",
    bits=8,
    letter="c",
    colour="#238b45",
    num_codes=255,
    block_bytes=34,
)
