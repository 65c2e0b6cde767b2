"""Describe a number format: the bytes it takes, what it can hold, how it packs and unpacks.

No torch is imported here, because configuration, plans and reports read the formats too.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "dict[str, torch.Tensor]"
Capability = tuple[int, int]  # CUDA compute capability of a GPU
# Unpacking 4096 x 4096 weights of q3_k on one core took 42 ms at 2**17, 28 at 2**19, 34 at 2**22
# (2026-11-29).
WEIGHTS_PER_THREAD = 2**19
WEIGHTS_PER_GPU = 2**24
NARROWER = (-2, -1, 0, 1, 2)  # steps by which `GridFormat.fit` narrows a group's range


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """A format in which the weights of a group may be stored.

    Each file of this folder makes one or more. `pack` turns a weight into one uint8 tensor `weight`
    ``(rows, row bytes)`` in which every row can be unpacked alone, so that one layer and one
    embedding serve all formats. A format that needs other tensors or another layer overrides
    `empty_layer` and `fill`, and names the tensors in `more_tensors`.
    """

    name: str
    bits: float  # bits of one weight, without scales
    letter: str  # the one character that stands for the format in a printed plan
    colour: str  # the colour of the format in plots, as `#rrggbb`
    version: int = 1  # to be raised when the same weight gives other tensors
    package: str = ""
    """Python package that packs the weights, besides torch; empty if none is needed."""
    extra: str = ""
    """Extra of qpruner that installs `package`; empty if qpruner requires the package."""
    doubled: str = ""
    """The format with quantized scales that `quantize.double_quant` takes in its place, if any."""
    is_packed: bool = True  # whether weights are stored in other tensors than in the checkpoint
    holds_embeddings: bool = True  # whether single rows of an embedding can be unpacked
    more_tensors: tuple[str, ...] = ()
    """Tensors that `pack` returns besides `weight`; they are saved, and `fill` takes them."""
    uncounted: tuple[str, ...] = ()
    """Those of `more_tensors` that hold no weights and are not counted as bytes."""
    peft_flag: str = ""
    """Attribute that must be true on a model, so that peft puts its LoRA layer on such layers."""

    @property
    def ggml_type(self) -> str:
        """The type in GGUF files that has the same rows of bytes; empty if llama.cpp has none."""
        return ""

    @cached_property
    def order(self) -> tuple[int, str]:
        """The key by which formats are sorted: the bytes of a large weight, then the name."""
        return self.packed_bytes(4096, 4096, 2), self.name

    @property
    def ink(self) -> str:
        """The colour of text on `colour`: black or white, with a WCAG contrast of at least 4.5."""

        def linear(at: int) -> float:
            channel = int(self.colour[at : at + 2], 16) / 255
            return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

        luminance = 0.2126 * linear(1) + 0.7152 * linear(3) + 0.0722 * linear(5)
        return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"

    @abstractmethod
    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """Count the bytes of a packed weight ``(rows, columns)``.

        `element_bytes` is what an unpacked weight takes.
        """

    def refusal(self, columns: int, capability: Capability | None) -> str | None:
        """Say why a weight with this many columns cannot be packed; return None if it can.

        `capability` is that of the GPU, or None for a CPU.
        """
        return None

    def missing(self) -> str | None:
        """Say which package to install; return None if the format can be used."""
        if not self.package or importlib.util.find_spec(self.package):
            return None
        return f'the package {self.package} is missing: run `pip install "qpruner[{self.extra}]"`'

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> Tensors:
        """Pack a weight ``(rows, columns)`` of any floating-point type by rounding to nearest."""

    @abstractmethod
    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Compute the weight ``(rows, columns)``, or some rows of it, from packed tensors."""

    def empty_layer(self, linear: Any, dtype: torch.dtype) -> torch.nn.Module:
        """Build a frozen layer of the size of a linear layer or embedding.

        Its packed weights are empty, and on torch's default device.
        """
        from qpruner.quantization.formats.layers import packed_module

        return packed_module(self, linear, dtype)

    def fill(self, layer: Any, tensors: Tensors) -> None:
        """Put packed tensors into a layer that `empty_layer` has built."""
        import torch

        layer.weight = torch.nn.Parameter(tensors["weight"], requires_grad=False)


@dataclass(frozen=True, kw_only=True)
class GridFormat(Format):
    """A format whose groups of columns round to evenly spaced grids: ``scale * (code - zero)``.

    A format may give another meaning to `zero` in all these functions.

    With its grid, `qpruner.quantization.rounding` can also round by the inputs of the layer (GPTQ);
    all other formats round to nearest.
    """

    group_size: int | None  # columns that share one grid; None if it is a whole row
    num_codes: int  # codes are integers from 0 to `num_codes` - 1

    @property
    def takes_gptq(self) -> bool:
        """Whether GPTQ rounds this format.

        At 8 bits GPTQ saves only 0.3 % of the error of SmolLM2's outputs (2026-11-30).
        """
        return self.bits < 8

    @abstractmethod
    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose scale and zero, float32 ``(..., 1)``, for float32 weights ``(..., group)``."""

    def fit(
        self, weight: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose a grid as `grid` does, but for the least sum of squared errors times `importance`.

        Grids are tried that are up to two steps narrower or wider than the group's range. Each is
        fitted to the codes that it gives, by least squares.

        Args:
            weight: Float32 ``(..., group)``.
            importance: Float32 ``(group,)``.
        """
        import torch

        range_scale, range_zero = self.grid(weight)
        best = range_scale, range_zero
        least: torch.Tensor | None = None
        for steps in NARROWER:
            share = 1 - steps / (self.num_codes - 1)
            zero = self.narrowed(range_scale, range_zero, share)
            codes = self.codes(weight, range_scale * share, zero)
            fitted = self.regression(weight, codes, range_scale * share, zero, importance)
            error = self.values(codes, *fitted).sub_(weight).square_().mul_(importance)
            error = error.sum(dim=-1, keepdim=True)
            if least is None:
                best, least = fitted, error
                continue
            is_better = error < least
            best = (
                torch.where(is_better, fitted[0], best[0]),
                torch.where(is_better, fitted[1], best[1]),
            )
            least = torch.minimum(error, least)
        return best

    def narrowed(self, scale: torch.Tensor, zero: torch.Tensor, share: float) -> torch.Tensor:
        """Return the zero of a grid whose scale is multiplied by `share`."""
        return zero

    def regression(
        self,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        importance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit a grid to codes by least squares, each weight times `importance`.

        Scale and zero are those of the codes; what codes do not determine stays.
        """
        import torch

        levels = codes - zero
        weighted = levels * importance
        square = (weighted * levels).sum(dim=-1, keepdim=True)
        product = (weighted * weight).sum(dim=-1, keepdim=True)
        return torch.where(square > 0, product / square, scale), zero

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round float32 weights ``(..., group)`` to the nearest codes of a grid.

        A scale of 0 gives `zero`.
        """
        return (weight * inverse_of(scale) + zero).round_().clamp_(0, self.num_codes - 1)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Compute the weights that codes stand for once the grid is stored."""
        return scale * (codes - zero)

    @abstractmethod
    def store(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Tensors:
        """Pack uint8 codes ``(rows, columns)`` into bytes, with their grids.

        `scales` and `zeros` are float32 ``(rows, groups)``.
        """

    def pack(self, weight: torch.Tensor) -> Tensors:
        """Pack a weight ``(rows, columns)`` by rounding to nearest.

        The last group of a row may be shorter than the others.
        """
        import torch

        parts = [self._round(weight[rows].detach().float()) for rows in row_parts(weight)]
        codes, scales, zeros = zip(*parts, strict=True)
        return self.store(torch.cat(codes), torch.cat(scales), torch.cat(zeros))

    def _round(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes, scales and zeros as `store` takes them."""
        import torch

        rows, columns = weight.shape
        size = self.group_size or columns
        whole = columns - columns % size
        grouped = weight[:, :whole].reshape(rows, whole // size, size)
        rest = weight[:, whole:].unsqueeze(1)  # the shorter group

        codes = []
        scales = []
        zeros = []
        for part in (grouped, rest):
            if not part.numel():
                continue
            scale, zero = self.grid(part)
            codes.append(self.codes(part, scale, zero).to(torch.uint8).flatten(1))
            scales.append(scale.flatten(1))
            zeros.append(zero.flatten(1))
        return torch.cat(codes, dim=1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1)


@dataclass(frozen=True, kw_only=True)
class ScaledFormat(GridFormat):
    """A format whose stored scales can be trained while the codes stay as they are.

    The tensor `weight` of `pack` holds, for every group of a row, a scale and in some formats a
    minimum, so a weight is ``scale * (code - zero)`` or ``scale * code + minimum``.
    """

    group_size: int
    num_scales: int = 1  # numbers stored for a group: a scale, or a scale and a minimum
    scale_type: str  # type of torch in which they are stored

    @abstractmethod
    def read_scales(self, packed: torch.Tensor, columns: int) -> torch.Tensor:
        """Read scales and minima as they are stored.

        Args:
            packed: Rows of a packed weight, uint8 ``(rows, row bytes)``.
            columns: The columns of the weight.

        Returns:
            ``(rows, groups, num_scales)`` of type `scale_type`.
        """

    @abstractmethod
    def write_scales(
        self, packed: torch.Tensor, columns: int, scales: torch.Tensor
    ) -> torch.Tensor:
        """Return packed rows with other scales, rounded to `scale_type`.

        The arguments are those of `read_scales`; `scales` has the shape of its result.
        """


def inverse_of(scale: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """Compute ``steps / scale``, and 0 where the scale is 0."""
    return (steps / scale).masked_fill_(scale == 0, 0)


def over_127(largest: torch.Tensor) -> torch.Tensor:
    """Divide by a tensor, because GPUs divide by a plain number less exactly."""
    return largest / largest.new_full(largest.shape, 127)


def row_parts(weight: torch.Tensor) -> Iterator[slice]:
    """Cut the rows of a weight ``(rows, columns)`` into parts that fit the cache in float32."""
    import torch

    rows, columns = weight.shape
    num_weights = WEIGHTS_PER_GPU
    if weight.device.type == "cpu":
        num_weights = WEIGHTS_PER_THREAD * torch.get_num_threads()
    step = max(1, num_weights // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def decode_rows(
    packed: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Unpack uint8 ``(rows, row bytes)`` to ``(rows, columns)`` of type `dtype`.

    `decode` makes float32 of some rows, which is rounded once.
    """
    weight = packed.new_empty(len(packed), columns, dtype=dtype)
    for rows in row_parts(weight):
        part = weight[rows]
        part.copy_(decode(packed[rows]).view_as(part))
    return weight


def read_as(field: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Read uint8 columns of packed rows, at any offset, as numbers of another type."""
    import torch

    return field.clone(memory_format=torch.contiguous_format).view(dtype)
