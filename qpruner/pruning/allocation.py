"""How many units each block loses when all blocks lose about the same share.

Attention units and experts are coarse (a key/value head of Llama-2-7B with its query head is 2.1 million weights), so
they are allocated first and channels make up the difference. Without channels the nearest number of coarse units goes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, EXPERT, MLP
from qpruner.pruning.units import KindSize, Sizes, available, smallest_step

COARSE = (EXPERT, ATTENTION)
"""Kinds of unit other than channels, the coarsest first."""


def counts_per_layer(sizes: Sizes, target: int, round_to: int = 1, uniform: bool = False) -> dict[int, dict[str, int]]:
    """Count the units of each kind that each block loses when all lose the same share.

    Raises:
        UserError: If blocks that are all cut alike do not have that many parameters to give.
    """
    if uniform:
        return dict.fromkeys(sizes, _uniform_counts(sizes, target, round_to))
    if any(MLP in kinds for kinds in sizes.values()):
        return _counts_with_channels(sizes, target, round_to)
    share, pools = target / available(sizes), _pools(sizes)
    totals = nearest_totals(
        sizes, target, lambda totals: sum(abs(count / pools[name].count - share) for name, count in totals.items())
    )
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    for name, total in totals.items():
        having = _having(sizes, name)
        base, extra = divmod(total, len(having))
        for position, (index, size) in enumerate(having.items()):
            removed[index][name] = min(base + int(position < extra), size.most)
    return removed


def _counts_with_channels(sizes: Sizes, target: int, round_to: int) -> dict[int, dict[str, int]]:
    share, left = target / available(sizes), target
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    for name in COARSE:
        having = _having(sizes, name)
        counts = {index: min(int(share * size.count + 0.5), size.most) for index, size in having.items()}
        # Finer units can take more away, not give it back.
        while (gone := sum(count * having[index].parameters for index, count in counts.items())) > left:
            counts = {index: max(count - 1, 0) for index, count in counts.items()}
        for index, count in counts.items():
            removed[index][name] = count
        left -= gone
    channels = _having(sizes, MLP)
    # Where channels cannot give the rest, coarse units give more, of whichever kind has them.
    most = sum((size.count - round_to) * size.parameters for size in channels.values())
    half_a_bundle = min(size.parameters for size in channels.values()) * round_to / 2
    while left > most + half_a_bundle:
        able = [
            (COARSE.index(name), removed[index][name], index, name)
            for index, kinds in sizes.items()
            for name, size in kinds.items()
            if name != MLP and removed[index][name] < size.most
        ]
        if not able:
            break
        *_, index, name = min(able)  # of the block that has lost the fewest
        gained = sizes[index][name].parameters
        if gained - left > left - most:  # too much by more than is missing
            break
        removed[index][name] += 1
        left -= gained
    for index, count in _channel_counts(channels, left, round_to).items():
        removed[index][MLP] = count
    return removed


def _having(sizes: Sizes, name: str) -> dict[int, KindSize]:
    return {index: kinds[name] for index, kinds in sizes.items() if name in kinds}


def _channel_counts(channels: Mapping[int, KindSize], left: int, round_to: int) -> dict[int, int]:
    """Count the channels that each block loses so that `left` parameters go: the same share, in whole bundles."""
    share = max(left, 0) / sum(size.parameters * size.count for size in channels.values())
    bundles = {index: (1 - share) * size.count / round_to for index, size in channels.items()}
    stays = {index: min(max(int(bundles[index]), 1), size.count // round_to) for index, size in channels.items()}
    # Blocks get bundles back, those first that rounding down took the most from, until the target is nearest.
    order = sorted(stays, key=lambda index: (stays[index] - bundles[index], index))
    over = sum((size.count - stays[index] * round_to) * size.parameters for index, size in channels.items()) - left
    has_changed = True
    while over > 0 and has_changed:
        has_changed = False
        for index in order:
            bundle = channels[index].parameters * round_to
            if over >= bundle / 2 and (stays[index] + 1) * round_to <= channels[index].count:
                stays[index] += 1
                over -= bundle
                has_changed = True
    return {index: size.count - stays[index] * round_to for index, size in channels.items()}


# ---- coarse units alone


def _pools(sizes: Sizes) -> dict[str, KindSize]:
    """Add up each coarse kind over all blocks, the coarsest first."""
    pools = {}
    for name in COARSE:
        if having := list(_having(sizes, name).values()):
            count, least = sum(size.count for size in having), sum(size.least for size in having)
            pools[name] = KindSize(having[0].parameters, count, least)
    return pools


def nearest_totals(
    sizes: Sizes,
    target: int,
    penalty: Callable[[Mapping[str, int]], float],
    before: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Choose how many units of each coarse kind go, of those that went `before` at least as many.

    It is the lowest-penalty allocation within half a head of the target, otherwise the closest.
    """
    pools, near = _pools(sizes), smallest_step(sizes, 1) / 2
    least = before or dict.fromkeys(pools, 0)
    *coarser, finest = pools
    one, most = pools[finest].parameters, pools[finest].most
    found: list[tuple[int, dict[str, int]]] = []
    # Any number of the coarser kind, each with the two numbers of the finest kind that come next to the target.
    for counts in itertools.product(*(range(least[name], pools[name].most + 1) for name in coarser)):
        totals = dict(zip(coarser, counts, strict=True))
        gone = sum(count * pools[name].parameters for name, count in totals.items())
        for count in {min(max((target - gone) // one + more, least[finest]), most) for more in (0, 1)}:
            found.append((gone + count * one, totals | {finest: count}))
    return min(found, key=lambda each: (max(abs(target - each[0]), near), penalty(each[1]), abs(target - each[0])))[1]


# ---- all blocks alike


def _uniform_counts(sizes: Sizes, target: int, round_to: int) -> dict[str, int]:
    """Choose the units that every block loses.

    Of allocations within half a unit of every block of the target, otherwise of the closest, it is that which takes the
    most even share of every kind; of heads and experts rather less.
    """
    share, kinds = target / available(sizes), next(iter(sizes.values()))
    near = len(sizes) * smallest_step(sizes, round_to) / 2

    def removed(counts: Mapping[str, int]) -> int:
        return len(sizes) * sum(kinds[name].parameters * count for name, count in counts.items())

    def order(counts: Mapping[str, int]) -> tuple[float, ...]:
        coarse = [count / kinds[name].count for name, count in counts.items() if name != MLP]
        missed = abs(target - removed(counts))
        too_far = sum(max(of_kind - share, 0) for of_kind in coarse)
        return max(missed, near), too_far, sum(abs(of_kind - share) for of_kind in coarse), missed

    names, found = [name for name in COARSE if name in kinds], []
    can_stay = [kinds[name].plain or range(kinds[name].least, kinds[name].count + 1) for name in names]
    # Any number of coarse units that a plain checkpoint can have, each with the channels next to what is left.
    for stays in itertools.product(*can_stay):
        counts = {name: kinds[name].count - count for name, count in zip(names, stays, strict=True)}
        if MLP not in kinds:
            found.append(counts)
            continue
        channels = kinds[MLP]
        left = target / len(sizes) - sum(count * kinds[name].parameters for name, count in counts.items())
        bundles = (channels.count - left / channels.parameters) / round_to
        nearest = {min(max(round_(bundles), 1), channels.count // round_to) for round_ in (math.floor, math.ceil)}
        found += [counts | {MLP: channels.count - count * round_to} for count in sorted(nearest)]
    if target > (most := max(map(removed, found))) + near:
        raise UserError(
            f"`prune.rate` asks for {target:,} parameters to go, but with `prune.uniform` at most {most:,} can when "
            "each block keeps a unit of each kind, of key/value groups as many as a plain checkpoint can have: lower "
            "the rate, name more `prune.units`, or set `uniform: false`"
        )
    return min(found, key=order)
