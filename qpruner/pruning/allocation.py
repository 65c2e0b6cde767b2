"""Decide how many units each block loses when all blocks lose about the same share.

Attention units are coarse (a key/value head of Llama-2-7B with its query head is 2.1 million
weights), so they are allocated first, and channels fill the rest.
"""

import math
from collections.abc import Mapping

from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, MLP
from qpruner.pruning.units import KindSize, Sizes, available, smallest_step


def counts_per_layer(
    sizes: Sizes, target: int, round_to: int = 1, uniform: bool = False
) -> dict[int, dict[str, int]]:
    """Count the units that each block loses so that `target` parameters are removed in all.

    Every block loses about the same share of each kind, or the same number with `uniform`. The
    result maps block index and kind to the number of units to remove.
    """
    if uniform:
        return dict.fromkeys(sizes, _uniform_counts(sizes, target, round_to))
    heads, channels = (
        {index: kinds[name] for index, kinds in sizes.items() if name in kinds}
        for name in (ATTENTION, MLP)
    )
    if not channels:
        wanted = max(round(target / next(iter(heads.values())).parameters), 0)
        base, extra = divmod(wanted, len(heads))
        return {
            index: {ATTENTION: min(base + int(position < extra), size.most)}
            for position, (index, size) in enumerate(heads.items())
        }
    gone = _head_counts(heads, channels, target, target / available(sizes), round_to)
    left = target - sum(count * heads[index].parameters for index, count in gone.items())
    return {
        index: ({ATTENTION: gone[index]} if index in gone else {}) | {MLP: count}
        for index, count in _channel_counts(channels, left, round_to).items()
    }


def _head_counts(
    heads: Mapping[int, KindSize],
    channels: Mapping[int, KindSize],
    target: int,
    share: float,
    round_to: int,
) -> dict[int, int]:
    """Count the attention units that each block loses.

    That is the share of its units, and more where the channels cannot remove the rest of `target`.
    """
    gone = {index: min(int(share * size.count + 0.5), size.most) for index, size in heads.items()}
    # Channels can remove more afterwards, but cannot give anything back.
    while (
        num_removed := sum(count * heads[index].parameters for index, count in gone.items())
    ) > target:
        gone = {index: max(count - 1, 0) for index, count in gone.items()}
    left, most = (
        target - num_removed,
        sum((size.count - round_to) * size.parameters for size in channels.values()),
    )
    half_a_bundle = min(size.parameters for size in channels.values()) * round_to / 2
    while left > most + half_a_bundle:
        candidates = [(count, index) for index, count in gone.items() if count < heads[index].most]
        if not candidates:
            break
        _, index = min(candidates)  # from the block that has lost the fewest
        gained = heads[index].parameters
        if gained - left > left - most:  # exceeds the target by more than is missing
            break
        gone[index] += 1
        left -= gained
    return gone


def _channel_counts(channels: Mapping[int, KindSize], target: int, round_to: int) -> dict[int, int]:
    """Count the channels that each block loses so that `target` parameters are removed in all.

    Every block loses the same share, and keeps a multiple of `round_to` channels.
    """
    share = max(target, 0) / sum(size.parameters * size.count for size in channels.values())
    bundles = {index: (1 - share) * size.count / round_to for index, size in channels.items()}
    stays = {
        index: min(max(int(bundles[index]), 1), size.count // round_to)
        for index, size in channels.items()
    }
    # Give bundles back until the target is nearest, first to blocks that lost the most by rounding.
    order = sorted(stays, key=lambda index: (stays[index] - bundles[index], index))
    over = (
        sum(
            (size.count - stays[index] * round_to) * size.parameters
            for index, size in channels.items()
        )
        - target
    )
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


# ---- all blocks alike


def _uniform_counts(sizes: Sizes, target: int, round_to: int) -> dict[str, int]:
    """Choose how many units of each kind every block loses, nearest to `target` parameters in all.

    Misses of at most half the smallest unit in each block count as equal. Of equally near choices
    the one is taken that exceeds the even share of attention units least, then the most even one.
    Raise `UserError` if too few units can be removed.
    """
    share, kinds = target / available(sizes), next(iter(sizes.values()))
    near = len(sizes) * smallest_step(sizes, round_to) / 2
    heads, channels, found = kinds.get(ATTENTION), kinds.get(MLP), []

    def removed(counts: Mapping[str, int]) -> int:
        return len(sizes) * sum(kinds[name].parameters * count for name, count in counts.items())

    def order(counts: Mapping[str, int]) -> tuple[float, ...]:
        of_heads = counts[ATTENTION] / heads.count if heads else share
        missed = abs(target - removed(counts))
        return max(missed, near), max(of_heads - share, 0), abs(of_heads - share), missed

    # Try every number of heads of a plain checkpoint, with the channels nearest to the rest.
    for count in (
        [heads.count - each for each in heads.plain or range(1, heads.count + 1)] if heads else [0]
    ):
        counts, left = {ATTENTION: count} if heads else {}, target / len(sizes)
        if channels is None:
            found.append(counts)
            continue
        left -= count * heads.parameters if heads else 0
        bundles = (channels.count - left / channels.parameters) / round_to
        nearest = {
            min(max(round_(bundles), 1), channels.count // round_to)
            for round_ in (math.floor, math.ceil)
        }
        found += [counts | {MLP: channels.count - stays * round_to} for stays in sorted(nearest)]
    if target > (most := max(map(removed, found))) + near:
        raise UserError(
            f"`prune.rate` asks to remove {target:,} parameters, but `prune.uniform` allows at most {most:,}, because "
            "each block keeps a unit of each kind, and a number of key/value groups with which the model loads without "
            "qpruner: lower the rate, name more `prune.units`, or set `uniform: false`"
        )
    return min(found, key=order)
