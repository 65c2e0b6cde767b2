"""Compute LoftQ: initial adapters that reduce the quantization error (Li et al., arXiv 2310.08659, algorithm 1).

The algorithm alternates ``Q_t = quantize(W - s B A)`` and a rank-r SVD of ``W - dequantize(Q_t)``. With one iteration
``Q`` is the plainly quantized weight. The loop stops at the first iteration that does not reduce the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qpruner.config.schema import LoraConfig
from qpruner.quantization.formats import Format
from qpruner.quantization.rounding import gram_root, pack

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

    The product ``B A`` is scaled by alpha / rank, as in peft; `seed` seeds the randomized SVD. With the Gram matrix of
    the inputs ``(columns, columns)`` formats with grids are rounded by GPTQ, the SVD is of what the outputs lose, and
    the loop stops where that does not get less.
    """
    rank, scaling = lora.rank, lora.alpha / lora.rank
    weight = weight.detach()
    target = weight.float()
    root = None if gram is None else gram_root(gram.to(weight.device, torch.float32))
    no_a = torch.zeros(rank, weight.shape[1], device=weight.device)
    no_b = torch.zeros(weight.shape[0], rank, device=weight.device)
    best, least = None, 0.0
    for iteration in range(lora.loftq_iterations):
        goal = weight if best is None else (target - scaling * best.lora_b @ best.lora_a).to(weight.dtype)
        packed = pack(packing, goal, gram)
        residual = target - packing.unpack(packed, weight.shape[1], torch.float32)
        if best is None:
            best, least = LoftqStart(packed, no_a, no_b, norm := float(residual.norm()), norm), _size(residual, root)
        lora_a, lora_b = _factorize(residual, root, rank, scaling, lora.svd, seed + iteration)
        left = residual - scaling * lora_b @ lora_a
        if (size := _size(left, root)) >= least:
            break
        best, least = LoftqStart(packed, lora_a, lora_b, best.plain_error, float(left.norm())), size
    assert best is not None, "there is at least one iteration"
    return best


def _size(change: torch.Tensor, root: torch.Tensor | None) -> float:
    """Compute the norm of a change of the weights, or of the change of the outputs that it makes."""
    return float((change if root is None else change @ root).norm())


def _factorize(
    residual: torch.Tensor, root: torch.Tensor | None, rank: int, scaling: float, svd: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize `residual` into ``scaling * B A``, its best rank-r approximation, with rows of ``A`` of length 1.

    Let U be the first r left singular vectors of the residual E. Its best approximation is ``U (U^T E)``. If E changes
    outputs by the norm of ``E R`` with the root R of the Gram matrix, then with the singular vectors of ``E R`` it is
    the best approximation for the outputs, and never worse than none for the weights, because it projects E.

    The LoftQ paper splits the singular values evenly between A and B. At 8 bits the error is small, so both factors and
    their gradients are near zero, and the adapter learns slowly. On SmolLM2 rows of ``A`` then had a median length of
    1.0 at 4 bits and 0.3 at 8 bits, and after 16 steps the 8-bit model had a higher loss than the 4-bit model.
    """
    weighted = residual if root is None else residual @ root
    count = min(rank, *residual.shape)
    if svd == "exact":
        left = torch.linalg.svd(weighted, full_matrices=False)[0]
    else:
        with torch.random.fork_rng(devices=[residual.device] if residual.is_cuda else []):
            torch.manual_seed(seed)
            left = torch.svd_lowrank(weighted, q=min(rank + OVERSAMPLING, *residual.shape), niter=2)[0]
    rows = left[:, :count].T @ residual
    lengths = rows.norm(dim=1, keepdim=True)
    lora_a = torch.zeros(rank, residual.shape[1], device=residual.device)
    lora_b = torch.zeros(residual.shape[0], rank, device=residual.device)
    lora_a[:count] = rows / lengths.clamp(min=torch.finfo(torch.float32).tiny)
    lora_b[:, :count] = left[:, :count] * lengths.T / scaling
    return lora_a, lora_b
