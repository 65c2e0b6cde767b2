"""Decide how many units each block loses when all blocks lose about the same share.

Attention units are coarse (a key/value head of Llama-2-7B with its query head is 2.1 million
weights), so they are allocated first, and channels fill the rest.
"""

import math
from collections.abc import Mapping

from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, MLP
from qpruner.pruning.units import KindSize, Sizes, available, smallest_step

Counts = dict[int, int]
"""Block index -> number of units of one kind."""
OfKind = Mapping[int, KindSize]
"""Block index -> number and size of its units of one kind."""


def counts_per_layer(
    sizes: Sizes, target: int, round_to: int = 1, uniform: bool = False
) -> dict[int, dict[str, int]]:
    """Count the units that each block loses so that `target` parameters are removed in all.

    Every block loses about the same share of each kind, or the same number with `uniform`. The
    result maps block index and kind to the number of units to remove.
    """
    if uniform:
        return dict.fromkeys(sizes, _uniform_counts(sizes, target, round_to))

    heads = {index: kinds[ATTENTION] for index, kinds in sizes.items() if ATTENTION in kinds}
    channels = {index: kinds[MLP] for index, kinds in sizes.items() if MLP in kinds}
    if not channels:
        return {index: {ATTENTION: count} for index, count in _heads_alone(heads, target).items()}

    counts: dict[int, dict[str, int]] = {index: {} for index in channels}
    share = target / available(sizes)
    removed_heads = _head_counts(heads, channels, target, share, round_to)
    for index, count in removed_heads.items():
        counts[index][ATTENTION] = count

    left = target - _parameters(heads, removed_heads)
    for index, count in _channel_counts(channels, left, round_to).items():
        counts[index][MLP] = count
    return counts


def _parameters(sizes: OfKind, counts: Counts) -> int:
    """Count the parameters of that many units in each block."""
    return sum(count * sizes[index].parameters for index, count in counts.items())


def _heads_alone(heads: OfKind, target: int) -> Counts:
    """Count the attention units that each block loses if there are no channels to cut."""
    per_head = next(iter(heads.values())).parameters
    base, extra = divmod(max(round(target / per_head), 0), len(heads))
    counts = {}
    for position, (index, size) in enumerate(heads.items()):
        count = base + 1 if position < extra else base
        counts[index] = min(count, size.most)
    return counts


def _head_counts(
    heads: OfKind,
    channels: OfKind,
    target: int,
    share: float,
    round_to: int,
) -> Counts:
    """Count the attention units that each block loses.

    That is the share of its units, and more where the channels cannot remove the rest of `target`.
    """
    counts = {index: min(int(share * size.count + 0.5), size.most) for index, size in heads.items()}
    # Channels can remove more afterwards, but cannot give anything back.
    while (removed := _parameters(heads, counts)) > target:
        counts = {index: max(count - 1, 0) for index, count in counts.items()}

    left = target - removed
    most = sum((size.count - round_to) * size.parameters for size in channels.values())
    half_a_bundle = min(size.parameters for size in channels.values()) * round_to / 2
    while left > most + half_a_bundle:
        candidates = [index for index in counts if counts[index] < heads[index].most]
        if not candidates:
            break
        index = min(candidates, key=lambda index: (counts[index], index))  # has lost the fewest
        gained = heads[index].parameters
        if gained - left > left - most:  # exceeds the target by more than is missing
            break
        counts[index] += 1
        left -= gained
    return counts


def _channel_counts(channels: OfKind, target: int, round_to: int) -> Counts:
    """Count the channels that each block loses so that `target` parameters are removed in all.

    Every block loses the same share, and keeps a multiple of `round_to` channels.
    """
    share = max(target, 0) / sum(size.parameters * size.count for size in channels.values())
    bundles = {index: (1 - share) * size.count / round_to for index, size in channels.items()}
    stays = {}
    for index, size in channels.items():
        stays[index] = min(max(int(bundles[index]), 1), size.count // round_to)

    # Give bundles back until the target is nearest, first to blocks that lost the most by rounding.
    order = sorted(stays, key=lambda index: (stays[index] - bundles[index], index))
    surplus = _parameters(channels, _removed(channels, stays, round_to)) - target
    has_changed = True
    while surplus > 0 and has_changed:
        has_changed = False
        for index in order:
            bundle = channels[index].parameters * round_to
            has_room = (stays[index] + 1) * round_to <= channels[index].count
            if has_room and surplus >= bundle / 2:
                stays[index] += 1
                surplus -= bundle
                has_changed = True
    return _removed(channels, stays, round_to)


def _removed(channels: OfKind, stays: Counts, round_to: int) -> Counts:
    """Count the channels to remove from the bundles of `round_to` channels that stay."""
    return {index: size.count - stays[index] * round_to for index, size in channels.items()}


# ---- all blocks alike


def _uniform_counts(sizes: Sizes, target: int, round_to: int) -> dict[str, int]:
    """Choose how many units of each kind every block loses, nearest to `target` parameters in all.

    Misses of at most half the smallest unit in each block count as equal. Of equally near choices
    the one is taken that exceeds the even share of attention units least, then the most even one.
    Raise `UserError` if too few units can be removed.
    """
    kinds = next(iter(sizes.values()))
    share = target / available(sizes)
    near = len(sizes) * smallest_step(sizes, round_to) / 2

    def removed(counts: Mapping[str, int]) -> int:
        per_block = sum(kinds[name].parameters * count for name, count in counts.items())
        return len(sizes) * per_block

    def order(counts: Mapping[str, int]) -> tuple[float, ...]:
        unevenness = 0.0
        if ATTENTION in counts:
            unevenness = counts[ATTENTION] / kinds[ATTENTION].count - share
        missed = abs(target - removed(counts))
        return max(missed, near), max(unevenness, 0), abs(unevenness), missed

    choices = _uniform_choices(kinds, target / len(sizes), round_to)
    most = max(map(removed, choices))
    if target > most + near:
        raise UserError(
            f"`prune.rate` asks to remove {target:,} parameters, but `prune.uniform` allows at "
            f"most {most:,}, because each block keeps a unit of each kind, and a number of "
            "key/value groups with which the model loads without qpruner: lower the rate, name "
            "more `prune.units`, or set `uniform: false`"
        )
    return min(choices, key=order)


def _uniform_choices(
    kinds: Mapping[str, KindSize], target: float, round_to: int
) -> list[dict[str, int]]:
    """List every number of heads of a plain checkpoint, with the channels nearest to the rest."""
    choices: list[dict[str, int]] = [{}]
    if ATTENTION in kinds:
        heads = kinds[ATTENTION]
        plain = heads.plain or range(1, heads.count + 1)
        choices = [{ATTENTION: heads.count - stays} for stays in plain]
    if MLP not in kinds:
        return choices

    channels = kinds[MLP]
    filled = []
    for counts in choices:
        left = target
        if counts:
            left -= counts[ATTENTION] * kinds[ATTENTION].parameters
        bundles = (channels.count - left / channels.parameters) / round_to
        nearest = set()
        for rounded in (math.floor(bundles), math.ceil(bundles)):
            nearest.add(min(max(rounded, 1), channels.count // round_to))
        for stays in sorted(nearest):
            filled.append(counts | {MLP: channels.count - stays * round_to})
    return filled
