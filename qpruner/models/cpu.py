"""Run bfloat16 at the speed of float32 on CPUs without bfloat16 instructions.

On such a CPU torch is slow: a layer of 1024 x 576 x 1536 with its backward pass took 1.7 s on an
AVX2 core (0.05 s in float32; torch 2.13), with AVX-512 without BF16, where oneDNN emulates the
instructions, 195 ms (46 ms). This module computes products and attention in float32, and rounds to
bfloat16 as the instructions do. Weights stay bfloat16.

Training steps of two Llama blocks of 576 x 1536, on one core of an AMD EPYC whose instructions
`ONEDNN_MAX_CPU_ISA` limits (torch 2.13, 2026-12-03), take 1.52 s with AVX-512, and 0.69 s with
this module (1.01 s if it left attention in bfloat16). With AVX2 they take 10.1 s, and 0.78 s with
it. With all instructions, where it does nothing, they take 0.40 s.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from qpruner.quantization.formats import layers

WORTH_WIDENING = 4
"""Rows from which products are faster in float32.

1456 x 8 x 1536 takes 2 ms (82 in bfloat16), 1 x 576 x 1536 takes 0.23 ms (0.19).
"""


@functools.cache
def install() -> None:
    """Compute bfloat16 products in float32 if this CPU has no instructions for them.

    This holds for the whole process; further calls do nothing.
    """
    if not has_bfloat16():
        widen()


def has_bfloat16() -> bool:
    """Return True if torch uses bfloat16 instructions of this CPU, or if torch cannot tell."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    is_emulated = torch.cpu._is_avx512_supported() and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not is_emulated


def widen() -> None:
    """Make products, packed layers and transformers' attention compute in float32 on a CPU."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    aten: Any = torch.ops.aten
    layers.widens_bfloat16 = True
    kernels: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _KEPT.append(kernels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for product in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            kernels.impl(product.default, _widened(product.out), "CPU")
    AttentionInterface.register(
        "sdpa", functools.partial(_widened_attention, sdpa_attention_forward)
    )


_KEPT: list[torch.library.Library] = []
"""Keeps libraries alive, because torch removes the kernels of a deleted library."""


def _widened(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a kernel that computes a product of bfloat16 tensors in float32."""

    def kernel(*tensors: torch.Tensor, **scalars: Any) -> torch.Tensor:
        first = tensors[-2]  # of the two factors
        is_bfloat16 = all(tensor.dtype is torch.bfloat16 for tensor in tensors)
        if not is_bfloat16 or first.shape[-2] < WORTH_WIDENING:
            return product(*tensors, **scalars, out=first.new_empty(0))
        wide_tensors = [tensor.float() for tensor in tensors]
        out = first.new_empty(0, dtype=torch.float32)
        return product(*wide_tensors, **scalars, out=out).to(torch.bfloat16)

    return kernel


def _widened_attention(
    attention: Callable[..., Any],
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    **options: Any,
) -> Any:
    if query.dtype is not torch.bfloat16 or query.device.type != "cpu":
        return attention(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    # The other results, as the weights of attention, are passed on.
    attended, *rest = attention(
        module, query.float(), key.float(), value.float(), attention_mask, **options
    )
    return attended.to(query.dtype), *rest
