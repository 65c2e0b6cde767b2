"""Build layers whose weight stays packed, and is unpacked in every forward and backward pass.

The codes are frozen. The scales of a `ScaledFormat` can be trained: the parameter `scale_changes`
has a float32 number for each stored one, 0 at the start. A scale becomes ``scale * (1 + change)``
and a minimum ``minimum + scale * change``, rounded to the type in which they are stored; gradients
pass through that rounding unchanged. So a layer computes with exactly what a file holds.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qpruner.quantization.formats.format import Format, ScaledFormat

PIECE = {"cpu": 1 << 21, "other": 1 << 24}
"""Number of weights that are unpacked at a time, to keep the peak of memory low.

On a CPU it also suits the cache: training steps of 4096 x 4096 take 1.6 times as long with the
whole weight as with 2^21 weights, and 1.3 times with 2^18 (2026-11).
"""
LEAST_FACTOR = 0.01
"""What ``1 + change`` of a scale is at least, so that no training turns a scale's sign."""
widens_bfloat16 = False
"""Whether bfloat16 products on a CPU are computed in float32; `qpruner.models.cpu` sets it."""


class PackedLayer(torch.nn.Module):
    """A layer with a packed weight, uint8 ``(rows, row bytes)``, in a model of `compute_dtype`."""

    format: Format
    compute_dtype: torch.dtype
    columns: int
    weight: torch.Tensor
    scale_changes: torch.nn.Parameter | None
    """Float32 ``(rows, groups, num_scales)``; None if the scales are frozen."""

    def _hold(self, layer_format: Format, rows: int, columns: int, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.format = layer_format
        self.compute_dtype = dtype
        self.columns = columns
        row_bytes = layer_format.packed_bytes(1, columns, 0)
        empty = torch.empty(rows, row_bytes, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(empty, requires_grad=False)
        self.register_parameter("scale_changes", None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A change of the model's type leaves the packed weight as it is.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"

    @torch.no_grad()
    def packed_rows(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return packed rows, uint8 ``(rows, row bytes)``, with the present scales."""
        packed = self.weight[rows]
        if self.scale_changes is None:
            return packed
        assert isinstance(self.format, ScaledFormat)
        changes = self.scale_changes[rows]
        scales = self.format.read_scales(packed, self.columns).float()
        # Products and sums alone: every machine computes the same bits of them.
        present = scales[..., :1] * (1 + changes[..., :1]).clamp(min=LEAST_FACTOR)
        if self.format.num_scales == 2:
            minimum = scales[..., 1:] + scales[..., :1] * changes[..., 1:]
            present = torch.cat([present, minimum], dim=2)
        return self.format.write_scales(packed, self.columns, present)

    def unpacked(self, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Unpack rows of the weight, with the present scales."""
        return self.format.unpack({"weight": self.packed_rows(rows)}, self.columns, dtype)

    def gradients_of_changes(
        self, rows: slice | torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Sum the gradient of a weight over its groups, as the gradient of `scale_changes`.

        The derivative of ``scale * (1 + change) * (code - zero)`` by the change is the weight
        itself, without its minimum, over ``1 + change``.

        Args:
            rows: The rows of the weight.
            weight: These rows, unpacked with the present scales, ``(rows, columns)``.
            gradient: The gradient of these rows.

        Returns:
            Float32 ``(rows, groups, num_scales)``.
        """
        assert isinstance(self.format, ScaledFormat)
        assert self.scale_changes is not None
        factors = (1 + self.scale_changes[rows][..., :1]).clamp(min=LEAST_FACTOR)
        groups = (len(weight), -1, self.format.group_size)
        of_weight = (gradient * weight).view(groups)
        of_scale = of_weight.sum(dim=2, keepdim=True, dtype=torch.float32)
        if self.format.num_scales == 1:
            return of_scale / factors
        of_minimum = gradient.view(groups).sum(dim=2, keepdim=True, dtype=torch.float32)
        minimum = self.format.read_scales(self.packed_rows(rows), self.columns)[..., 1:].float()
        scale = self.format.read_scales(self.weight[rows], self.columns)[..., :1].float()
        return torch.cat([(of_scale - minimum * of_minimum) / factors, scale * of_minimum], dim=2)


class PackedLinear(PackedLayer, torch.nn.Linear):
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
        product: torch.Tensor = multiply(input, self.scale_changes, bias, self)
        return product


class PackedEmbedding(PackedLayer, torch.nn.Embedding):
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
        look_up: Any = _LookedUp.apply
        unpacked: torch.Tensor = look_up(input.reshape(-1), self.scale_changes, self)
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


class _Product(torch.autograd.Function):
    """Multiplies ``x (..., columns)`` by the weight of a packed layer, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        changes: torch.Tensor | None,
        bias: torch.Tensor | None,
        layer: PackedLayer,
    ) -> torch.Tensor:
        """Compute ``x @ weight.T + bias``; `changes` are the layer's `scale_changes`."""
        if changes is not None:
            ctx.save_for_backward(x)
        ctx.layer = layer
        flat = _wide(x.reshape(-1, x.shape[-1]))
        num_rows = len(layer.weight)
        out = x.new_empty(flat.shape[0], num_rows)
        for rows, weight in _pieces(layer, flat.dtype):
            part = None if bias is None else bias[rows].to(flat.dtype)
            product = torch.nn.functional.linear(flat, weight, part)
            if len(weight) == num_rows:
                out = product.to(x.dtype)
            else:
                out[:, rows] = product
        return out.view(*x.shape[:-1], num_rows)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        """Compute the gradients of ``x`` and of the changes; sums over pieces are float32."""
        needs_x, needs_changes, _, _ = ctx.needs_input_grad
        if not (needs_x or needs_changes):
            return None, None, None, None
        layer = ctx.layer
        num_rows = len(layer.weight)
        flat = _wide(grad.reshape(-1, num_rows))
        inputs: torch.Tensor | None = None
        if needs_changes:
            (x,) = ctx.saved_tensors
            inputs = _wide(x.reshape(-1, x.shape[-1])).to(flat.dtype)
        changes: list[torch.Tensor] = []
        total: torch.Tensor | None = None
        for rows, weight in _pieces(layer, flat.dtype):
            if inputs is not None:
                of_weight = flat[:, rows].T @ inputs
                changes.append(layer.gradients_of_changes(rows, weight, of_weight))
            if not needs_x:
                continue
            if len(weight) == num_rows:
                total = flat @ weight
            elif total is None:
                total = (flat[:, rows] @ weight).float()
            elif flat.dtype == torch.float32:
                total.addmm_(flat[:, rows], weight)
            else:
                total += flat[:, rows] @ weight
        of_changes = torch.cat(changes) if changes else None
        if total is None:
            return None, of_changes, None, None
        of_x = total.to(grad.dtype).view(*grad.shape[:-1], layer.columns)
        return of_x, of_changes, None, None


class _LookedUp(torch.autograd.Function):
    """Unpacks the rows ``ids`` of a packed embedding, ``(ids, columns)``."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, changes: torch.Tensor | None, layer: PackedLayer
    ) -> torch.Tensor:
        """Unpack the rows; `changes` are the layer's `scale_changes`."""
        ctx.save_for_backward(ids)
        ctx.layer = layer
        return layer.unpacked(ids, layer.compute_dtype)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[None, torch.Tensor | None, None]:
        """Sum the gradients of rows that are looked up several times."""
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (ids,) = ctx.saved_tensors
        layer = ctx.layer
        weight = layer.unpacked(ids, torch.float32)
        of_rows = layer.gradients_of_changes(ids, weight, grad.float())
        total = torch.zeros_like(layer.scale_changes)
        return None, total.index_add_(0, ids, of_rows), None


def _pieces(layer: PackedLayer, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Unpack a few rows at a time, in pieces of about equal size."""
    num_rows = len(layer.weight)
    piece = PIECE.get(layer.weight.device.type, PIECE["other"])
    most_rows = max(1, piece // layer.columns)
    size = math.ceil(num_rows / math.ceil(num_rows / most_rows))
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        yield rows, layer.unpacked(rows, dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    if widens_bfloat16 and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return x.float()
    return x
