"""Freeze layers whose weight stays packed, and is unpacked in every forward and backward pass."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qpruner.quantization.formats.format import Format

PIECE = {"cpu": 1 << 21, "other": 1 << 24}
"""Number of weights that are unpacked at a time, to keep the peak of memory low.

On a CPU it also suits the cache: training steps of 4096 x 4096 take 1.6 times as long with the
whole weight as with 2^21 weights, and 1.3 times with 2^18 (2026-11).
"""
widens_bfloat16 = False
"""Whether bfloat16 products on a CPU are computed in float32; `qpruner.models.cpu` sets it."""


class _Packed(torch.nn.Module):
    """A layer with a packed weight, uint8 ``(rows, row bytes)``, in a model of `compute_dtype`."""

    format: Format
    compute_dtype: torch.dtype
    weight: torch.Tensor

    def _hold(self, layer_format: Format, rows: int, columns: int, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.format = layer_format
        self.compute_dtype = dtype
        row_bytes = layer_format.packed_bytes(1, columns, 0)
        empty = torch.empty(rows, row_bytes, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(empty, requires_grad=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A change of the model's type leaves the packed weight as it is.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


class PackedLinear(_Packed, torch.nn.Linear):
    """A linear layer with a packed weight, which computes in the type of its input.

    Its adapter has the type `compute_dtype`.
    """

    def __init__(self, layer_format: Format, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        self._hold(layer_format, linear.out_features, linear.in_features, dtype)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        bias: torch.nn.Parameter | None = None
        if linear.bias is not None:
            empty = torch.empty(linear.out_features, dtype=dtype)
            bias = torch.nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute ``input @ weight.T + bias``."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        multiply: Any = _Product.apply
        product: torch.Tensor = multiply(input, self.weight, bias, self.unpacked)
        return product

    def unpacked(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Unpack rows of the weight."""
        return self.format.unpack({"weight": weight}, self.in_features, dtype)


class PackedEmbedding(_Packed, torch.nn.Embedding):
    """An embedding with a packed weight, of which it unpacks the rows that are looked up.

    They are multiplied by `scalar_embed_scale`, as transformers' class for Gemma does.
    """

    scalar_embed_scale: float | None = None

    def __init__(self, layer_format: Format, table: torch.nn.Embedding, dtype: torch.dtype) -> None:
        self._hold(layer_format, table.num_embeddings, table.embedding_dim, dtype)
        self.scalar_embed_scale = getattr(table, "scalar_embed_scale", None)
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.padding_idx = None
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up rows, and unpack them in `compute_dtype`."""
        rows = self.weight.index_select(0, input.reshape(-1))
        unpacked = self.format.unpack({"weight": rows}, self.embedding_dim, self.compute_dtype)
        embedded = unpacked.view(*input.shape, self.embedding_dim)
        if self.scalar_embed_scale is None:
            return embedded
        factor = torch.tensor(self.scalar_embed_scale, dtype=embedded.dtype, device="cpu")
        return embedded * float(factor)


def packed_module(
    layer_format: Format, module: torch.nn.Module, dtype: torch.dtype
) -> PackedLinear | PackedEmbedding:
    """Build a layer of the size of a linear layer or embedding, with empty packed weights."""
    if isinstance(module, torch.nn.Linear):
        return PackedLinear(layer_format, module, dtype)
    assert isinstance(module, torch.nn.Embedding), type(module)
    return PackedEmbedding(layer_format, module, dtype)


Unpack = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
Gradients = tuple[torch.Tensor | None, None, None, None]


class _Product(torch.autograd.Function):
    """Multiplies ``x (..., columns)`` by a packed weight, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, unpack: Unpack
    ) -> torch.Tensor:
        """Compute ``x @ weight.T + bias``, where `unpack` makes rows of the weight."""
        ctx.save_for_backward(packed)
        ctx.unpack = unpack
        ctx.columns = x.shape[-1]
        flat = _wide(x.reshape(-1, x.shape[-1]))
        out = x.new_empty(flat.shape[0], len(packed))
        for rows, weight in _pieces(packed, flat.dtype, ctx.columns, unpack):
            part = None if bias is None else bias[rows].to(flat.dtype)
            product = torch.nn.functional.linear(flat, weight, part)
            if len(weight) == len(packed):
                out = product.to(x.dtype)
            else:
                out[:, rows] = product
        return out.view(*x.shape[:-1], len(packed))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:  # type: ignore[override]
        """Compute the gradient of ``x``; the sum over pieces is float32."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (packed,) = ctx.saved_tensors
        flat = _wide(grad.reshape(-1, len(packed)))
        total: torch.Tensor | None = None
        for rows, weight in _pieces(packed, flat.dtype, ctx.columns, ctx.unpack):
            if len(weight) == len(packed):
                total = flat @ weight
            elif total is None:
                total = (flat[:, rows] @ weight).float()
            elif flat.dtype == torch.float32:
                total.addmm_(flat[:, rows], weight)
            else:
                total += flat[:, rows] @ weight
        assert total is not None
        return total.to(grad.dtype).view(*grad.shape[:-1], ctx.columns), None, None, None


def _pieces(
    packed: torch.Tensor, dtype: torch.dtype, columns: int, unpack: Unpack
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Unpack a few rows at a time, in pieces of about equal size."""
    most_rows = max(1, PIECE.get(packed.device.type, PIECE["other"]) // columns)
    num_pieces = math.ceil(len(packed) / most_rows)
    size = math.ceil(len(packed) / num_pieces)
    for start in range(0, len(packed), size):
        yield slice(start, start + size), unpack(packed[start : start + size], dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    if widens_bfloat16 and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return x.float()
    return x
