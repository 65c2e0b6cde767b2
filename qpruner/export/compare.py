"""Compare an export with the final model.

The outputs of each layer with an adapter are compared, because they change by more than the rounding error if the
adapter is lost. Predictions are compared to check all other weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpruner.errors import StageError
from qpruner.hf import load
from qpruner.models.loading import OnWork, device, ignore_progress

PEFT_PREFIX = "base_model.model."
"""Prefix that peft adds to the names of layers."""
NUM_PROBES = 64
MOST_ERROR = 0.05
"""Largest allowed relative error of a layer's outputs. Rounding causes 0.003 (the demo's 210 layers in nf4,
2026-11). Wrongly decoded weights cause 0.09 or more."""
LEAST_ADAPTER = 2.0**-9
"""Smallest effect of an adapter that is checked, as a share of the layer's outputs. bfloat16 rounds by as much."""
MOST_DIVERGENCE = 0.05
"""Largest allowed KL divergence in nats per token: three times the rounding error (0.016 for the demo's merged model),
and a quarter of the divergence without all adapters (0.20). A single lost adapter does not exceed the limit:
five that were removed in the demo, one at a time, gave 0.016 to 0.027."""


@dataclass(frozen=True)
class Likeness:
    """KL divergence in nats per token between predictions of an export and of the final model.

    `agreement` is the share of positions at which both predict the same token.
    """

    divergence: float
    agreement: float
    num_positions: int


@dataclass(frozen=True)
class Compared(Likeness):
    """Also the losses of both, in nats per token."""

    loss_before: float
    loss: float


def compare(
    final: Path, exported: Path, samples: Sequence[Sequence[int]], on_progress: OnWork = ignore_progress
) -> Compared:
    """Compare outputs of layers and predictions of the final model and an export; raise `StageError` if they differ."""
    from peft.tuners.lora import LoraLayer

    model = load(final, on_progress).eval()
    dtype = model.dtype
    adapter_outputs, outputs = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for path, layer in _layers(model).items():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            adapter_outputs[path] = _probes(layer) @ layer.get_delta_weight(adapter).detach().float().cpu().T
            outputs[path] = _outputs(layer.base_layer, dtype) + adapter_outputs[path]
    expected = log_probabilities(model, samples, on_progress)
    del model, layer
    model = load(exported, on_progress).eval()
    layers = _layers(model)
    for path, output in outputs.items():
        if damage := _damage(output, adapter_outputs[path], _outputs(layers[path], dtype)):
            raise export_error(f"layer `{path}` {damage}")
    found = log_probabilities(model, samples, on_progress)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    if not divergence <= MOST_DIVERGENCE:
        raise export_error(f"predictions diverge by {divergence:.2g} nats per token, more than {MOST_DIVERGENCE:g}")
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    losses = loss_of(expected, samples), loss_of(found, samples)
    return Compared(divergence, float(agreement), len(expected), *losses)


def loss_of(log_probabilities: torch.Tensor, samples: Sequence[Sequence[int]]) -> float:
    """Compute the mean loss of the tokens that follow others, from ``(tokens, vocabulary)`` of all rows."""
    rows = zip(torch.split_with_sizes(log_probabilities, list(map(len, samples))), samples, strict=True)
    losses = [-row[:-1].gather(1, torch.tensor(list(sample[1:]))[:, None]) for row, sample in rows]
    return float(torch.cat(losses).mean())


def export_error(difference: str) -> StageError:
    """Build the error for an export that differs."""
    remedy = "use the final folder instead, and report this error with the run's results.json"
    return StageError("export", f"the exported model differs from the final model: {difference}", remedy)


def _layers(model: Any) -> dict[str, Any]:
    return {path.removeprefix(PEFT_PREFIX): layer for path, layer in model.named_modules()}


def _probes(layer: Any) -> torch.Tensor:
    """Draw random inputs ``(NUM_PROBES, in)`` that depend on the layer's size only."""
    return torch.randn(NUM_PROBES, layer.in_features, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _outputs(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Compute the outputs ``(NUM_PROBES, out)`` of a layer for the random inputs."""
    output: torch.Tensor = layer(_probes(layer).to(device(), dtype))
    return output.float().cpu()


def _damage(expected: torch.Tensor, added: torch.Tensor, found: torch.Tensor) -> str | None:
    """Describe how a layer's outputs differ from the expected outputs; None if they are close enough.

    `added` is the adapter's part of the expected outputs. The error's projection on `added` is 0 if the export has the
    adapter, -1 if not. Rounding errors hardly change it, because they are independent of the adapter.
    """
    error = found - expected
    relative_error = float(error.norm() / expected.norm())
    if not relative_error <= MOST_ERROR:
        return f"has outputs with an error of {relative_error:.0%}"
    if added.norm() > LEAST_ADAPTER * expected.norm():
        share = 1 + float((error * added).sum() / added.square().sum())
        if abs(share - 1) > 0.5:
            return f"has {share:.0%} of its adapter"
    return None


@torch.no_grad()
def log_probabilities(
    model: Any, samples: Sequence[Sequence[int]], on_progress: OnWork = ignore_progress
) -> torch.Tensor:
    """Compute the log-probabilities ``(tokens, vocabulary)`` of the next token at all positions of all samples."""
    found = []
    for sample in samples:
        logits = model(torch.tensor([sample], device=device())).logits[0]
        found.append(logits.float().log_softmax(-1).cpu())
        on_progress("comparing predictions", len(found), len(samples))
    return torch.cat(found)
