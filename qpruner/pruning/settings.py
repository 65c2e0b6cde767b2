"""Fill in the defaults of the `prune` section for a model, and check that the model supports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.config.schema import PruneConfig
from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, MLP, family_of
from qpruner.pruning.units import plain_counts, unit_kinds_of


@dataclass(frozen=True)
class Cut:
    """Hold the settings of a cut, and the config of its model, expected or as it was made."""

    settings: PruneConfig
    model_config: Any


def settled(model_config: Any, settings: PruneConfig) -> PruneConfig:
    """Fill in `steps` and `compensation` if they are null, and reset keys without effect."""
    settings = settings.in_effect()
    filled: dict[str, Any] = {"steps": settings.num_steps}
    if settings.compensation is None:
        can = settings.width_units or _compensates_blocks(model_config)
        filled["compensation"] = "least_squares" if can else "none"
    return settings.model_copy(update=filled)


def _compensates_blocks(model_config: Any) -> bool:
    """Return True if other blocks can make up for dropped ones."""
    return family_of(model_config).residual_factor(model_config) is not None


def cuttable_layers(model_config: Any, settings: PruneConfig) -> tuple[int, ...]:
    """List the blocks that may be cut; raise `UserError` if a named block does not exist."""
    count = model_config.num_hidden_layers
    first = settings.first_layer
    last = settings.last_layer
    end = last if last >= 0 else count + last
    if not 0 <= first <= end < count:
        raise UserError(
            f"`prune.first_layer` {first} and `prune.last_layer` {last} must be a range within the "
            f"model's {count} blocks, 0 to {count - 1}"
        )
    return tuple(range(first, end + 1))


def check_settings(model_config: Any, settings: PruneConfig) -> None:
    """Raise `UserError` for settings that the model does not support."""
    layers = cuttable_layers(model_config, settings)
    solves_blocks = settings.compensates_by == "least_squares" and not settings.width_units
    if solves_blocks and not _compensates_blocks(model_config):
        raise UserError(
            "`prune.compensation`: least_squares cannot make up for removed blocks of a "
            f"{family_of(model_config).model_type} model, which has a norm after the MLP: remove "
            "the key, or add attention to `prune.units`"
        )
    if settings.uniform:
        _check_uniform(model_config, settings, layers)


def are_alike(model_config: Any) -> bool:
    """Return True if all blocks of a model have units of the same kinds, numbers and shapes."""
    first, *others = unit_kinds_of(model_config, range(model_config.num_hidden_layers)).values()
    return all(kinds == first for kinds in others)


def _check_uniform(model_config: Any, settings: PruneConfig, layers: Sequence[int]) -> None:
    """Refuse settings and models with which `prune.uniform` cannot be kept.

    The cut model must load without qpruner.
    """
    count = model_config.num_hidden_layers
    if len(layers) < count and settings.width_units:
        raise UserError(
            f"`prune.uniform`: all {count} blocks must be cut alike, but only {len(layers)} may be "
            "cut: leave `prune.first_layer` and `prune.last_layer` out, or set `uniform: false`"
        )
    if not are_alike(model_config):
        raise UserError(
            "`prune.uniform`: the blocks of the base model already differ: set `uniform: false`"
        )
    if not _fits_uniform(model_config, settings):
        raise UserError(
            f"`prune.uniform`: without qpruner a {family_of(model_config).model_type} model cannot "
            "have fewer heads, because all heads together are as wide as its hidden states: set "
            f"`prune.units: [{MLP}]`, or `uniform: false`"
        )


def _fits_uniform(model_config: Any, settings: PruneConfig) -> bool:
    """Return True if blocks load without qpruner after all of them have lost as many units.

    A single attention unit always stays, so that its number does not change.
    """
    if ATTENTION not in settings.width_units:
        return True
    (attention,) = unit_kinds_of(model_config, [0], [ATTENTION])[0]
    return attention.num_units == 1 or len(plain_counts(model_config, 0)) > 1


def uniform_remedy(model_config: Any, settings: PruneConfig) -> str:
    """Say what to set, all of it at once, so that the blocks of a cut have the same widths."""
    others = []
    if settings.selection == "global":
        others.append("`prune.selection: per_layer`")
    if not _fits_uniform(model_config, settings):
        others.append(f"`prune.units: [{MLP}]`")

    listed = ", ".join(["`prune.uniform: true`", *others[:-1]])
    if others:
        listed += f" and {others[-1]}"
    return f"set {listed}, so that all blocks have the same widths"
