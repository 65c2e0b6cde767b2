"""Store blocks of 256 weights whose groups have quantized scales: the k-quants of llama.cpp.

Groups are of 16 or 32 weights. `libgguf`, which has llama.cpp's code (ggml-quants.c), packs;
unpacking is the arithmetic of the `gguf` package, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import Tensors, row_parts
from qpruner.quantization.formats.ggml import Blocks, float16

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class KQuant(Blocks):
    """Blocks of 256 weights."""

    package: str = "libgguf"
    extra: str = "gguf"
    block_size: int = 256
    type_number: int  # number of `ggml_type` in GGUF files

    def pack(self, weight: torch.Tensor) -> Tensors:
        """Pack on the CPU, with llama.cpp's search for scales."""
        import libgguf
        import torch

        row_bytes = self.packed_bytes(1, weight.shape[1], 0)
        packed = torch.empty(len(weight), row_bytes, dtype=torch.uint8)
        for rows in row_parts(weight):
            part = weight[rows].detach().float().cpu().numpy()
            packed[rows] = torch.from_numpy(libgguf.quantize_rows(part, self.type_number))
        return {"weight": packed.to(weight.device)}


@dataclass(frozen=True, kw_only=True)
class Q2K(KQuant):
    """4-bit scales and minima of 16 groups, 64 bytes of codes, their scales."""

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        scales, codes, scale, minimum = blocks.split_with_sizes([16, 64, 2, 2], dim=1)
        step = float16(scale) * (scales & 15)  # (blocks, 16)
        offset = float16(minimum) * (scales >> 4)
        weight = _crumbs(codes).float().view(-1, 16, 16)
        return weight.mul_(step.unsqueeze(2)).sub_(offset.unsqueeze(2))


@dataclass(frozen=True, kw_only=True)
class Q3K(KQuant):
    """32 bytes of third bits, 64 of the lower two, 6-bit scales of 16 groups, their scale."""

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        third, codes, scales, scale = blocks.split_with_sizes([32, 64, 12, 2], dim=1)
        lower, upper = scales.split_with_sizes([8, 4], dim=1)
        low = torch.cat([lower & 15, lower >> 4], dim=1)
        high = torch.cat([(upper >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
        steps = (low + (high << 4)).view(torch.int8).sub_(32)
        step = float16(scale) * steps  # (blocks, 16)

        third = third.contiguous()
        shifted = [third << 2, third << 1, *(third >> shift for shift in range(6))]
        bits = torch.stack(shifted, dim=1).bitwise_and_(4).view(-1, 2, 4, 32)
        signed = _crumbs(codes).bitwise_or_(bits).view(torch.int8).sub_(4)
        return signed.float().view(-1, 16, 16).mul_(step.unsqueeze(2))


@dataclass(frozen=True, kw_only=True)
class Q4K(KQuant):
    """Scale and minimum of 6-bit scales and minima of 8 groups, 128 bytes of codes."""

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        scale, minimum, scales, codes = blocks.split_with_sizes([2, 2, 12, 128], dim=1)
        first, second, rest = scales.chunk(3, dim=1)
        last_steps = (rest & 15) | ((first >> 2) & 48)
        last_offsets = (rest >> 4) | ((second >> 2) & 48)
        step = float16(scale) * torch.cat([first & 63, last_steps], dim=1)  # (blocks, 8)
        offset = float16(minimum) * torch.cat([second & 63, last_offsets], dim=1)
        weight = _nibbles(codes, 32).float().view(-1, 8, 32)
        return weight.mul_(step.unsqueeze(2)).sub_(offset.unsqueeze(2))


@dataclass(frozen=True, kw_only=True)
class Q6K(KQuant):
    """128 bytes of the lower four bits, 64 of the upper two, int8 scales of groups, their scale."""

    def _decode(self, blocks: torch.Tensor) -> torch.Tensor:
        import torch

        low, high, scales, scale = blocks.split_with_sizes([128, 64, 16, 2], dim=1)
        step = float16(scale) * scales.view(torch.int8)  # (blocks, 16)
        codes = _crumbs(high).bitwise_left_shift_(4)
        codes.bitwise_or_(_nibbles(low, 64).view(-1, 2, 4, 32))
        return codes.view(torch.int8).sub_(32).float().view(-1, 16, 16).mul_(step.unsqueeze(2))


def _crumbs(packed: torch.Tensor) -> torch.Tensor:
    """Split bytes ``(blocks, 64)`` into 2-bit codes ``(blocks, 2, 4, 32)``."""
    import torch

    packed = packed.contiguous().view(-1, 2, 32)
    return torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2)


def _nibbles(packed: torch.Tensor, run: int) -> torch.Tensor:
    """Split bytes ``(blocks, 128)`` into 4-bit codes ``(blocks, 128 / run, 2, run)``."""
    import torch

    packed = packed.contiguous().view(-1, 128 // run, run)
    return torch.stack([packed & 15, packed >> 4], dim=2)


Q2_K = Q2K(
    name="q2_k",
    bits=2,
    letter="e",
    colour="#fdd0a2",
    block_bytes=84,
    type_number=10,
)
Q3_K = Q3K(
    name="q3_k",
    bits=3,
    letter="f",
    colour="#fdae6b",
    block_bytes=110,
    type_number=11,
)
Q4_K = Q4K(
    name="q4_k",
    bits=4,
    letter="g",
    colour="#f16913",
    block_bytes=144,
    type_number=12,
)
Q6_K = Q6K(
    name="q6_k",
    bits=6,
    letter="h",
    colour="#a63603",
    block_bytes=210,
    type_number=14,
)
