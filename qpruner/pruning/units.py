"""List the units of a model that may be cut: their blocks, their sizes, and how many must stay."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, MLP, UnitKind, family_of, owned_parameters

Kept = dict[
    int, dict[str, tuple[int, ...]]
]  # block index -> kind of unit -> indices of the units that stay, ascending

Values = Mapping[
    int, Mapping[str, Sequence[float]]
]  # block index -> kind of unit -> importance of each unit


@dataclass(frozen=True)
class KindSize:
    """Count the units of one kind in a block, and the parameters of each; one unit must stay."""

    parameters: int  # of one unit, biases included
    count: int  # units
    rows: int = 1  # rows of the key projection per unit (the head size); 1 for channels
    plain: tuple[
        int, ...
    ] = ()  # numbers with which a block loads without qpruner; empty for channels

    @property
    def most(self) -> int:
        """Number of units that can be removed."""
        return self.count - 1


Sizes = Mapping[
    int, Mapping[str, KindSize]
]  # block index -> kind of unit -> number and size of these units


class RateTooHigh(UserError):
    """`prune.rate` asks to remove more parameters than the `most` that can be removed."""

    def __init__(self, target: int, most: int) -> None:
        super().__init__(
            f"`prune.rate` asks to remove {target:,} parameters from blocks, but at most {most:,} can be removed if "
            "every block keeps at least one unit of each kind: lower the rate, allow more blocks "
            "(`prune.first_layer`, `prune.last_layer`), or name more `prune.units`"
        )
        self.most = most


def unit_kinds_of(
    config: Any, layers: Iterable[int], units: Collection[str] = (ATTENTION, MLP)
) -> dict[int, tuple[UnitKind, ...]]:
    """List the unit kinds named in `units` for each block in `layers`."""
    family, configs = family_of(config), config.per_layer_config
    return {
        index: tuple(kind for kind in family.unit_kinds(configs[index]) if kind.name in units)
        for index in layers
    }


def unit_sizes(
    model: Any, layers: Sequence[int], units: Sequence[str]
) -> dict[int, dict[str, KindSize]]:
    """Count the units of every kind in `units`, and the parameters of each."""
    family = family_of(model.config)
    sizes: dict[int, dict[str, KindSize]] = {index: {} for index in layers}
    for index, kinds in unit_kinds_of(model.config, layers, units).items():
        block, layer_config = (
            model.get_submodule(family.block_path(index)),
            model.config.per_layer_config[index],
        )
        for kind in kinds:
            is_attention, owned = kind.name == ATTENTION, owned_parameters(block, kind)
            sizes[index][kind.name] = KindSize(
                sum(
                    parameter.numel() // parameter.shape[item.dim] * item.width
                    for item, parameter in owned
                ),
                kind.num_units,
                rows=family.head_dim(layer_config) if is_attention else 1,
                plain=plain_counts(model.config, index) if is_attention else (),
            )
    return sizes


def plain_counts(config: Any, index: int) -> tuple[int, ...]:
    """List the numbers of key/value groups with which block `index` loads without qpruner."""
    family, layer_config = family_of(config), config.per_layer_config[index]
    kinds = {kind.name: kind.num_units for kind in family.unit_kinds(layer_config)}
    return tuple(
        count
        for count in range(1, kinds[ATTENTION] + 1)
        if family.is_plain(config, family.widths(layer_config, kinds | {ATTENTION: count}))
    )


def available(sizes: Sizes) -> int:
    """Count the parameters of all units in all blocks."""
    return sum(size.parameters * size.count for kinds in sizes.values() for size in kinds.values())


def most_removable(sizes: Sizes, round_to: int) -> int:
    """Count the parameters that can be removed if every block keeps as few units as it may."""
    return sum(
        size.parameters * (size.count - round_to if name == MLP else size.most)
        for kinds in sizes.values()
        for name, size in kinds.items()
    )


def smallest_step(sizes: Sizes, round_to: int) -> int:
    """Count the parameters of the smallest part that can be removed.

    That is an attention unit or `round_to` channels.
    """
    return min(
        size.parameters * (round_to if name == MLP else 1)
        for kinds in sizes.values()
        for name, size in kinds.items()
    )
