"""Compute LoftQ: an adapter start that restores what quantization lost (Li et al., arXiv 2310.08659, algorithm 1).

Alternate ``Q_t = quantize(W - s B A)`` and a rank-r SVD of ``W - dequantize(Q_t)``; with one iteration the codes are
those of plain quantization and only the adapter differs. An iteration is kept only if the residual shrank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qpruner.config.schema import LoraConfig
from qpruner.quantization.mixed import pack, unpack

OVERSAMPLING = 8
"""Extra directions of the randomized SVD (Halko et al., arXiv 0909.4061)."""


@dataclass(frozen=True)
class LoftqStart:
    """A packed weight and the adapter that starts from its error."""

    packed: dict[str, torch.Tensor]
    lora_a: torch.Tensor
    """``(rank, columns)`` float32, and `lora_b` ``(rows, rank)``."""
    lora_b: torch.Tensor
    plain_error: float
    """``|W - dequantize(quantize(W))|`` (Frobenius), and `error` ``|W - dequantize(Q) - scaling * B A|``."""
    error: float


def loftq_start(weight: torch.Tensor, bits: int, lora: LoraConfig, double_quant: bool, seed: int) -> LoftqStart:
    """Compute the LoftQ start of one linear layer W, ``(rows, columns)``; a pure function of its arguments.

    The scaling s is what peft multiplies ``B A`` with; `seed` seeds the randomized SVD.
    """
    rank, scaling = lora.rank, lora.alpha / lora.rank
    weight = weight.detach()
    target = weight.float()
    packed = pack(weight, bits, double_quant)
    residual = target - unpack(packed, torch.float32)
    plain_error = float(residual.norm())
    no_a = torch.zeros(rank, weight.shape[1], device=weight.device)
    no_b = torch.zeros(weight.shape[0], rank, device=weight.device)
    best = LoftqStart(packed, no_a, no_b, plain_error, plain_error)
    for iteration in range(lora.loftq_iterations):
        if iteration > 0:
            packed = pack((target - scaling * best.lora_b @ best.lora_a).to(weight.dtype), bits, double_quant)
            residual = target - unpack(packed, torch.float32)
        lora_a, lora_b = _factorize(residual, rank, scaling, lora.svd, seed + iteration)
        error = float((residual - scaling * lora_b @ lora_a).norm())
        if error >= best.error:
            break
        best = LoftqStart(packed, lora_a, lora_b, plain_error, error)
    return best


def _factorize(
    residual: torch.Tensor, rank: int, scaling: float, svd: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize so that ``scaling * B A`` is the best rank-r approximation, with rows of ``A`` of length 1.

    LoftQ shares the scale of the product evenly. How fast an adapter learns then depends on the bits: at 8, where the
    error is small, both factors are near zero, and there neither has a gradient. On SmolLM2 rows of ``A`` had a length
    of 1.0 at 4 bits and 0.3 at 8 (medians), and after 16 steps the model at 8 bits was behind itself at 4.
    """
    rank_possible = min(rank, *residual.shape)
    if svd == "exact":
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        right = right.T
    else:
        devices = [residual.device] if residual.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            left, values, right = torch.svd_lowrank(residual, q=min(rank + OVERSAMPLING, *residual.shape), niter=2)
    lora_a = torch.zeros(rank, residual.shape[1], device=residual.device)
    lora_b = torch.zeros(residual.shape[0], rank, device=residual.device)
    lora_a[:rank_possible] = right[:, :rank_possible].T
    lora_b[:, :rank_possible] = left[:, :rank_possible] * values[None, :rank_possible] / scaling
    return lora_a, lora_b
