"""Store integers in groups of columns, in the layout `pack-quantized` that vLLM reads.

The layout is that of compressed-tensors (0.20). A weight is ``scale * (code - zero)``. Codes are
packed without gaps into words of 32 bits, and so are zeros. Scales are bfloat16, as in vLLM: it
serves asymmetric 4 bits by Marlin and its CPU kernels, and 2, 3 and 8 bits by Humming. In our one
tensor a row has its words, then its scales, then its zeros, packed into bytes; `parts` is the
layout of the checkpoint, where zeros are packed along rows instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qpruner.quantization.formats.format import (
    Capability,
    ScaledFormat,
    Tensors,
    read_as,
    row_parts,
)

if TYPE_CHECKING:
    import torch

SHRINKS = tuple(1 - 0.04 * step for step in range(16))
"""Scales tried by `*_hqq`, relative to the one that spans a group's range."""
STEPS = 5  # half-quadratic steps from the best of these
NORM = 0.7  # p of HQQ


@dataclass(frozen=True, kw_only=True)
class Packed(ScaledFormat):
    """Stores codes of 2, 3, 4 or 8 bits, with a scale and an integer zero for each group."""

    bits: int
    scale_type: str = "bfloat16"
    half_quadratic: bool = False
    """Whether scales and zeros are fitted by HQQ.

    Otherwise they span the range from the smallest to the largest weight.
    """

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        return rows * sum(self._row_bytes(columns))

    def refusal(self, columns: int, capability: Capability | None) -> str | None:
        # vLLM has as many scales as whole groups.
        if columns % self.group_size:
            return (
                f"vLLM reads groups of {self.group_size} columns only if they divide the width, "
                f"here {columns}"
            )
        return None

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Span the range of each group and 0, or fit it by HQQ.

        Scales are rounded to bfloat16, as they are stored.
        """
        low = weight.amin(dim=-1, keepdim=True).clamp_(max=0)
        high = weight.amax(dim=-1, keepdim=True).clamp_(min=0)
        scale = ((high - low) / (self.num_codes - 1)).bfloat16().float()
        zero = self.codes(-low, scale, scale.new_zeros(()))
        if self.half_quadratic:
            return self._fitted(weight, scale, zero, (low + high) / 2)
        return scale, zero

    def regression(
        self,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        importance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = super().regression(weight, codes, scale, zero, importance)
        return scale.bfloat16().float(), zero

    def store(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Tensors:
        import torch

        code_bytes, _, zero_bytes = self._row_bytes(codes.shape[1])
        packed_codes = _to_bits(codes, self.bits, code_bytes)
        packed_scales = scales.to(torch.bfloat16).contiguous().view(torch.uint8)
        packed_zeros = _to_bits(zeros.to(torch.uint8), self.bits, zero_bytes)
        return {"weight": torch.cat([packed_codes, packed_scales, packed_zeros], dim=1)}

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Compute ``scale * (code - zero)``.

        The difference is exact in bfloat16, so that only the product rounds.
        """
        import torch

        codes, scales, zeros = torch.split(tensors["weight"], self._row_bytes(columns), dim=1)
        scale_dtype = torch.float32 if dtype == torch.float16 else dtype
        scale = read_as(scales, torch.bfloat16).to(scale_dtype).unsqueeze(2)
        groups = scale.shape[1]
        zero = _from_bits(zeros, self.bits, groups).unsqueeze(2)

        weight = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
        grouped = weight.view(len(codes), groups, columns // groups)
        for rows in row_parts(weight):
            code = _from_bits(codes[rows], self.bits, columns).view_as(grouped[rows])
            if self.bits < 8:
                difference = (code - zero[rows]).view(torch.int8)  # in uint8 it wraps around
            else:
                difference = code.to(torch.int16) - zero[rows]
            grouped[rows].copy_(difference).mul_(scale[rows])
        return weight

    def read_scales(self, packed: torch.Tensor, columns: int) -> torch.Tensor:
        import torch

        _, scales, _ = torch.split(packed, self._row_bytes(columns), dim=1)
        return read_as(scales, torch.bfloat16).unsqueeze(-1)

    def write_scales(
        self, packed: torch.Tensor, columns: int, scales: torch.Tensor
    ) -> torch.Tensor:
        import torch

        codes, _, zeros = torch.split(packed, self._row_bytes(columns), dim=1)
        stored = scales.squeeze(-1).to(torch.bfloat16).contiguous().view(torch.uint8)
        return torch.cat([codes, stored, zeros], dim=1)

    def parts(self, tensors: Tensors, columns: int) -> Tensors:
        """Slice packed tensors into those of a layer in a checkpoint of compressed-tensors."""
        import torch

        packed = tensors["weight"]
        rows = len(packed)
        codes, scales, zeros = torch.split(packed, self._row_bytes(columns), dim=1)
        scale = read_as(scales, torch.bfloat16)
        zero = _from_bits(zeros, self.bits, scale.shape[1]).T.contiguous()
        zero_words = _to_bits(zero, self.bits, self._word_bytes(rows)).view(torch.int32)
        return {
            "weight_packed": read_as(codes, torch.int32),
            "weight_scale": scale,
            "weight_zero_point": zero_words.T.contiguous(),
            "weight_shape": torch.tensor([rows, columns]),
        }

    def _row_bytes(self, columns: int) -> list[int]:
        """Count the bytes that a row's words, scales and zeros take."""
        groups = math.ceil(columns / self.group_size)
        return [self._word_bytes(columns), 2 * groups, math.ceil(groups * self.bits / 8)]

    def _word_bytes(self, num_codes: int) -> int:
        """Count the bytes of the words of 32 bits that hold this many codes."""
        return 4 * math.ceil(num_codes * self.bits / 32)

    def _fitted(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Search the scale and zero of each group that have the least squared error, as in HQQ.

        Smaller scales around the centre of the group are tried first, then half-quadratic steps.
        HQQ itself keeps the range's scale, shifts the zero by fractions of a code and takes the
        last step. With integer zeros that changes nothing; trying scales, and fitting the scale in
        each step, does.
        """
        import torch

        best_scale = scale
        best_zero = zero
        least = self._error(weight, scale, zero)

        def offer(scale: torch.Tensor, zero: torch.Tensor) -> None:
            nonlocal best_scale, best_zero, least
            error = self._error(weight, scale, zero)
            best_scale = torch.where(error < least, scale, best_scale)
            best_zero = torch.where(error < least, zero, best_zero)
            least = torch.minimum(error, least)

        middle = scale.new_full(scale.shape, (self.num_codes - 1) / 2)
        for shrink in SHRINKS:
            smaller = (scale * shrink).bfloat16().float()
            offer(smaller, self.codes(-centre, smaller, middle))
        for _ in range(STEPS):
            offer(*self._step(weight, best_scale, best_zero))
        return best_scale, best_zero

    def _step(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shrink the errors of the weights, then fit scale and zero to what is left.

        Errors are in units of the scale, with beta = 1 (HQQ, equation 3).
        """
        import torch

        codes = self.codes(weight, scale, zero)
        unit = scale.clamp(min=torch.finfo(torch.float32).tiny)
        levels = codes - zero
        error = (weight - scale * levels) / unit
        size = error.abs()
        forgiven = error.sign() * (size - size.clamp(min=1e-6) ** (NORM - 1)).clamp_(min=0)
        target = weight - forgiven * unit

        square = levels.square().sum(dim=-1, keepdim=True)
        product = (levels * target).sum(dim=-1, keepdim=True)
        scale = torch.where(square > 0, product / square, scale).clamp_(min=0).bfloat16().float()
        mean_target = target.mean(dim=-1, keepdim=True)
        mean_code = codes.mean(dim=-1, keepdim=True)
        return scale, self.codes(-mean_target, scale, mean_code)

    def _error(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        error = self.codes(weight, scale, zero).sub_(zero).mul_(scale).sub_(weight)
        return error.square_().sum(dim=-1, keepdim=True)


def _to_bits(codes: torch.Tensor, width: int, num_bytes: int) -> torch.Tensor:
    """Pack uint8 codes ``(rows, columns)`` of `width` bits into `num_bytes` bytes a row.

    The lowest bits come first.
    """
    import torch

    eights = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    eights = eights.view(len(codes), eights.shape[1] // 8, 8)
    field = eights[..., 0].to(torch.int64)  # eight codes take as many bytes as one has bits
    for index in range(1, 8):
        field |= eights[..., index].to(torch.int64) << index * width
    packed = field.unsqueeze(2).view(torch.uint8)[..., :width].flatten(1)
    # A negative padding cuts bytes off.
    return torch.nn.functional.pad(packed, (0, num_bytes - packed.shape[1]))


def _from_bits(packed: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """Unpack bytes ``(rows, bytes)`` into uint8 codes ``(rows, columns)``.

    Eight codes are unpacked at once: their bits are moved apart by halves of them.
    """
    import torch

    if width == 8:
        return packed[:, :columns].contiguous()
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % width))
    eights = padded.view(len(padded), padded.shape[1] // width, width)
    whole = torch.nn.functional.pad(eights, (0, width % 2))
    field = whole.view(torch.int16 if width == 2 else torch.int32).squeeze(2).to(torch.int64)
    field.bitwise_and_((1 << 8 * width) - 1)  # without the copies of the sign
    for lane in (32, 16, 8):
        bits = lane * width // 8
        mask = sum(((1 << bits) - 1) << start for start in range(0, 64, lane))
        field |= field << (lane - bits)
        field &= mask
    return field.view(torch.uint8)[:, :columns]


W2 = Packed(name="w2", letter="2", colour="#efedf5", group_size=64, bits=2, num_codes=4)
W2_G32 = replace(W2, name="w2_g32", letter="i", colour="#d5d3e8", group_size=32)
W2_HQQ = replace(W2, name="w2_hqq", letter="p", colour="#e4e1ef", half_quadratic=True)
W2_G32_HQQ = replace(W2_G32, name="w2_g32_hqq", letter="s", colour="#cecbe4", half_quadratic=True)
W3 = Packed(name="w3", letter="3", colour="#c6c3e0", group_size=64, bits=3, num_codes=8)
W3_G32 = replace(W3, name="w3_g32", letter="j", colour="#a8a3cf", group_size=32)
W3_HQQ = replace(W3, name="w3_hqq", letter="q", colour="#b6b2d7", half_quadratic=True)
W3_G32_HQQ = replace(W3_G32, name="w3_g32_hqq", letter="t", colour="#9e99c9", half_quadratic=True)
W4 = Packed(name="w4", letter="w", colour="#958fc3", group_size=64, bits=4, num_codes=16)
W4_G32 = replace(W4, name="w4_g32", letter="k", colour="#756bb1", group_size=32)
W4_HQQ = replace(W4, name="w4_hqq", letter="r", colour="#857cba", half_quadratic=True)
W4_G32_HQQ = replace(W4_G32, name="w4_g32_hqq", letter="u", colour="#6a51a3", half_quadratic=True)
W8 = Packed(name="w8", letter="W", colour="#4a1486", group_size=64, bits=8, num_codes=256)
W8_G32 = replace(W8, name="w8_g32", letter="K", colour="#3a0d6b", group_size=32)
W8_HQQ = replace(W8, name="w8_hqq", letter="R", colour="#551f91", half_quadratic=True)
W8_G32_HQQ = replace(W8_G32, name="w8_g32_hqq", letter="U", colour="#43117a", half_quadratic=True)
