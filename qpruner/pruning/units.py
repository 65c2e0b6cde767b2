"""The units of a model that may be cut: what they weigh, which blocks have them, and how many must stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, EXPERT, MLP, family_of, owned_parameters

Kept = dict[int, dict[str, tuple[int, ...]]]
"""Block index -> kind of unit -> indices of the units that stay, ascending."""

Values = Mapping[int, Mapping[str, Sequence[float]]]
"""Block index -> kind of unit -> importance of each unit."""


@dataclass(frozen=True)
class KindSize:
    """The size of one kind of unit in one block.

    Attributes:
        parameters: Of one unit, biases included; for stacked experts, of one channel of every expert.
        count: Units; for stacked experts, channels of one expert.
        least: Units that must stay.
        partitions: Stacked experts; each keeps its own channels.
        rows: Rows of the key projection a unit has (the head size); 1 for channels and experts.
        plain: Numbers of units that a plain checkpoint can keep; empty where it can keep any.
    """

    parameters: int
    count: int
    least: int = 1
    partitions: int = 1
    rows: int = 1
    plain: tuple[int, ...] = ()


Sizes = Mapping[int, Mapping[str, KindSize]]
"""Block index -> kind of unit -> its size."""


class TooMuch(UserError):
    """A rate asks for more parameters than the units have; `most` can go."""

    def __init__(self, target: int, most: int) -> None:
        super().__init__(
            f"`prune.rate` asks for {target:,} parameters to go, but at most {most:,} can when each block that may be "
            "cut keeps at least one unit of each kind: lower the rate, widen `prune.first_layer` / `prune.last_layer` "
            "or name more `prune.units`"
        )
        self.most = most


def unit_sizes(model: Any, layers: Sequence[int], units: Sequence[str]) -> dict[int, dict[str, KindSize]]:
    """Compute the sizes of the units that may go; the model may be on the meta device.

    Raises:
        UserError: If no block has units of a kind that was named.
    """
    family = family_of(model.config)
    sizes: dict[int, dict[str, KindSize]] = {}
    for index in layers:
        block, layer_config = model.get_submodule(family.block_path(index)), model.config.per_layer_config[index]
        sizes[index] = {}
        for kind in family.unit_kinds(layer_config, index):
            if kind.name not in units:
                continue
            owned = sum(
                parameter.numel() // parameter.shape[item.dim] * item.width
                for item, parameter in owned_parameters(block, kind)
            )
            sizes[index][kind.name] = KindSize(
                owned,
                kind.units_per_partition,
                least=family.least_experts(layer_config) if kind.name == EXPERT else 1,
                partitions=kind.partitions,
                rows=family.head_dim(layer_config) if kind.name == ATTENTION else 1,
                plain=plain_counts(model.config, index) if kind.name == ATTENTION else (),
            )
    for name in units:
        if not any(name in kinds for kinds in sizes.values()):
            raise UserError(
                f"`prune.units` names {name}, but no block of this {family.model_type} model has such units: leave it "
                "out"
            )
    return sizes


def plain_counts(config: Any, index: int) -> tuple[int, ...]:
    """List the numbers of key/value groups that a plain checkpoint of this family can keep in every block."""
    family, layer_config = family_of(config), config.per_layer_config[index]
    kinds = {kind.name: kind.units_per_partition for kind in family.unit_kinds(layer_config, index)}
    return tuple(
        count
        for count in range(1, kinds[ATTENTION] + 1)
        if family.is_plain(config, family.widths(layer_config, index, kinds | {ATTENTION: count}))
    )


def layer_range(first: int, last: int, num_layers: int, protected: Sequence[int] = ()) -> tuple[int, ...]:
    """List the blocks that may be cut.

    Raises:
        UserError: If the range or a protected block is out of bounds, or nothing is left.
    """
    end = last if last >= 0 else num_layers + last
    if not 0 <= first <= end < num_layers:
        raise UserError(
            f"`prune.first_layer` {first} and `prune.last_layer` {last} must be a range within the model's "
            f"{num_layers} blocks, 0 to {num_layers - 1}"
        )
    for index in protected:
        if not -num_layers <= index < num_layers:
            raise UserError(
                f"`prune.protected_layers`: there is no block {index}; the model has {num_layers}, 0 to "
                f"{num_layers - 1}"
            )
    kept_whole = {index % num_layers for index in protected}
    layers = tuple(index for index in range(first, end + 1) if index not in kept_whole)
    if not layers:
        raise UserError(
            "`prune.protected_layers` leaves no block that may be cut: name fewer, or widen `prune.first_layer` / "
            "`prune.last_layer`"
        )
    return layers


def available(sizes: Sizes) -> int:
    """Count the parameters of all units."""
    return sum(size.parameters * size.count for kinds in sizes.values() for size in kinds.values())


def most_removable(sizes: Sizes, round_to: int) -> int:
    """Count the parameters that can go when every block keeps the least of each kind."""
    return sum(
        size.parameters * (size.count - (round_to if name == MLP else size.least))
        for kinds in sizes.values()
        for name, size in kinds.items()
    )


def smallest_step(sizes: Sizes, round_to: int) -> int:
    """Count the parameters of the smallest unit, or of `round_to` channels."""
    return min(
        size.parameters * (round_to if name == MLP else 1) for kinds in sizes.values() for name, size in kinds.items()
    )


def check_round_to(sizes: Sizes, round_to: int) -> None:
    """Refuse a multiple that is wider than a block."""
    narrowest = min((kinds[MLP].count for kinds in sizes.values() if MLP in kinds), default=round_to)
    if round_to > narrowest:
        raise UserError(
            f"`prune.round_to` must be at most the {narrowest} MLP channels of a block, got {round_to}: no multiple of "
            "it would be left"
        )
