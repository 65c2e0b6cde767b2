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

OVERSAMPLING = 8
"""Directions that the randomized SVD computes beyond the rank (Halko et al., arXiv 0909.4061)."""


@dataclass(frozen=True)
class LoftqStart:
    """Holds a packed weight and the initial adapter that approximates its quantization error."""

    packed: dict[str, torch.Tensor]
    lora_a: torch.Tensor  # float32 ``(rank, columns)``
    lora_b: torch.Tensor  # float32 ``(rows, rank)``
    plain_error: float
    """Norm of ``W - dequantize(quantize(W))``; with a Gram matrix, of what it makes of outputs."""
    error: float
    """The same norm of ``W - dequantize(Q) - scaling * B A``."""


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
    rows, columns = weight.shape
    scaling = lora.alpha / lora.rank
    weight = weight.detach()
    target = weight.float()
    if gram is not None:
        gram = gram.to(weight.device, torch.float32)

    best: LoftqStart | None = None
    for iteration in range(lora.loftq_iterations):
        if best:
            to_pack = target - scaling * best.lora_b @ best.lora_a
            packed = pack(packing, to_pack.to(weight.dtype), gram)
        residual = target - packing.unpack(packed, columns, torch.float32)
        lora_a, lora_b = _factorize(residual, gram, lora, seed + iteration)
        plain_error, error = _errors(residual, lora_a, scaling * lora_b, gram)
        if best is None:
            best = LoftqStart(
                packed=packed,
                lora_a=torch.zeros(lora.rank, columns, device=weight.device),
                lora_b=torch.zeros(rows, lora.rank, device=weight.device),
                plain_error=plain_error,
                error=plain_error,
            )
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
    shared = (lora_b * (outputs @ lora_a.T)).sum()
    added = ((lora_b.T @ lora_b) * (lora_a @ gram @ lora_a.T)).sum()
    left = plain - float(2 * shared - added)
    return max(plain, 0.0) ** 0.5, max(left, 0.0) ** 0.5


def _factorize(
    residual: torch.Tensor, gram: torch.Tensor | None, lora: LoraConfig, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize `residual` into about ``scaling * B A``, where scaling is alpha / rank.

    Without a Gram matrix this is the best rank-r approximation, with rows of ``A`` of length 1.
    LoftQ splits the singular values evenly; at 8 bits both factors and their gradients are then
    near zero, and the adapter learns slowly (SmolLM2 was worse at 8 than at 4 bits after 16 steps).
    With a Gram matrix the outputs of ``A`` have the mean square of the inputs.
    """
    rank = lora.rank
    count = min(rank, *residual.shape)  # of directions, which a small layer has fewer of
    if gram is None:
        left = _leading(residual, count, lora.svd, seed)
        rows = left.T @ residual
        lengths = rows.norm(dim=1)
    else:
        left, rows = _factors_of_outputs(residual, gram, count, lora.svd, seed)
        squares = ((rows @ gram) * rows).sum(dim=1)
        lengths = (squares / gram.diagonal().mean()).clamp(min=0).sqrt()
    lengths = lengths.clamp(min=torch.finfo(torch.float32).tiny)

    lora_a = torch.zeros(rank, residual.shape[1], device=residual.device)
    lora_b = torch.zeros(residual.shape[0], rank, device=residual.device)
    lora_a[:count] = rows / lengths[:, None]
    lora_b[:, :count] = left * lengths / (lora.alpha / rank)
    return lora_a, lora_b


def _factors_of_outputs(
    residual: torch.Tensor, gram: torch.Tensor, count: int, svd: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors ``(rows, count)`` and ``(count, columns)`` of a product near the residual.

    Half are the principal directions of the inputs, half the SVD of what outputs still lose.
    """
    num_inputs = count - count // 2
    inputs = kept(
        gram, ("leading", num_inputs, svd, seed), lambda: _leading(gram, num_inputs, svd, seed)
    )  # (columns, directions)
    along = residual @ inputs
    rest = residual - along @ inputs.T

    root = kept(gram, ("root",), lambda: gram_root(gram))
    repairs = _leading(rest @ root, count // 2, svd, seed)
    return torch.cat([along, repairs], dim=1), torch.cat([inputs.T, repairs.T @ rest])


def _leading(matrix: torch.Tensor, count: int, svd: str, seed: int) -> torch.Tensor:
    """Return the first left singular vectors of a matrix, as columns."""
    if svd == "exact":
        left: torch.Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
        return left[:, :count]
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        left = torch.svd_lowrank(matrix, q=min(count + OVERSAMPLING, *matrix.shape), niter=2)[0]
    return left[:, :count].clone()  # without the others, as it may be kept
