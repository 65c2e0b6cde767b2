"""Which units stay: the least important go until the asked share of all parameters is gone.

The share is reached to within one MLP channel: attention units are coarse (a key/value head of Llama-2-7B is 1.6
million weights), so they are chosen first and the channels make up the difference.
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


def counts_per_layer(target: int, sizes: UnitSizes, num_layers: int) -> Counts:
    """How many units each block loses when all lose the same share.

    Args:
        target: Parameters to remove in all.
        sizes: The units of one block.
        num_layers: Blocks in the range.

    Raises:
        UserError: If the blocks do not have that many parameters to give.
    """
    attention_size, mlp_size = sizes.parameters["attention"], sizes.parameters["mlp"]
    available = num_layers * sum(sizes.parameters[kind] * sizes.count[kind] for kind in ("attention", "mlp"))
    _check_available(target, available)
    share = target / available
    attention = min(int(share * sizes.count["attention"] + 0.5), sizes.count["attention"] - 1)
    while True:
        channels = round((target - num_layers * attention * attention_size) / mlp_size)
        if channels <= num_layers * (sizes.count["mlp"] - 1):
            break
        attention += 1
        if attention >= sizes.count["attention"]:
            raise _too_much(target, available)
    channels = max(channels, 0)
    each, extra = divmod(channels, num_layers)
    return Counts(attention, tuple(each + (1 if position < extra else 0) for position in range(num_layers)))


def select_per_layer(scores: Mapping[int, Mapping[str, list[float]]], target: int, sizes: UnitSizes) -> Kept:
    """Keep the most important units of each block, the same share everywhere."""
    counts = counts_per_layer(target, sizes, len(scores))
    kept: Kept = {}
    for position, (index, by_kind) in enumerate(scores.items()):
        remove = {"attention": counts.attention, "mlp": counts.mlp[position]}
        kept[index] = {kind: _most_important(values, remove[kind]) for kind, values in by_kind.items()}
    return kept


def select_global(scores: Mapping[int, Mapping[str, list[float]]], target: int, sizes: UnitSizes) -> Kept:
    """Remove the units of least importance per parameter wherever they are; every block keeps one of each kind."""
    available = sum(sizes.parameters[kind] * len(values) for by_kind in scores.values() for kind, values in by_kind.items())
    _check_available(target, available)
    ranked = sorted(
        (value / sizes.parameters[kind], index, kind, unit)
        for index, by_kind in scores.items()
        for kind, values in by_kind.items()
        for unit, value in enumerate(values)
    )
    left = {(index, kind): set(range(len(values))) for index, by_kind in scores.items() for kind, values in by_kind.items()}
    removed = 0
    for _, index, kind, unit in ranked:
        size = sizes.parameters[kind]
        if removed + size > target + sizes.parameters["mlp"] // 2 or len(left[index, kind]) == 1:
            continue
        left[index, kind].remove(unit)
        removed += size
    if target - removed > sizes.parameters["mlp"]:
        raise _too_much(target, available)
    return {
        index: {kind: tuple(sorted(left[index, kind])) for kind in by_kind} for index, by_kind in scores.items()
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
