"""Fill in the defaults of the `prune` section for a model, and refuse settings that the model does not support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import PruneConfig
from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, MLP, family_of
from qpruner.models.layout import skeleton
from qpruner.pruning.units import plain_counts, unit_kinds_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """A planned cut: the settings with the defaults for a model, and the expected model config after the cut."""

    settings: PruneConfig
    expected: Any


def settled(model_config: Any, settings: PruneConfig) -> PruneConfig:
    """Fill in `steps` and `compensation` if they are null, and reset keys without effect to their defaults."""
    settings = settings.in_effect()
    settings = settings.model_copy(update={"steps": settings.num_steps})
    if settings.compensation is not None:
        return settings
    cannot = not settings.width_units and family_of(model_config).residual_factor(model_config) is None
    return settings.model_copy(update={"compensation": "none" if cannot else "least_squares"})


def cuttable_layers(model_config: Any, settings: PruneConfig) -> tuple[int, ...]:
    """List the blocks that may be cut; raise `UserError` if a named block does not exist, or no block is left."""
    count, first, last = model_config.num_hidden_layers, settings.first_layer, settings.last_layer
    end = last if last >= 0 else count + last
    if not 0 <= first <= end < count:
        raise UserError(
            f"`prune.first_layer` {first} and `prune.last_layer` {last} must be a range within the model's {count} "
            f"blocks, 0 to {count - 1}"
        )
    for index in settings.protected_layers:
        if not -count <= index < count:
            raise UserError(
                f"`prune.protected_layers`: there is no block {index}; the model has blocks 0 to {count - 1}"
            )
    kept_whole = {index % count for index in settings.protected_layers}
    layers = tuple(index for index in range(first, end + 1) if index not in kept_whole)
    if not layers:
        raise UserError(
            "`prune.protected_layers` leaves no block that may be cut: name fewer blocks there, or allow more by "
            "`prune.first_layer` and `prune.last_layer`"
        )
    return layers


def check_settings(model_config: Any, settings: PruneConfig) -> None:
    """Raise `UserError`, which names key and remedy, for settings that the model does not support."""
    family, layers = family_of(model_config), cuttable_layers(model_config, settings)
    solves_blocks = settings.compensates_by == "least_squares" and not settings.width_units
    if solves_blocks and family.residual_factor(model_config) is None:
        raise UserError(
            f"`prune.compensation`: least_squares cannot make up for removed blocks of a {family.model_type} model, "
            "which has a norm after the MLP: remove the key, or add attention to `prune.units`"
        )
    if settings.uniform:
        _check_uniform(model_config, settings, layers)


def new_biases(model: PreTrainedModel, settings: PruneConfig, layers: Sequence[int]) -> list[str]:
    """List the output projections to which compensation adds a bias that the family does not have."""
    if settings.compensates_by != "bias":
        return []
    block = model.get_submodule(family_of(model.config).block_path(layers[0]))
    (kinds,) = unit_kinds_of(model.config, layers[:1], settings.width_units).values()
    linears = (kind.output_linear for kind in kinds)
    return sorted(linear for linear in linears if block.get_submodule(linear).bias is None)


def are_alike(model_config: Any) -> bool:
    """Return True if all blocks of a model have units of the same kinds, numbers and shapes."""
    first, *others = unit_kinds_of(model_config, range(model_config.num_hidden_layers)).values()
    return all(kinds == first for kinds in others)


def _check_uniform(model_config: Any, settings: PruneConfig, layers: Sequence[int]) -> None:
    """Refuse settings and models with which `prune.uniform` cannot give a checkpoint that loads without qpruner."""
    family, count = family_of(model_config), model_config.num_hidden_layers
    if len(layers) < count and settings.width_units:
        raise UserError(
            f"`prune.uniform`: all {count} blocks must be cut alike, but only {len(layers)} may be cut: leave "
            "`prune.first_layer`, `prune.last_layer` and `prune.protected_layers` out, or set `uniform: false`"
        )
    if not are_alike(model_config):
        raise UserError("`prune.uniform`: the blocks of the base model already differ: set `uniform: false`")
    if ATTENTION in settings.width_units and len(plain_counts(model_config, 0)) < 2:
        raise UserError(
            f"`prune.uniform`: without qpruner a {family.model_type} model cannot have fewer heads, because all heads "
            f"together are as wide as its hidden states: set `prune.units: [{MLP}]`, or `uniform: false`"
        )
    if new_biases(skeleton(model_config), settings, layers):
        raise UserError(
            f"`prune.compensation`: without qpruner (`prune.uniform`) a {family.model_type} model cannot have output "
            "biases: use least_squares or none"
        )
