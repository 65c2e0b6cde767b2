"""bfloat16 at the speed of float32 on CPUs that have no instructions for it.

torch gives bfloat16 products to oneDNN where the CPU has AVX-512, which emulates them where that is all it has;
elsewhere, so on most laptops, it computes them itself. A layer of 1024 x 576 x 1536 on an AVX2 core took 206 ms instead
of 21 in float32, and 1.7 s instead of 0.05 with its backward pass (torch 2.13, 2026-11-26); on a core with AVX-512 but
not its bfloat16 67 ms instead of 14, and 195 instead of 46 (2026-11-27). Products and attention are computed in float32
there and rounded at their end, as those instructions do too; weights, activations and checkpoints stay bfloat16.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

WORTH_WIDENING = 16
"""Smallest dimension of a product at which converting its factors pays."""


@functools.cache
def install() -> None:
    """Compute bfloat16 products in float32 in this process if its CPU can do no better; idempotent."""
    if not has_bfloat16():
        widen()


def has_bfloat16() -> bool:
    """Whether torch leaves bfloat16 products to instructions of this CPU that are made for them, or does not say."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    is_emulated = torch.cpu._is_avx512_supported() and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not is_emulated


def widen() -> None:
    """Replace this process's CPU kernels of matrix products, and transformers' call of torch's attention."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    aten: Any = torch.ops.aten
    kernels = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _KEPT.append(kernels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for product in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            kernels.impl(product.default, _widened(product.out), "CPU")  # type: ignore[no-untyped-call]
    AttentionInterface.register("sdpa", functools.partial(_widened_attention, sdpa_attention_forward))


_KEPT: list[torch.library.Library] = []
"""A library's kernels go with it."""


def _widened(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def kernel(*tensors: torch.Tensor, **scalars: Any) -> torch.Tensor:
        first, second = tensors[-2:]
        smallest = min(*first.shape[-2:], second.shape[-1])
        if smallest < WORTH_WIDENING or any(tensor.dtype is not torch.bfloat16 for tensor in tensors):
            return product(*tensors, **scalars, out=first.new_empty(0))
        wide = product(*(tensor.float() for tensor in tensors), **scalars, out=first.new_empty(0, dtype=torch.float32))
        return wide.to(torch.bfloat16)

    return kernel


def _widened_attention(
    attention: Callable[..., Any], module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> Any:
    if query.dtype is not torch.bfloat16 or query.device.type != "cpu":
        return attention(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    attended, *rest = attention(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return attended.to(query.dtype), *rest
