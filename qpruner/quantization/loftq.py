"""Compute LoftQ: initial adapters that reduce the quantization error (Li et al., arXiv 2310.08659, algorithm 1).

The algorithm alternates ``Q_t = quantize(W - s B A)`` and a rank-r SVD of ``W - dequantize(Q_t)``. With one iteration
``Q`` is the plainly quantized weight. The loop stops at the first iteration that does not reduce the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qpruner.config.schema import LoraConfig
from qpruner.quantization.formats import Format
from qpruner.quantization.rounding import pack

OVERSAMPLING = 8
"""Directions that the randomized SVD computes beyond the rank (Halko et al., arXiv 0909.4061)."""


@dataclass(frozen=True)
class LoftqStart:
    """A packed weight and the initial adapter that approximates its quantization error."""

    packed: dict[str, torch.Tensor]
    lora_a: torch.Tensor
    """Float32 ``(rank, columns)``."""
    lora_b: torch.Tensor
    """Float32 ``(rows, rank)``."""
    plain_error: float
    """Frobenius norm of ``W - dequantize(quantize(W))``."""
    error: float
    """Frobenius norm of ``W - dequantize(Q) - scaling * B A``."""


def loftq_start(
    weight: torch.Tensor, packing: Format, lora: LoraConfig, seed: int, gram: torch.Tensor | None = None
) -> LoftqStart:
    """Compute the packed weight and the initial adapter of one linear layer W ``(rows, columns)`` with LoftQ.

    The product ``B A`` is scaled by alpha / rank, as in peft; `seed` seeds the randomized SVD.
    """
    rank, scaling = lora.rank, lora.alpha / lora.rank
    weight = weight.detach()
    target = weight.float()
    packed = pack(packing, weight, gram)
    residual = target - packing.unpack(packed, weight.shape[1], torch.float32)
    plain_error = float(residual.norm())
    no_a = torch.zeros(rank, weight.shape[1], device=weight.device)
    no_b = torch.zeros(weight.shape[0], rank, device=weight.device)
    best = LoftqStart(packed, no_a, no_b, plain_error, plain_error)
    for iteration in range(lora.loftq_iterations):
        if iteration > 0:
            packed = pack(packing, (target - scaling * best.lora_b @ best.lora_a).to(weight.dtype), gram)
            residual = target - packing.unpack(packed, weight.shape[1], torch.float32)
        lora_a, lora_b = _factorize(residual, rank, scaling, lora.svd, seed + iteration)
        error = float((residual - scaling * lora_b @ lora_a).norm())
        if error >= best.error:
            break
        best = LoftqStart(packed, lora_a, lora_b, plain_error, error)
    return best


def _factorize(
    residual: torch.Tensor, rank: int, scaling: float, svd: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize `residual` into ``scaling * B A``, its best rank-r approximation, with rows of ``A`` of length 1.

    The LoftQ paper splits the singular values evenly between A and B. At 8 bits the error is small, so both factors and
    their gradients are near zero, and the adapter learns slowly. On SmolLM2 rows of ``A`` then had a median length of
    1.0 at 4 bits and 0.3 at 8 bits, and after 16 steps the 8-bit model had a higher loss than the 4-bit model.
    """
    rank_possible = min(rank, *residual.shape)
    if svd == "exact":
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng(devices=[residual.device] if residual.is_cuda else []):
            torch.manual_seed(seed)
            left, values, right = torch.svd_lowrank(residual, q=min(rank + OVERSAMPLING, *residual.shape), niter=2)
    lora_a = torch.zeros(rank, residual.shape[1], device=residual.device)
    lora_b = torch.zeros(residual.shape[0], rank, device=residual.device)
    lora_a[:rank_possible] = right[:, :rank_possible].T
    lora_b[:, :rank_possible] = left[:, :rank_possible] * values[None, :rank_possible] / scaling
    return lora_a, lora_b
