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

from qpruner.errors import StageError
from qpruner.hf import load
from qpruner.models.loading import OnWork, device, ignore_progress
from qpruner.quantization.formats.layers import PackedEmbedding

Rows = Sequence[Sequence[int]]  # token ids
PEFT_PREFIX = "base_model.model."  # prefix that peft adds to the names of layers
MOST_PERPLEXITY, MOST_LOST = 0.01, 0.25
"""Largest allowed change of the perplexity, and of the adapter's effect as a share of it (0.01 in
the demo in llama.cpp, 2026-11-29); both beyond three standard errors."""
TOP = 64  # number of the likeliest tokens whose probabilities a server gives
LEAST_LIMIT, MOST_ROUNDING = (
    5e-4,
    3.0,
)  # largest divergence of a server in nats per token, and in units of rounding


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
    model, found = load(exported, on_progress).eval(), []
    for sample in samples:
        values = log_probabilities(model, sample)[:-1]
        likeliest, ids = values.topk(TOP)
        actual = values.gather(1, torch.tensor(sample[1:])[:, None])[:, 0]
        found.append(Predictions(ids.numpy(), likeliest.numpy(), actual.numpy()))
    del model
    return compare_served(
        final, samples, found, f"transformers {transformers.__version__}", in_its_type, on_progress
    )


@contextmanager
def in_its_type(model: Any) -> Iterator[None]:
    """Let a model compute in its own type, and not in float32."""
    exact = {
        parameter: parameter.data
        for parameter in model.parameters()
        if parameter.is_floating_point()
    }
    tables = [layer for layer in model.modules() if isinstance(layer, PackedEmbedding)]
    for parameter, data in exact.items():
        parameter.data = data.to(model.config.dtype)
    for table in tables:
        table.compute_dtype = model.config.dtype
    try:
        yield
    finally:
        for parameter, data in exact.items():
            parameter.data = data
        for table in tables:
            table.compute_dtype = torch.float32


def compare_served(
    checkpoint: Path,
    samples: Rows,
    served: Iterable[Predictions],
    by: str,
    rounding: Callable[[torch.nn.Module], AbstractContextManager[None]],
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    # transformers forbids `model.float()` for packed layers; ours compute in the type of their
    # inputs.
    model = torch.nn.Module.float(load(checkpoint, on_progress).eval())
    adapters = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]

    def predicted(sample: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        return _with_rest(log_probabilities(model, sample)[:-1].gather(1, ids))

    rows = []
    for done, (sample, found) in enumerate(zip(samples, served, strict=True), 1):
        ids, likeliest, actual = map(torch.from_numpy, found)
        all_before = log_probabilities(model, sample)[:-1]
        before = without = _with_rest(all_before.gather(1, ids))
        with rounding(model):
            rounded = predicted(sample, ids)
        if adapters:
            for adapter in adapters:
                adapter.enable_adapters(False)
            without = predicted(sample, ids)
            for adapter in adapters:
                adapter.enable_adapters(True)
        losses = -torch.stack(
            [all_before.gather(1, torch.tensor(sample[1:])[:, None])[:, 0], actual.float()], 1
        )
        is_same = before[:, 0] == all_before.amax(1)  # of two equal logits either may come first
        rows.append(
            (before, _with_rest(likeliest.float()), rounded, without, losses, is_same.float())
        )
        on_progress("comparing predictions", done, len(samples))
    before, after, rounded, without, losses, is_same = (
        torch.cat(each) for each in zip(*rows, strict=True)
    )
    limit = max(LEAST_LIMIT, MOST_ROUNDING * _divergence(before, rounded))
    if not (divergence := _divergence(before, after)) <= limit:
        raise export_error(
            f"predictions in {by} diverge by {divergence:.2g} nats per token, more than {limit:.2g}"
        )
    # Errors of rounding do not point along the effect.
    effect = before - without
    lost, size = ((before - after) * effect).sum(-1), effect.square().sum()
    if abs(lost.sum()) > MOST_LOST * size + 3 * lost.square().sum().sqrt():
        raise export_error(f"{by} shows {float(1 - lost.sum() / size):.0%} of its adapter's effect")
    loss_before, loss = losses.mean(0).tolist()
    stderr = float((losses[:, 0] - losses[:, 1]).std()) / len(losses) ** 0.5
    if not abs(loss - loss_before) <= math.log1p(MOST_PERPLEXITY) + 3 * stderr:
        change = math.expm1(loss - loss_before)
        raise export_error(
            f"the perplexity in {by} differs by {change:+.1%}, more than {MOST_PERPLEXITY:.0%}"
        )
    return Compared(divergence, float(is_same.mean()), len(before), loss_before, loss, by)


def _with_rest(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Append the log-probability of all other tokens in sum."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-9)
    return torch.cat([log_probabilities, rest.log()], -1)


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def loss_of(model: Any, samples: Rows) -> float:
    """Compute the mean loss of the tokens that follow others."""
    losses = (
        -log_probabilities(model, each)[:-1].gather(1, torch.tensor(each[1:])[:, None])
        for each in samples
    )
    return float(torch.cat(list(losses)).mean())


def export_error(difference: str) -> StageError:
    """Build the error for an export that differs."""
    remedy = "use the final folder instead, and report this error with the run's results.json"
    return StageError(
        "export", f"the exported model differs from the final model: {difference}", remedy
    )


@torch.no_grad()
def log_probabilities(model: Any, sample: Sequence[int]) -> torch.Tensor:
    """Compute the log-probabilities of the next token after every token of a sample.

    They are float32 ``(tokens, vocabulary)``, on the CPU.
    """
    logits: torch.Tensor = model(torch.tensor([sample], device=device())).logits[0]
    return logits.float().log_softmax(-1).cpu()
