"""The prune section as a model takes it: defaults filled in, and what its family cannot do refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.config.schema import PruneConfig
from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, EXPERT, MLP, UnitKind, family_of
from qpruner.models.layout import skeleton
from qpruner.pruning.units import plain_counts

GROUPED_MATMUL_MULTIPLE = 8
"""Channels of a stacked expert come in multiples of this: `torch._grouped_mm` (2.13) refuses strides that are no
multiple of 16 bytes."""


@dataclass(frozen=True)
class Cut:
    """A planned cut: the settings as this model takes them, and the config that is expected after it."""

    settings: PruneConfig
    expected: Any


def settled(model_config: Any, settings: PruneConfig) -> PruneConfig:
    """Fill in the number of steps and the compensation; keys that have no effect get their defaults."""
    settings = settings.in_effect()
    settings = settings.model_copy(update={"steps": settings.num_steps})
    if settings.compensation is not None:
        return settings
    obstacle = _obstacle(model_config, settings)
    return settings.model_copy(update={"compensation": "none" if obstacle else "least_squares"})


def cuttable_layers(model_config: Any, settings: PruneConfig) -> tuple[int, ...]:
    """List the blocks that may be cut.

    Raises:
        UserError: If the range or a protected block is out of bounds, or nothing is left.
    """
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
                f"`prune.protected_layers`: there is no block {index}; the model has {count}, 0 to {count - 1}"
            )
    kept_whole = {index % count for index in settings.protected_layers}
    layers = tuple(index for index in range(first, end + 1) if index not in kept_whole)
    if not layers:
        raise UserError(
            "`prune.protected_layers` leaves no block that may be cut: name fewer, or widen `prune.first_layer` / "
            "`prune.last_layer`"
        )
    return layers


def check_settings(model_config: Any, settings: PruneConfig) -> None:
    """Refuse what this model's family cannot do, and blocks that it does not have.

    Raises:
        UserError: Naming the key and the remedy.
    """
    name = family_of(model_config).model_type
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
            f"`prune`: the experts of a {name} model are stacked in one parameter ({stacked[0].slices[0].parameter}), "
            "which no linear layer holds; what looks at linear layers cannot be used: "
            f"{', '.join(by_linear)}; take the ones in brackets, or `prune.units: [attention]`"
        )
    if any(kind.name == MLP for kind in stacked) and settings.round_to % GROUPED_MATMUL_MULTIPLE:
        raise UserError(
            f"`prune.round_to` must be a multiple of {GROUPED_MATMUL_MULTIPLE} for the experts of a {name} model, got "
            f"{settings.round_to}: torch's grouped matrix product takes rows of whole 16 bytes only"
        )
    if not settings.width_units and settings.compensates_by == "least_squares" and _obstacle(model_config, settings):
        raise UserError(
            f"`prune.compensation`: the whole blocks of a {name} model cannot have least squares, for behind its MLP "
            "there is a norm, or experts stand in its place: take it out, or name `attention` in `prune.units`, too"
        )
    if settings.uniform:
        _check_uniform(model_config, settings, layers)


def are_alike(model_config: Any) -> bool:
    """Whether all blocks of a model have the same units."""
    first, *others = _unit_kinds(model_config)
    return all(kinds == first for kinds in others)


def _unit_kinds(model_config: Any) -> list[tuple[UnitKind, ...]]:
    family, count = family_of(model_config), model_config.num_hidden_layers
    return [family.unit_kinds(model_config.per_layer_config[index], index) for index in range(count)]


def _stacked(model_config: Any, settings: PruneConfig) -> list[UnitKind]:
    """List the kinds of unit that may go, block by block, whose weights no linear layer holds."""
    kinds = [kind for of_block in _unit_kinds(model_config) for kind in of_block if kind.name in settings.width_units]
    return [kind for kind in kinds if kind.partitions > 1 or kind.name == EXPERT]


def _obstacle(model_config: Any, settings: PruneConfig) -> bool:
    """Whether least squares cannot make up for what goes."""
    is_behind_norm = family_of(model_config).residual_factor(model_config) is None
    return is_behind_norm if not settings.width_units else bool(_stacked(model_config, settings))


def _check_uniform(model_config: Any, settings: PruneConfig, layers: Sequence[int]) -> None:
    """Refuse what keeps blocks that are all cut alike from being a plain checkpoint."""
    family, count = family_of(model_config), model_config.num_hidden_layers
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
    if settings.compensates_by == "bias":
        block = skeleton(model_config).get_submodule(family.block_path(0))
        outputs = [kind.output_linear for kind in _unit_kinds(model_config)[0] if kind.output_linear]
        if any(block.get_submodule(path).bias is None for path in outputs):
            raise UserError(
                f"`prune.compensation`: a plain {family.model_type} checkpoint (`prune.uniform`) has no place for "
                "output biases: use least_squares or none"
            )
