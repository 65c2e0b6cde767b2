"""Which units stay: the least important go until the asked share of all parameters is gone.

The share is reached to within one MLP channel, or `round_to` of them: attention units and experts are coarse (a
key/value head of Llama-2-7B with its query head is 2.1 million weights), so they are chosen first and channels make up
the difference. Where only coarse kinds may go, the nearest number of them goes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
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
    """What one kind of unit weighs in one block.

    Attributes:
        parameters: Of one unit, biases included; for stacked experts, of one channel of every expert.
        count: Units; for stacked experts, channels of one expert.
        least: Units that must stay.
        partitions: Experts whose channels are chosen one by one.
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


def unit_sizes(model: Any, layers: Sequence[int], units: Sequence[str]) -> dict[int, dict[str, KindSize]]:
    """Sizes of the units that may go; the model may be on the meta device.

    Args:
        model: The model.
        layers: Blocks that may be cut.
        units: Kinds of unit that may go.

    Raises:
        UserError: If no block has units of a kind that was named.
    """
    family = family_of(model.config)
    sizes: dict[int, dict[str, KindSize]] = {}
    for index in layers:
        block = model.get_submodule(family.block_path(index))
        layer_config = model.config.per_layer_config[index]
        sizes[index] = {}
        for kind in family.unit_kinds(layer_config, index):
            if kind.name not in units:
                continue
            owned = sum(
                parameter.numel() // parameter.shape[item.dim] * item.width
                for item, parameter in owned_parameters(block, kind)
            )
            least = family.least_experts(layer_config) if kind.name == EXPERT else 1
            rows = family.head_dim(layer_config) if kind.name == ATTENTION else 1
            plain = plain_counts(model.config, index) if kind.name == ATTENTION else ()
            sizes[index][kind.name] = KindSize(owned, kind.units_per_partition, least, kind.partitions, rows, plain)
    for name in units:
        if not any(name in kinds for kinds in sizes.values()):
            raise UserError(
                f"`prune.units` names {name}, but no block of this {family.model_type} model has such units: leave it "
                "out"
            )
    return sizes


def plain_counts(config: Any, index: int) -> tuple[int, ...]:
    """Numbers of key/value groups that a plain checkpoint of this family can keep in every block; the most last."""
    family = family_of(config)
    layer_config = config.per_layer_config[index]
    kinds = {kind.name: kind.units_per_partition for kind in family.unit_kinds(layer_config, index)}
    return tuple(
        count
        for count in range(1, kinds[ATTENTION] + 1)
        if family.is_plain(config, family.widths(layer_config, index, kinds | {ATTENTION: count}))
    )


def layer_range(first: int, last: int, num_layers: int, protected: Sequence[int] = ()) -> tuple[int, ...]:
    """The blocks that may be cut; `UserError` when the range or a protected block is out of bounds."""
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


def select(
    values: Values,
    sizes: Sizes,
    target: int,
    selection: str,
    round_to: int = 1,
    uniform: bool = False,
    progress: float = 1.0,
) -> Kept:
    """The units that stay.

    Args:
        values: Importance of every unit that may go.
        sizes: What the units weigh.
        target: Parameters to remove.
        selection: `per_layer` takes the same share from every block, `global` the units of least importance per
            parameter wherever they are.
        round_to: Channels that stay in a block are a multiple of this.
        uniform: Every block keeps the same number of units (`per_layer` only).
        progress: Share of the way to go, for cutting in several steps.

    Raises:
        UserError: If the blocks do not have that many parameters to give, or are narrower than `round_to`.
    """
    check_round_to(sizes, round_to)
    _check_target(sizes, target, round_to)
    if selection == "global":
        return _select_global(values, sizes, round(target * progress), round_to, is_last=progress == 1.0)
    return _keep_most_important(values, sizes, counts_per_layer(sizes, target, round_to, uniform), round_to, progress)


def select_rate(values: Values, sizes: Sizes, layer_rate: float, round_to: int = 1, progress: float = 1.0) -> Kept:
    """The units that stay when every block loses a share of its own units, with LLM-Pruner's arithmetic.

    Of ``C`` channels, and of ``C`` rows of the key projection, ``C - int(C * (1 - layer_rate))`` go: channels are
    rounded up and heads, of which only whole ones can go, down (its `metapruner.py`, `prune_local`).

    Raises:
        UserError: If a block would keep fewer units of a kind than it needs, or is narrower than `round_to`.
    """
    check_round_to(sizes, round_to)
    removed = {
        index: {name: units_at_rate(size, layer_rate, round_to if name == MLP else 1) for name, size in kinds.items()}
        for index, kinds in sizes.items()
    }
    too_few = [
        (_highest_rate(size, layer_rate), index, name)
        for index, kinds in sizes.items()
        for name, size in kinds.items()
        if size.count - removed[index][name] < size.least
    ]
    if too_few:
        bound, index, name = min(too_few)
        size = sizes[index][name]
        raise UserError(
            f"`prune.layer_rate` {layer_rate:g} would leave {size.count - removed[index][name]} of the {size.count} "
            f"{name} units of block {index}, but at least {size.least} must stay: make it at most {bound:g}"
        )
    if not any(count for kinds in removed.values() for count in kinds.values()):
        kinds = next(iter(sizes.values()))
        units = " and ".join(f"{size.count} {name}" for name, size in kinds.items())
        multiple = f", {MLP} ones in multiples of {round_to}" if MLP in kinds and round_to > 1 else ""
        raise UserError(
            f"`prune.layer_rate` {layer_rate:g} takes no unit out of any block: of the {units} units of block "
            f"{next(iter(sizes))} whole ones alone can go{multiple}: raise it"
            f"{', lower `prune.round_to`' if multiple else ''} or name finer `prune.units`"
        )
    return _keep_most_important(values, sizes, removed, round_to, progress)


def _highest_rate(size: KindSize, refused: float) -> float:
    """In thousandths, below one that leaves too few units."""
    rates = (number / 1000 for number in range(int(refused * 1000), -1, -1))
    return next(rate for rate in rates if size.count - units_at_rate(size, rate) >= size.least)


def units_at_rate(size: KindSize, layer_rate: float, round_to: int = 1) -> int:
    """Units of one kind that a block loses at `layer_rate`."""
    rows = size.count * size.rows
    removed = (rows - int(rows * (1 - layer_rate))) // size.rows
    if round_to > 1:
        stays = max(round((size.count - removed) / round_to), 1) * round_to
        removed = max(size.count - stays, 0)
    return removed


def available(sizes: Sizes) -> int:
    """Parameters that the units have in all."""
    return sum(size.parameters * size.count for kinds in sizes.values() for size in kinds.values())


def _most_removable(sizes: Sizes, round_to: int) -> int:
    """Parameters that can go when every block keeps the least of each kind."""
    return sum(
        size.parameters * (size.count - (round_to if name == MLP else size.least))
        for kinds in sizes.values()
        for name, size in kinds.items()
    )


def _check_target(sizes: Sizes, target: int, round_to: int) -> None:
    most = _most_removable(sizes, round_to)
    if target > most + _finest(sizes, round_to) // 2:
        raise too_much(target, most)


def _finest(sizes: Sizes, round_to: int) -> int:
    """Parameters of the smallest step."""
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


def counts_per_layer(sizes: Sizes, target: int, round_to: int = 1, uniform: bool = False) -> dict[int, dict[str, int]]:
    """How many units each block loses when all lose the same share.

    Raises:
        UserError: If the blocks do not have that many parameters to give.
    """
    if uniform:
        return {index: dict(_most_like(sizes, target, round_to)) for index in sizes}
    share = target / available(sizes)
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    left = target
    coarse = [name for name in (EXPERT, ATTENTION) if any(name in kinds for kinds in sizes.values())]
    channels = {index: kinds[MLP] for index, kinds in sizes.items() if MLP in kinds}
    totals = {} if channels else _most_even_totals(sizes, target)
    for name in coarse:
        having = {index: kinds[name] for index, kinds in sizes.items() if name in kinds}
        counts = _share_counts(having, share, left) if channels else _dealt(having, totals[name])
        for index, count in counts.items():
            removed[index][name] = count
            left -= count * having[index].parameters
    if channels:
        # Where channels cannot give the rest, coarse units give more, of whichever kind has them.
        most = sum((size.count - round_to) * size.parameters for size in channels.values())
        half_a_bundle = min(size.parameters for size in channels.values()) * round_to / 2
        while coarse and left > most + half_a_bundle:
            before = copy.deepcopy(removed)
            gained = _one_more(sizes, removed, coarse)
            if not gained:
                raise too_much(target, _most_removable(sizes, round_to))
            if gained - left > left - most:  # too much by more than is missing
                removed = before
                break
            left -= gained
        for index, count in _channel_counts(channels, left, round_to).items():
            removed[index][MLP] = count
    return removed


@dataclass(frozen=True)
class _Pool:
    """One kind of unit over all blocks.

    Attributes:
        parameters: Of one unit.
        count: Units.
        most: Units that can go.
    """

    parameters: int
    count: int
    most: int


def _pools(sizes: Sizes) -> dict[str, _Pool]:
    """By kind, the coarsest first."""
    pools = {}
    for name in (EXPERT, ATTENTION):
        having = [kinds[name] for kinds in sizes.values() if name in kinds]
        if having:
            count = sum(size.count for size in having)
            pools[name] = _Pool(having[0].parameters, count, count - sum(size.least for size in having))
    return pools


def _totals(
    pools: Mapping[str, _Pool], target: int, before: Mapping[str, int] | None = None
) -> list[tuple[int, dict[str, int]]]:
    """Where no channels go: any number of experts, and the numbers of heads next to what is left, or of those alone;
    each with the parameters that go. As many as went `before` at least."""
    least = before or dict.fromkeys(pools, 0)
    *coarser, finest = pools
    found: list[tuple[int, dict[str, int]]] = [(0, {})]
    for name in coarser:
        one = pools[name].parameters
        found = [
            (gone + count * one, totals | {name: count})
            for gone, totals in found
            for count in range(least[name], pools[name].most + 1)
        ]
    one = pools[finest].parameters
    return [
        (gone + count * one, totals | {finest: count})
        for gone, totals in found
        for count in {min(max((target - gone) // one + more, least[finest]), pools[finest].most) for more in (0, 1)}
    ]


def _nearest_totals(
    sizes: Sizes,
    target: int,
    dislike: Callable[[Mapping[str, int]], float],
    before: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Of these, what is disliked least among those as near as half a head; the nearest, where none is."""
    near = _finest(sizes, 1) / 2

    def order(found: tuple[int, Mapping[str, int]]) -> tuple[float, ...]:
        gone, totals = found
        return max(abs(target - gone), near), dislike(totals), abs(target - gone)

    return min(_totals(_pools(sizes), target, before), key=order)[1]


def _most_even_totals(sizes: Sizes, target: int) -> dict[str, int]:
    """About the same share of every kind."""
    pools, share = _pools(sizes), target / available(sizes)
    return _nearest_totals(
        sizes, target, lambda totals: sum(abs(count / pools[name].count - share) for name, count in totals.items())
    )


def _alike(sizes: Sizes, target: int, round_to: int) -> list[dict[str, int]]:
    """Units of each kind that every block may lose, all blocks alike: any number of coarse ones that a plain checkpoint
    can have, and the numbers of channels next to what is left."""
    kinds = next(iter(sizes.values()))
    share = target / len(sizes)
    found: list[dict[str, int]] = [{}]
    for name in (EXPERT, ATTENTION):
        if name in kinds:
            size = kinds[name]
            stays = size.plain or range(size.least, size.count + 1)
            found = [alike | {name: size.count - count} for alike in found for count in stays]
    if MLP not in kinds:
        return found
    channels = kinds[MLP]
    most = channels.count // round_to
    with_channels = []
    for alike in found:
        left = share - sum(count * kinds[name].parameters for name, count in alike.items())
        bundles = (channels.count - left / channels.parameters) / round_to
        near = {min(max(count, 1), most) for count in (math.floor(bundles), math.ceil(bundles))}
        with_channels += [alike | {MLP: channels.count - count * round_to} for count in sorted(near)]
    return with_channels


def _parameters(sizes: Sizes, alike: Mapping[str, int]) -> int:
    """That go out of all blocks, which are alike, when each loses these units."""
    kinds = next(iter(sizes.values()))
    return len(sizes) * sum(kinds[name].parameters * count for name, count in alike.items())


def _most_like(sizes: Sizes, target: int, round_to: int) -> dict[str, int]:
    """Of what every block may lose, all alike, what takes about the same share of every kind, of heads and experts
    rather less; it comes as near as half a unit of every block, or nothing does."""
    share = target / available(sizes)
    kinds = next(iter(sizes.values()))
    near = len(sizes) * _finest(sizes, round_to) / 2

    def order(alike: Mapping[str, int]) -> tuple[float, ...]:
        coarse = {name: count / kinds[name].count for name, count in alike.items() if name != MLP}
        missed = abs(target - _parameters(sizes, alike))
        too_far = sum(max(of_kind - share, 0) for of_kind in coarse.values())
        distance = sum(abs(of_kind - share) for of_kind in coarse.values())
        return max(missed, near), too_far, distance, missed

    found = _alike(sizes, target, round_to)
    if target > (most := max(_parameters(sizes, alike) for alike in found)) + near:
        plain = kinds[ATTENTION].plain if ATTENTION in kinds else ()
        heads = f" and {min(plain)} key/value groups, the fewest that its plain checkpoint can have" if plain else ""
        raise UserError(
            f"`prune.rate` asks for {target:,} parameters to go, but with `prune.uniform` at most {most:,} can when "
            f"each block keeps at least one unit of each kind{heads}: lower the rate, name more `prune.units`, or set "
            "`uniform: false`"
        )
    return min(found, key=order)


def _share_counts(having: Mapping[int, KindSize], share: float, room: int) -> dict[int, int]:
    """Whole units that each block loses at a share, but no more of them than the target has room for: finer units can
    take more away, not give it back."""
    counts = {index: min(int(share * size.count + 0.5), size.count - size.least) for index, size in having.items()}
    while sum(count * having[index].parameters for index, count in counts.items()) > room:
        counts = {index: max(count - 1, 0) for index, count in counts.items()}
    return counts


def _dealt(having: Mapping[int, KindSize], total: int) -> dict[int, int]:
    """Whole units spread over the blocks; where it is uneven, the first lose one more."""
    base, extra = divmod(total, len(having))
    return {
        index: min(base + (1 if position < extra else 0), size.count - size.least)
        for position, (index, size) in enumerate(having.items())
    }


def _one_more(sizes: Sizes, removed: dict[int, dict[str, int]], coarse: Sequence[str]) -> int:
    """One more coarse unit from the block that has lost the fewest."""
    for name in coarse:
        able = [
            index
            for index, kinds in sizes.items()
            if name in kinds and removed[index][name] < kinds[name].count - kinds[name].least
        ]
        if able:
            index = min(able, key=lambda index: (removed[index][name], index))
            removed[index][name] += 1
            return sizes[index][name].parameters
    return 0


def _channel_counts(channels: Mapping[int, KindSize], left: int, round_to: int) -> dict[int, int]:
    """Channels that each block loses so that `left` parameters go: the same share, in bundles, the rest spread."""
    total = sum(size.parameters * size.count for size in channels.values())
    share = max(left, 0) / total
    bundles = {index: (1 - share) * size.count / round_to for index, size in channels.items()}
    stays = {index: min(max(int(bundles[index]), 1), size.count // round_to) for index, size in channels.items()}
    # Whole bundles are dealt out by what rounding down took from each block, until the target is nearest.
    order = sorted(stays, key=lambda index: (stays[index] - bundles[index], index))
    over = sum((size.count - stays[index] * round_to) * size.parameters for index, size in channels.items()) - left
    while over > 0:
        grown = False
        for index in order:
            size = channels[index]
            bundle = size.parameters * round_to
            if over >= bundle / 2 and (stays[index] + 1) * round_to <= size.count:
                stays[index] += 1
                over -= bundle
                grown = True
        if not grown:
            break
    return {index: size.count - stays[index] * round_to for index, size in channels.items()}


def _select_global(values: Values, sizes: Sizes, target: int, round_to: int, is_last: bool) -> Kept:
    """Remove the bundles of least importance per parameter wherever they are.

    A bundle is a key/value group, an expert, or `round_to` channels of one block that are neighbours in its ranking
    (of every expert of the block, where they are stacked).
    """
    bundles: dict[tuple[int, str], list[list[int]]] = {}
    ranked: list[tuple[float, int, str, int]] = []
    # Bundles that went: all that an earlier step removed, be it more than this step's share of the way.
    gone: dict[tuple[int, str], int] = {}
    for index, by_kind in values.items():
        for name, scores in by_kind.items():
            size = sizes[index][name]
            parts = _bundles(scores, size, round_to if name == MLP else 1)
            bundles[index, name] = parts
            gone[index, name] = sum(scores[part[0]] == float("-inf") for part in parts)
            weight = size.parameters / size.partitions
            for position in range(gone[index, name], len(parts) - size.least):
                part = parts[position]
                score = sum(scores[unit] for unit in part) / (weight * len(part))
                ranked.append((score, index, name, position))
    ranked.sort()
    earlier = dict(gone)

    def weight_of(index: int, name: str, position: int) -> int:
        size = sizes[index][name]
        return size.parameters * len(bundles[index, name][position]) // size.partitions

    removed = sum(weight_of(*place, position) for place, count in gone.items() for position in range(count))
    finest, has_channels = _finest(sizes, round_to), any(name == MLP for _, name in bundles)
    for _, index, name, position in ranked:
        parameters = weight_of(index, name, position)
        # Bundles of a block go in order; one that was too large for what is left keeps its successors.
        if removed + parameters <= target + finest // 2 and gone[index, name] == position:
            gone[index, name] += 1
            removed += parameters
        elif not (has_channels or is_last):
            break  # what would fill the gap before an expert is wanted at the end
    if has_channels:
        # Channels may not suffice: then coarse units go although they are too large, and channels come back.
        for _, index, name, position in ranked:
            if target - removed <= finest:
                break
            if name != MLP and gone[index, name] == position:
                gone[index, name] += 1
                removed += weight_of(index, name, position)
        for _, index, name, position in reversed(ranked):
            parameters = weight_of(index, name, position)
            went_last = name == MLP and gone[index, name] == position + 1
            if went_last and removed - target > parameters // 2:
                gone[index, name] -= 1
                removed -= parameters
    elif is_last:
        gone = _as_near_as_possible(sizes, target, ranked, earlier, gone)
    return {
        index: {
            name: tuple(sorted(unit for part in bundles[index, name][gone[index, name] :] for unit in part))
            for name in by_kind
        }
        for index, by_kind in values.items()
    }


def _as_near_as_possible(
    sizes: Sizes,
    target: int,
    ranked: Sequence[tuple[float, int, str, int]],
    earlier: Mapping[tuple[int, str], int],
    gone: Mapping[tuple[int, str], int],
) -> dict[tuple[int, str], int]:
    """Where no channels go: the least important of each kind, in numbers that come as near the target as one head, and
    have as many experts as would have gone by importance alone, or nearly."""

    def totals_of(counts: Mapping[tuple[int, str], int]) -> dict[str, int]:
        return {name: sum(count for (_, kind), count in counts.items() if kind == name) for _, name in counts}

    before, wanted, coarsest = totals_of(earlier), totals_of(gone), next(iter(_pools(sizes)))
    chosen = _nearest_totals(sizes, target, lambda totals: abs(totals[coarsest] - wanted[coarsest]), before)
    left = {name: count - before[name] for name, count in chosen.items()}
    counts = dict(earlier)
    for _, index, name, position in ranked:
        if left[name] > 0 and counts[index, name] == position:
            counts[index, name] += 1
            left[name] -= 1
    return counts


def _bundles(scores: Sequence[float], size: KindSize, width: int) -> list[list[int]]:
    """Units in the order in which they go, `width` of them at once; the first takes what is left over, so that what
    stays is always a multiple."""
    orders = [
        sorted(range(part * size.count, (part + 1) * size.count), key=lambda unit: (scores[unit], unit))
        for part in range(size.partitions)
    ]
    first = size.count % width or width
    starts = [0, *range(first, size.count, width)]
    ends = [*starts[1:], size.count]
    return [[unit for order in orders for unit in order[a:b]] for a, b in zip(starts, ends, strict=True)]


def _keep_most_important(
    values: Values, sizes: Sizes, removed: Mapping[int, Mapping[str, int]], round_to: int, progress: float
) -> Kept:
    def gone(index: int, name: str) -> int:
        """On the way, too, the channels that stay are a multiple."""
        count, multiple = sizes[index][name].count, round_to if name == MLP else 1
        stays = math.ceil((count - int(removed[index][name] * progress)) / multiple) * multiple
        return max(count - stays, 0)

    return {
        index: {
            name: tuple(
                sorted(
                    unit for bundle in _bundles(scores, sizes[index][name], 1)[gone(index, name) :] for unit in bundle
                )
            )
            for name, scores in by_kind.items()
        }
        for index, by_kind in values.items()
    }


class TooMuch(UserError):
    """A rate asks for more than there is.

    Attributes:
        most: Parameters that can go.
    """

    def __init__(self, text: str, most: int) -> None:
        super().__init__(text)
        self.most = most


def too_much(target: int, most: int) -> TooMuch:
    """What to say when a rate asks for more than there is."""
    return TooMuch(
        f"`prune.rate` asks for {target:,} parameters to go, but at most {most:,} can when each block that may be cut "
        "keeps at least one unit of each kind: lower the rate, widen `prune.first_layer` / `prune.last_layer` or name "
        "more `prune.units`",
        most,
    )
