"""List the units of a model that may be cut: their blocks, their sizes, and how many must stay."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.errors import UserError
from qpruner.models.families import (
    ATTENTION,
    MLP,
    UnitKind,
    block_paths,
    family_of,
    owned_parameters,
)

Kept = dict[int, dict[str, tuple[int, ...]]]
"""Block index -> kind of unit -> indices of the units that stay, ascending."""
Values = Mapping[int, Mapping[str, Sequence[float]]]
"""Block index -> kind of unit -> importance of each unit."""


@dataclass(frozen=True)
class KindSize:
    """Count the units of one kind in a block, and the parameters of each; one unit must stay."""

    parameters: int  # of one unit, biases included
    count: int  # units
    rows: int = 1  # rows of the key projection per unit (the head size); 1 for channels
    plain: tuple[int, ...] = ()
    """Numbers of units with which a block loads without qpruner; empty for channels."""

    @property
    def most(self) -> int:
        """Number of units that can be removed."""
        return self.count - 1


Sizes = Mapping[int, Mapping[str, KindSize]]
"""Block index -> kind of unit -> number and size of these units."""


class RateTooHigh(UserError):
    """`prune.rate` asks to remove more parameters than the `most` that can be removed."""

    def __init__(self, target: int, most: int) -> None:
        super().__init__(
            f"`prune.rate` asks to remove {target:,} parameters from blocks, but at most {most:,} "
            "can be removed if every block keeps at least one unit of each kind: lower the rate, "
            "allow more blocks (`prune.first_layer`, `prune.last_layer`), or name more "
            "`prune.units`"
        )
        self.most = most


def unit_kinds_of(
    config: Any, layers: Iterable[int], units: Collection[str] = (ATTENTION, MLP)
) -> dict[int, tuple[UnitKind, ...]]:
    """List the unit kinds named in `units` for each block in `layers`."""
    family = family_of(config)
    kinds = {}
    for index in layers:
        of_block = family.unit_kinds(config.per_layer_config[index])
        kinds[index] = tuple(kind for kind in of_block if kind.name in units)
    return kinds


def unit_sizes(
    model: Any, layers: Sequence[int], units: Sequence[str]
) -> dict[int, dict[str, KindSize]]:
    """Count the units of every kind in `units`, and the parameters of each."""
    family = family_of(model.config)
    paths = block_paths(model.config)
    sizes: dict[int, dict[str, KindSize]] = {index: {} for index in layers}
    for index, kinds in unit_kinds_of(model.config, layers, units).items():
        block = model.get_submodule(paths[index])
        for kind in kinds:
            parameters = 0
            for item, parameter in owned_parameters(block, kind):
                parameters += parameter.numel() // parameter.shape[item.dim] * item.width

            size = KindSize(parameters, kind.num_units)
            if kind.name == ATTENTION:
                rows = family.head_dim(model.config.per_layer_config[index])
                plain = plain_counts(model.config, index)
                size = KindSize(parameters, kind.num_units, rows, plain)
            sizes[index][kind.name] = size
    return sizes


def plain_counts(config: Any, index: int) -> tuple[int, ...]:
    """List the numbers of key/value groups with which block `index` loads without qpruner."""
    family = family_of(config)
    layer_config = config.per_layer_config[index]
    num_units = {kind.name: kind.num_units for kind in family.unit_kinds(layer_config)}

    def is_plain(count: int) -> bool:
        widths = family.widths(layer_config, num_units | {ATTENTION: count})
        return family.is_plain(config, widths)

    return tuple(filter(is_plain, range(1, num_units[ATTENTION] + 1)))


def step_of(kind: str, round_to: int) -> int:
    """Return how many units of a kind are removed at once: `round_to` channels, or one head."""
    return round_to if kind == MLP else 1


def available(sizes: Sizes) -> int:
    """Count the parameters of all units in all blocks."""
    return sum(size.parameters * size.count for _, size in _kinds(sizes))


def most_removable(sizes: Sizes, round_to: int) -> int:
    """Count the parameters that can be removed if every block keeps as few units as it may."""
    return sum(
        size.parameters * (size.count - step_of(kind, round_to)) for kind, size in _kinds(sizes)
    )


def smallest_step(sizes: Sizes, round_to: int) -> int:
    """Count the parameters of the smallest part that can be removed.

    That is an attention unit or `round_to` channels.
    """
    return min(size.parameters * step_of(kind, round_to) for kind, size in _kinds(sizes))


def _kinds(sizes: Sizes) -> Iterator[tuple[str, KindSize]]:
    for by_kind in sizes.values():
        yield from by_kind.items()
