"""The prune step: score, select, cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.calibration import Rows
from qpruner.config import PruneConfig
from qpruner.models.layout import num_layers
from qpruner.pruning.importance import magnitude, taylor
from qpruner.pruning.selection import Kept, layer_range, select_global, select_per_layer, unit_sizes
from qpruner.pruning.surgery import cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pruned:
    """The cut model and what it kept."""

    model: PreTrainedModel
    kept: Kept
    parameters_before: int
    parameters_after: int


def prune(
    model: PreTrainedModel, settings: PruneConfig, rows: Rows, pad_id: int, batch_size: int | None = None
) -> Pruned:
    """Cut the least important units until `settings.rate` of all parameters is gone.

    Args:
        model: Dense model; unusable afterwards unless the rate is 0.
        settings: Rate, criterion, selection, range of blocks.
        rows: Encoded calibration samples (Taylor only).
        pad_id: Padding token.
        batch_size: Samples a backward pass; None takes all.
    """
    before = num_parameters(model)
    if settings.rate == 0:
        return Pruned(model, {}, before, before)
    layers = layer_range(settings.first_layer, settings.last_layer, num_layers(model.config))
    sizes = unit_sizes(model, layers[0])
    if settings.importance == "magnitude":
        scores = magnitude(model, layers)
    else:
        scores = taylor(model, layers, rows, pad_id, batch_size)
    values = {index: {kind: score.tolist() for kind, score in kinds.items()} for index, kinds in scores.items()}
    select = select_per_layer if settings.selection == "per_layer" else select_global
    kept = select(values, round(settings.rate * before), sizes, settings.round_to)
    smaller = cut(model, kept)
    return Pruned(smaller, kept, before, num_parameters(smaller))


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
