"""Compute LoftQ: initial adapters that reduce the quantization error.

The method is algorithm 1 of Li et al., arXiv 2310.08659. It alternates ``Q_t = quantize(W - s B
A)`` and a rank-r SVD of ``W - dequantize(Q_t)``. With one iteration ``Q`` is the plainly quantized
weight. The loop stops at the first iteration that does not reduce the error.

With the Gram matrix of a layer's inputs, quantize is GPTQ where the format has grids, and the
adapter repairs outputs instead of weights. Half of its rank lies along the principal directions of
the inputs, in which a fine-tune learns fast (EVA, Paischer et al., arXiv 2410.07170). The other
half is the SVD of what the outputs still lose.

These are losses after 8 steps on the demo's rows, on its confirmation split (2026-11-29). The model
is SmolLM2-135M, unpruned, at rank 8, with embeddings in q8_0; unpacked it has 1.886. The last two
columns are GPTQ's.

| format | nearest, plain SVD | no start | SVD of the outputs' error | half of each |
|---|---|---|---|---|
| q5_0 | 1.941 | 1.888 | 1.957 | 1.892 |
| q4_0 | 1.961 | | 1.968 | 1.927 |
| nf4 (nearest) | 2.059 | 2.056 | 1.934 | 1.935 |
| w3_hqq | | 2.225 | 2.187 | 2.186 |

The principal directions alone give 1.878, 1.921, 1.931 and 2.225. More iterations fit the
calibration text.
"""

from dataclasses import dataclass, replace

import torch

from qpruner.config.schema import LoraConfig
from qpruner.quantization.formats import Format
from qpruner.quantization.rounding import gram_root, kept, pack

OVERSAMPLING = (
    8  # directions that the randomized SVD computes beyond the rank (Halko et al., arXiv 0909.4061)
)


@dataclass(frozen=True)
class LoftqStart:
    """Holds a packed weight and the initial adapter that approximates its quantization error."""

    packed: dict[str, torch.Tensor]
    lora_a: torch.Tensor  # float32 ``(rank, columns)``
    lora_b: torch.Tensor  # float32 ``(rows, rank)``
    # norm of ``W - dequantize(quantize(W))``; with a Gram matrix of its outputs (`change_size`)
    plain_error: float
    error: float  # norm of ``W - dequantize(Q) - scaling * B A``


def loftq_start(
    weight: torch.Tensor,
    packed: dict[str, torch.Tensor],
    packing: Format,
    lora: LoraConfig,
    seed: int,
    gram: torch.Tensor | None = None,
) -> LoftqStart:
    """Compute the initial adapter of a linear layer W ``(rows, columns)`` with LoftQ.

    With a Gram matrix, formats with grids are rounded by GPTQ, the SVD is of what the outputs lose,
    and the loop stops where that loss does not get smaller.

    Args:
        weight: The weight W, of any floating-point type.
        packed: The tensors that `rounding.pack` made of it.
        packing: The format.
        lora: Rank, iterations and kind of SVD; ``B A`` is scaled by alpha / rank, as in peft.
        seed: Seeds the randomized SVD.
        gram: The Gram matrix of the layer's inputs ``(columns, columns)``.
    """
    rank, scaling = lora.rank, lora.alpha / lora.rank
    weight = weight.detach()
    target = weight.float()
    gram = None if gram is None else gram.to(weight.device, torch.float32)
    no_a = torch.zeros(rank, weight.shape[1], device=weight.device)
    no_b = torch.zeros(weight.shape[0], rank, device=weight.device)
    best: LoftqStart | None = None
    for iteration in range(lora.loftq_iterations):
        if best:
            packed = pack(
                packing, (target - scaling * best.lora_b @ best.lora_a).to(weight.dtype), gram
            )
        residual = target - packing.unpack(packed, weight.shape[1], torch.float32)
        lora_a, lora_b = _factorize(residual, gram, rank, scaling, lora.svd, seed + iteration)
        plain_error, error = _errors(residual, lora_a, scaling * lora_b, gram)
        best = best or LoftqStart(packed, no_a, no_b, plain_error, plain_error)
        if error >= best.error:
            break
        best = replace(best, packed=packed, lora_a=lora_a, lora_b=lora_b, error=error)
    assert best, "there is one iteration at least"
    return best


def _errors(
    residual: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, gram: torch.Tensor | None
) -> tuple[float, float]:
    """Return the norms of the error ``R`` and of ``R - B A``.

    With a Gram matrix they are the norms of what the two make of the outputs.
    """
    if gram is None:
        return float(residual.norm()), float((residual - lora_b @ lora_a).norm())
    outputs = residual @ gram  # the one product of full size
    plain = float((outputs * residual).sum())
    gained = (
        2 * (lora_b * (outputs @ lora_a.T)).sum()
        - ((lora_b.T @ lora_b) * (lora_a @ gram @ lora_a.T)).sum()
    )
    return max(plain, 0.0) ** 0.5, max(plain - float(gained), 0.0) ** 0.5


def _factorize(
    residual: torch.Tensor,
    gram: torch.Tensor | None,
    rank: int,
    scaling: float,
    svd: str,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize `residual` into about ``scaling * B A``.

    Without a Gram matrix this is the best rank-r approximation, with rows of ``A`` of length 1.
    LoftQ splits the singular values evenly; at 8 bits both factors and their gradients are then
    near zero, and the adapter learns slowly (SmolLM2 was worse at 8 than at 4 bits after 16 steps).
    With a Gram matrix the outputs of ``A`` have the mean square of the inputs.
    """
    count = min(rank, *residual.shape)
    if gram is None:
        left = _leading(residual, count, svd, seed)
        rows = left.T @ residual
        lengths = rows.norm(dim=1)
    else:
        wanted = (count - count // 2, svd, seed)
        inputs = kept(
            gram, ("leading", *wanted), lambda: _leading(gram, *wanted)
        )  # (columns, directions)
        along = residual @ inputs
        rest = residual - along @ inputs.T
        repairs = _leading(
            rest @ kept(gram, ("root",), lambda: gram_root(gram)), count // 2, svd, seed
        )
        rows, left = torch.cat([inputs.T, repairs.T @ rest]), torch.cat([along, repairs], dim=1)
        lengths = (((rows @ gram) * rows).sum(dim=1) / gram.diagonal().mean()).clamp(min=0).sqrt()
    lengths = lengths.clamp(min=torch.finfo(torch.float32).tiny)
    lora_a = torch.zeros(rank, residual.shape[1], device=residual.device)
    lora_b = torch.zeros(residual.shape[0], rank, device=residual.device)
    lora_a[:count] = rows / lengths[:, None]
    lora_b[:, :count] = left * lengths / scaling
    return lora_a, lora_b


def _leading(matrix: torch.Tensor, count: int, svd: str, seed: int) -> torch.Tensor:
    """Return the first left singular vectors of a matrix, as columns."""
    if svd == "exact":
        left: torch.Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
        return left[:, :count]
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        left = torch.svd_lowrank(matrix, q=min(count + OVERSAMPLING, *matrix.shape), niter=2)[0]
    return left[:, :count].clone()  # without the others, as it may be kept
