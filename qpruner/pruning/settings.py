"""The prune section as a model takes it: defaults filled in, and what its family cannot do refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpruner.config.schema import PruneConfig
from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, EXPERT, MLP, UnitKind, family_of
from qpruner.models.layout import num_layers, skeleton
from qpruner.pruning.units import layer_range, plain_counts

GROUPED_MATMUL_MULTIPLE = 8
"""Channels of a stacked expert come in multiples of this: `torch._grouped_mm` (2.13) refuses strides that are no
multiple of 16 bytes."""


def settled(model_config: Any, settings: PruneConfig) -> PruneConfig:
    """Fill in the number of steps and the compensation; keys that have no effect get their defaults."""
    settings = settings.in_effect()
    settings = settings.model_copy(update={"steps": settings.num_steps})
    if settings.compensation is not None:
        return settings
    obstacle = _obstacle(model_config, settings)
    return settings.model_copy(update={"compensation": "none" if obstacle else "least_squares"})


def cuttable_layers(model_config: Any, settings: PruneConfig) -> tuple[int, ...]:
    """List the blocks that may be cut; `UserError` when the model does not have those of the settings."""
    return layer_range(settings.first_layer, settings.last_layer, num_layers(model_config), settings.protected_layers)


def check_settings(model_config: Any, settings: PruneConfig) -> None:
    """Refuse what this model's family cannot do, and blocks that it does not have.

    Raises:
        UserError: Naming the key and the remedy.
    """
    family = family_of(model_config)
    layers, stacked = cuttable_layers(model_config, settings), _stacked(model_config, settings)
    by_linear = [
        f"{key} {value} ({remedy})"
        for key, value, remedy, looks_at_linears in (
            ("importance", settings.importance, "fisher, taylor, magnitude or random", settings.looks_at_linears),
            ("aggregation", settings.aggregation, "element", settings.aggregation == "vector"),
            ("compensation", settings.compensates_by, "none", settings.compensates_by != "none"),
        )
        if looks_at_linears
    ]
    if stacked and by_linear:
        raise UserError(
            f"`prune`: the experts of a {family.model_type} model are stacked in one parameter "
            f"({stacked[0].slices[0].parameter}), which no linear layer holds; what looks at linear layers cannot be "
            f"used: {', '.join(by_linear)}; take the ones in brackets, or `prune.units: [attention]`"
        )
    if any(kind.name == MLP for kind in stacked) and settings.round_to % GROUPED_MATMUL_MULTIPLE:
        raise UserError(
            f"`prune.round_to` must be a multiple of {GROUPED_MATMUL_MULTIPLE} for the experts of a "
            f"{family.model_type} model, got {settings.round_to}: torch's grouped matrix product takes rows of whole "
            "16 bytes only"
        )
    obstacle = None if settings.width_units else _obstacle(model_config, settings)
    if obstacle and settings.compensates_by == "least_squares":
        what, why, remedy = obstacle
        raise UserError(f"`prune.compensation`: {what} cannot have least squares, for {why}: take it out, or {remedy}")
    if settings.uniform:
        _check_uniform(model_config, settings, layers)


def are_alike(model_config: Any) -> bool:
    """Whether all blocks of a model have the same units."""
    first, *others = _unit_kinds(model_config)
    return all(kinds == first for kinds in others)


def _unit_kinds(model_config: Any) -> list[tuple[UnitKind, ...]]:
    family = family_of(model_config)
    return [family.unit_kinds(model_config.per_layer_config[index], index) for index in range(num_layers(model_config))]


def _stacked(model_config: Any, settings: PruneConfig) -> list[UnitKind]:
    """List the kinds of unit that may go, block by block, whose weights no linear layer holds."""
    return [
        kind
        for kinds in _unit_kinds(model_config)
        for kind in kinds
        if kind.name in settings.width_units and (kind.partitions > 1 or kind.name == EXPERT)
    ]


def _obstacle(model_config: Any, settings: PruneConfig) -> tuple[str, str, str] | None:
    """Say what least squares cannot make up for, why, and what to cut instead; None where it can."""
    family = family_of(model_config)
    if _stacked(model_config, settings):
        why = "they are stacked in one parameter"
        return f"experts of a {family.model_type} model", why, "take `prune.units: [attention]`"
    if not settings.width_units and family.residual_factor(model_config) is None:
        why = "behind its MLP there is a norm, or experts stand in its place"
        return f"the whole blocks of a {family.model_type} model", why, f"name `{ATTENTION}` in `prune.units`, too"
    return None


def _check_uniform(model_config: Any, settings: PruneConfig, layers: Sequence[int]) -> None:
    """Refuse what keeps blocks that are all cut alike from being a plain checkpoint."""
    family, count = family_of(model_config), num_layers(model_config)
    if len(layers) < count and settings.width_units:
        raise UserError(
            f"`prune.uniform`: all {count} blocks must be cut alike, but only {len(layers)} may be cut: leave "
            "`prune.first_layer`, `prune.last_layer` and `prune.protected_layers` out, or set `uniform: false`"
        )
    if not are_alike(model_config):
        raise UserError("`prune.uniform`: the blocks of this model are not alike to begin with: set `uniform: false`")
    if ATTENTION in settings.width_units and len(plain_counts(model_config, 0)) < 2:
        raise UserError(
            f"`prune.uniform`: no plain {family.model_type} checkpoint can have fewer heads, for its hidden size must "
            f"be made up of them: set `prune.units: [{MLP}]`, or `uniform: false`"
        )
    if settings.compensates_by != "bias":
        return
    block = skeleton(model_config).get_submodule(family.block_path(0))
    outputs = [block.get_submodule(kind.output_linear) for kind in _unit_kinds(model_config)[0] if kind.output_linear]
    if any(output.bias is None for output in outputs):
        raise UserError(
            f"`prune.compensation`: a plain {family.model_type} checkpoint (`prune.uniform`) has no place for output "
            "biases: use least_squares or none"
        )
