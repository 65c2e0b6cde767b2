"""Compare the predictions of an export with those of the final model.

The export is computed by transformers or by the program that serves it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from qpruner.errors import StageError
from qpruner.hf import load
from qpruner.models.loading import OnWork, device, ignore_progress
from qpruner.quantization.formats.layers import PackedEmbedding

Rows = Sequence[Sequence[int]]  # token ids
PEFT_PREFIX = "base_model.model."  # prefix that peft adds to the names of layers
MOST_PERPLEXITY = 0.01
MOST_LOST = 0.25
"""Largest allowed change of the perplexity, and of the adapter's effect as a share of it (0.01 in
the demo in llama.cpp, 2026-11-29); both beyond three standard errors."""
TOP = 64  # number of the likeliest tokens whose probabilities a server gives
LEAST_LIMIT = 5e-4  # nats per token by which any server may diverge
MOST_ROUNDING = 3.0  # largest divergence of a server, in units of that of rounding


@dataclass(frozen=True)
class Compared:
    """How close the predictions of an export are to those of the model it was made from.

    Losses are in nats.
    """

    divergence: float  # KL divergence in nats per token
    agreement: float  # share of positions at which both predict the same token
    num_positions: int
    loss_before: float
    loss: float
    by: str  # the program that computed the export's predictions


class Predictions(NamedTuple):
    """Log-probabilities after each token of a row but the last, as numpy arrays."""

    ids: Any  # (tokens - 1, TOP): the likeliest tokens in order
    likeliest: Any  # as `ids`
    actual: Any  # (tokens - 1,): of the next token


def compare(
    final: Path, exported: Path, samples: Rows, on_progress: OnWork = ignore_progress
) -> Compared:
    """Compare predictions of an export in transformers with those of the final model.

    See `compare_served` for the limits.
    """
    model = load(exported, on_progress).eval()
    predictions = [_predicted(model, sample) for sample in samples]
    del model

    program = f"transformers {transformers.__version__}"
    return compare_served(final, samples, predictions, program, in_its_type, on_progress)


def _predicted(model: Any, sample: Sequence[int]) -> Predictions:
    log_probabilities = next_log_probabilities(model, sample)
    likeliest, ids = log_probabilities.topk(TOP)
    actual = of_next_tokens(log_probabilities, sample)
    return Predictions(ids.numpy(), likeliest.numpy(), actual.numpy())


@contextmanager
def in_its_type(model: Any) -> Iterator[None]:
    """Let a model compute in its own type, and not in float32."""
    _compute_in(model, model.config.dtype)
    try:
        yield
    finally:
        _compute_in(model, torch.float32)  # exact, because the weights came in the model's type


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for layer in model.modules():
        if isinstance(layer, PackedEmbedding):
            layer.compute_dtype = dtype


class _Row(NamedTuple):
    """What is compared at the positions of one row, in float32.

    Distributions have the shape ``(positions, TOP + 1)``: the likeliest tokens of the served
    model, then the rest; the others have ``(positions,)``.
    """

    exact: Tensor  # of the checkpoint
    served: Tensor
    rounded: Tensor  # of the checkpoint that rounds as the server does
    without: Tensor  # of the checkpoint without its adapter
    loss_before: Tensor
    loss: Tensor
    agrees: Tensor  # 1 where both predict the same token


def compare_served(
    checkpoint: Path,
    samples: Rows,
    served: Iterable[Predictions],
    by: str,
    rounding: Callable[[nn.Module], AbstractContextManager[None]],
    on_progress: OnWork = ignore_progress,
) -> Compared:
    """Compare what a program predicts with the checkpoint in transformers, computed in float32.

    Args:
        checkpoint: The folder that the served files were written from.
        samples: Rows of token ids.
        served: The predictions of the program for each row.
        by: The name of the program, for messages.
        rounding: Makes a model round as the program does, while the context is open.
        on_progress: Is called with the number of rows that are done.

    Raises:
        StageError: The predictions differ by more than rounding explains, or the adapter has
            another effect.
    """
    # transformers forbids `model.float()` for packed layers; ours compute in the type of their
    # inputs.
    model = nn.Module.float(load(checkpoint, on_progress).eval())
    rows = []
    for sample, predictions in zip(samples, served, strict=True):
        rows.append(_compare_row(model, sample, predictions, rounding))
        on_progress("comparing predictions", len(rows), len(samples))
    positions = _Row._make(map(torch.cat, zip(*rows, strict=True)))

    divergence = _divergence(positions.exact, positions.served)
    limit = max(LEAST_LIMIT, MOST_ROUNDING * _divergence(positions.exact, positions.rounded))
    if not divergence <= limit:
        raise export_error(
            f"predictions in {by} diverge by {divergence:.2g} nats per token, more than {limit:.2g}"
        )
    _check_adapter(positions, by)
    loss_before, loss = _checked_losses(positions, by)
    return Compared(
        divergence=divergence,
        agreement=float(positions.agrees.mean()),
        num_positions=len(positions.exact),
        loss_before=loss_before,
        loss=loss,
        by=by,
    )


def _compare_row(
    model: Any,
    sample: Sequence[int],
    predictions: Predictions,
    rounding: Callable[[nn.Module], AbstractContextManager[None]],
) -> _Row:
    from peft.tuners.tuners_utils import BaseTunerLayer

    ids, likeliest, actual = map(torch.from_numpy, predictions)

    def predicted() -> Tensor:
        return _with_rest(next_log_probabilities(model, sample).gather(1, ids))

    all_tokens = next_log_probabilities(model, sample)
    exact = _with_rest(all_tokens.gather(1, ids))
    with rounding(model):
        rounded = predicted()

    without = exact
    adapters = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if adapters:
        for adapter in adapters:
            adapter.enable_adapters(False)
        without = predicted()
        for adapter in adapters:
            adapter.enable_adapters(True)

    # Of two equal logits either may come first.
    agrees = exact[:, 0] == all_tokens.amax(1)
    return _Row(
        exact=exact,
        served=_with_rest(likeliest.float()),
        rounded=rounded,
        without=without,
        loss_before=-of_next_tokens(all_tokens, sample),
        loss=-actual.float(),
        agrees=agrees.float(),
    )


def _check_adapter(positions: _Row, by: str) -> None:
    """Raise `StageError` if the program shows another effect of the adapter."""
    # Errors of rounding do not point along the effect.
    effect = positions.exact - positions.without
    lost = ((positions.exact - positions.served) * effect).sum(-1)
    size = effect.square().sum()
    error = lost.square().sum().sqrt()
    if abs(lost.sum()) > MOST_LOST * size + 3 * error:
        shown = float(1 - lost.sum() / size)
        raise export_error(f"{by} shows {shown:.0%} of its adapter's effect")


def _checked_losses(positions: _Row, by: str) -> tuple[float, float]:
    """Return the mean losses before the export and after it; raise `StageError` if they differ."""
    losses = torch.stack([positions.loss_before, positions.loss], 1)
    loss_before, loss = losses.mean(0).tolist()
    stderr = float((losses[:, 0] - losses[:, 1]).std()) / len(losses) ** 0.5
    difference = loss - loss_before
    if not abs(difference) <= math.log1p(MOST_PERPLEXITY) + 3 * stderr:
        change = math.expm1(difference)
        raise export_error(
            f"the perplexity in {by} differs by {change:+.1%}, more than {MOST_PERPLEXITY:.0%}"
        )
    return loss_before, loss


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Append the log-probability of all other tokens in sum."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-9)
    return torch.cat([log_probabilities, rest.log()], -1)


def _divergence(expected: Tensor, found: Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def loss_of(model: Any, samples: Rows) -> float:
    """Compute the mean loss of the tokens that follow others, in nats."""
    losses = [-of_next_tokens(next_log_probabilities(model, row), row) for row in samples]
    return float(torch.cat(losses).mean())


def of_next_tokens(log_probabilities: Tensor, sample: Sequence[int]) -> Tensor:
    """Take the log-probabilities of the tokens that follow others, float32 ``(tokens - 1,)``."""
    tokens = torch.tensor(sample[1:])
    return log_probabilities.gather(1, tokens[:, None])[:, 0]


def export_error(difference: str) -> StageError:
    """Build the error for an export that differs."""
    remedy = "use the final folder instead, and report this error with the run's results.json"
    return StageError(
        "export", f"the exported model differs from the final model: {difference}", remedy
    )


@torch.no_grad()
def next_log_probabilities(model: Any, sample: Sequence[int]) -> Tensor:
    """Compute the log-probabilities of the token after each token of a sample but the last.

    They are float32 ``(tokens - 1, vocabulary)``, on the CPU.
    """
    logits: Tensor = model(torch.tensor([sample], device=device())).logits[0, :-1]
    return logits.float().log_softmax(-1).cpu()
