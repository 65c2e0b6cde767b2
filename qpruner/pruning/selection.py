"""Which units stay: the least important go until the asked share of all parameters is gone.

The share is reached to within one MLP channel, or `round_to` of them: attention units are coarse (a key/value head of
Llama-2-7B with its query head is 2.1 million weights), so they are chosen first and channels make up the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpruner.errors import UserError
from qpruner.models.structure import family_of

Kept = dict[int, dict[str, tuple[int, ...]]]
"""Block index -> kind of unit -> indices of the units that stay, ascending."""


@dataclass(frozen=True)
class UnitSizes:
    """Parameters of one unit and units of one block, by kind."""

    parameters: Mapping[str, int]
    count: Mapping[str, int]


@dataclass(frozen=True)
class Counts:
    """Units to remove from every block of the range: the same number of attention units, channels by block."""

    attention: int
    mlp: tuple[int, ...]


def unit_sizes(model: Any, layer: int) -> UnitSizes:
    """Sizes of a block's units, biases included; the model may be on the meta device."""
    family = family_of(model.config)
    kinds = family.unit_kinds(model.config.per_layer_config[layer])
    parameters = {}
    for kind in kinds:
        parameters[kind.name] = 0
        for item in kind.slices:
            linear = model.get_submodule(f"{family.block_path(layer)}.{item.linear}")
            parameters[kind.name] += linear.weight.shape[1 - item.dim] * item.width
            parameters[kind.name] += item.width if item.dim == 0 and linear.bias is not None else 0
    return UnitSizes(parameters, {kind.name: kind.num_units for kind in kinds})


def layer_range(first: int, last: int, num_layers: int) -> range:
    """The blocks that may be cut; `UserError` when the range is out of bounds."""
    end = last if last >= 0 else num_layers + last
    if not 0 <= first <= end < num_layers:
        raise UserError(
            f"`prune.first_layer` {first} and `prune.last_layer` {last} must be a range within the model's "
            f"{num_layers} blocks, 0 to {num_layers - 1}"
        )
    return range(first, end + 1)


def counts_per_layer(target: int, sizes: UnitSizes, num_layers: int, round_to: int = 1) -> Counts:
    """How many units each block loses when all lose the same share.

    Args:
        target: Parameters to remove in all.
        sizes: The units of one block.
        num_layers: Blocks in the range.
        round_to: Channels that stay in a block are a multiple of this.

    Raises:
        UserError: If the blocks do not have that many parameters to give.
    """
    heads, channels = sizes.count["attention"], sizes.count["mlp"]
    most_bundles, fewest_bundles = channels // round_to, 1
    if most_bundles < 1:
        raise UserError(f"`prune.round_to` must be at most the {channels} MLP channels of a block, got {round_to}")
    available = num_layers * sum(sizes.parameters[kind] * sizes.count[kind] for kind in ("attention", "mlp"))
    _check_available(target, available)
    # Attention units are coarse: no more of them than the target has room for.
    room = target // (num_layers * sizes.parameters["attention"])
    for attention in range(min(int(target / available * heads + 0.5), heads - 1, room), heads):
        channels_out = (target - num_layers * attention * sizes.parameters["attention"]) / sizes.parameters["mlp"]
        bundles_left = round((num_layers * channels - channels_out) / round_to)
        if bundles_left >= num_layers * fewest_bundles:
            break
    else:
        raise _too_much(target, available)
    if channels_out < -round_to:
        raise _too_much(target, available)
    each, extra = divmod(min(bundles_left, num_layers * most_bundles), num_layers)
    stays = tuple((each + (1 if position < extra else 0)) * round_to for position in range(num_layers))
    return Counts(attention, tuple(channels - kept for kept in stays))


def select_per_layer(
    scores: Mapping[int, Mapping[str, list[float]]], target: int, sizes: UnitSizes, round_to: int = 1
) -> Kept:
    """Keep the most important units of each block, the same share everywhere."""
    counts = counts_per_layer(target, sizes, len(scores), round_to)
    kept: Kept = {}
    for position, (index, by_kind) in enumerate(scores.items()):
        remove = {"attention": counts.attention, "mlp": counts.mlp[position]}
        kept[index] = {kind: _most_important(values, remove[kind]) for kind, values in by_kind.items()}
    return kept


def select_global(
    scores: Mapping[int, Mapping[str, list[float]]], target: int, sizes: UnitSizes, round_to: int = 1
) -> Kept:
    """Remove the bundles of least importance per parameter wherever they are; every block keeps one of each kind.

    A bundle is a key/value group, or `round_to` channels of one block that are neighbours in its ranking.
    """
    width = {"attention": 1, "mlp": round_to}
    bundles: dict[tuple[int, str], list[list[int]]] = {}
    ranked: list[tuple[float, int, str, int]] = []
    for index, by_kind in scores.items():
        for kind, values in by_kind.items():
            order = sorted(range(len(values)), key=lambda unit: (values[unit], unit))
            # The first bundle takes what is left over, so that what stays is always a multiple.
            first = len(order) % width[kind] or width[kind]
            starts = [0, *range(first, len(order), width[kind])]
            parts = [order[a:b] for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]
            bundles[index, kind] = parts
            for position, part in enumerate(parts[:-1]):
                size = sizes.parameters[kind] * len(part)
                ranked.append((sum(values[unit] for unit in part) / size, index, kind, position))
    _check_available(target, sum(sizes.parameters[kind] * len(v) for by in scores.values() for kind, v in by.items()))
    gone: dict[tuple[int, str], int] = dict.fromkeys(bundles, 0)
    removed, slack = 0, sizes.parameters["mlp"] * round_to // 2
    for _, index, kind, position in sorted(ranked):
        size = sizes.parameters[kind] * len(bundles[index, kind][position])
        # Bundles of a block go in order; one that was too large for what is left keeps its successors.
        if removed + size <= target + slack and gone[index, kind] == position:
            gone[index, kind] += 1
            removed += size
    if target - removed > sizes.parameters["mlp"] * round_to:
        raise _too_much(target, removed)
    return {
        index: {
            kind: tuple(sorted(unit for part in bundles[index, kind][gone[index, kind] :] for unit in part))
            for kind in by_kind
        }
        for index, by_kind in scores.items()
    }


def _most_important(values: list[float], num_removed: int) -> tuple[int, ...]:
    order = sorted(range(len(values)), key=lambda unit: (values[unit], unit))
    return tuple(sorted(order[num_removed:]))


def _check_available(target: int, available: int) -> None:
    if target >= available:
        raise _too_much(target, available)


def _too_much(target: int, available: int) -> UserError:
    return UserError(
        f"`prune.rate` asks for {target:,} parameters to go, but the blocks of the layer range have {available:,} and "
        "each must keep at least one unit: lower the rate or widen `prune.first_layer` / `prune.last_layer`"
    )
