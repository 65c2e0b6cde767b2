"""Compare an export with the final model.

Every layer with an adapter is compared by itself, where rounding is small beside what could be lost, and the
predictions for all other weights.
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
"""What peft puts before the name of a layer."""
NUM_PROBES = 64
MOST_ERROR = 0.05
"""Largest relative error of a layer's outputs. Rounding takes 0.003 at 4 bits and, as inputs are rounded to 8 bits,
too, 0.009 at 8 (the demo's 210 layers, 2026-11); weights that are decoded wrongly are off by what 4 bits cost, 0.09, or
more."""
LEAST_ADAPTER = 2.0**-9
"""Share of a layer's outputs below which bfloat16, which rounds by as much, need not show its adapter."""
MOST_DIVERGENCE = 0.05
"""Nats a token: three times what rounding takes (0.016 for the demo's merged model), a quarter of the divergence
without any adapter (0.20). One lost adapter does not show in it: of five tried in the demo one gave 0.027, the others
0.016 to 0.017."""


@dataclass(frozen=True)
class Likeness:
    """The divergence (KL) of an export's predictions from the final model's, in nats a token.

    `agreement` is the share of positions at which both predict the same token.
    """

    divergence: float
    agreement: float
    num_positions: int


def compare(
    final: Path, exported: Path, samples: Sequence[Sequence[int]], on_progress: OnWork = ignore_progress
) -> Likeness:
    """Load the final model and then the export, and compare layers and predictions on token ids.

    Raises `StageError` if a layer has lost its adapter or its outputs differ, or the predictions do.
    """
    from peft.tuners.lora import LoraLayer

    model = load(final, on_progress).eval()
    dtype = model.dtype
    added, outputs = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for path, layer in _layers(model).items():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            added[path] = _probes(layer) @ layer.get_delta_weight(adapter).detach().float().cpu().T
            outputs[path] = _outputs(layer.base_layer, dtype) + added[path]
    expected = _log_probabilities(model, samples, on_progress)
    del model, layer
    model = load(exported, on_progress).eval()
    layers = _layers(model)
    for path, output in outputs.items():
        if damage := _damage(output, added[path], _outputs(layers[path], dtype)):
            raise _unlike(f"the exported `{path}` {damage}")
    found = _log_probabilities(model, samples, on_progress)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    if not divergence <= MOST_DIVERGENCE:
        raise _unlike(f"the export diverges by {divergence:.2g} nats a token, more than {MOST_DIVERGENCE:g}")
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return Likeness(divergence, float(agreement), len(expected))


def _unlike(how: str) -> StageError:
    remedy = "serve the final folder as it is, and report this with the run's results.json"
    return StageError("export", f"what was written is not the final model: {how}", remedy)


def _layers(model: Any) -> dict[str, Any]:
    return {path.removeprefix(PEFT_PREFIX): layer for path, layer in model.named_modules()}


def _probes(layer: Any) -> torch.Tensor:
    """Draw inputs ``(NUM_PROBES, in)``, the same for each layer of that size."""
    return torch.randn(NUM_PROBES, layer.in_features, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _outputs(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Compute a layer's outputs ``(NUM_PROBES, out)``."""
    output: torch.Tensor = layer(_probes(layer).to(device(), dtype))
    return output.float().cpu()


def _damage(expected: torch.Tensor, added: torch.Tensor, found: torch.Tensor) -> str | None:
    """Describe what is wrong with a layer's outputs, if anything.

    The share of the adapter that is there is a projection, which rounding hardly touches: it knows nothing of adapters.
    """
    error = found - expected
    off = float(error.norm() / expected.norm())
    if not off <= MOST_ERROR:
        return f"answers {off:.0%} off"
    if added.norm() > LEAST_ADAPTER * expected.norm():
        share = 1 + float((error * added).sum() / added.square().sum())
        if abs(share - 1) > 0.5:
            return f"has {share:.0%} of its adapter"
    return None


@torch.no_grad()
def _log_probabilities(model: Any, samples: Sequence[Sequence[int]], on_progress: OnWork) -> torch.Tensor:
    """Compute log-probabilities ``(tokens, vocabulary)`` of all samples."""
    found = []
    for sample in samples:
        logits = model(torch.tensor([sample], device=device())).logits[0]
        found.append(logits.float().log_softmax(-1).cpu())
        on_progress("comparing predictions", len(found), len(samples))
    return torch.cat(found)
