"""Decide how many units each block loses when all blocks lose about the same share.

Attention units and experts are coarse (a key/value head of Llama-2-7B with its query head is 2.1 million weights), so
they are allocated first, and channels fill the rest.
"""

import itertools
import math
from collections.abc import Mapping

from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, EXPERT, MLP
from qpruner.pruning.units import KindSize, Sizes, available, smallest_step

COARSE = (EXPERT, ATTENTION)  # unit kinds other than channels, coarsest first


def counts_per_layer(sizes: Sizes, target: int, round_to: int = 1, uniform: bool = False) -> dict[int, dict[str, int]]:
    """Count the units to remove: `target` parameters in all, about the same share of each kind in each block."""
    if uniform:
        return dict.fromkeys(sizes, _uniform_counts(sizes, target, round_to))
    if any(MLP in kinds for kinds in sizes.values()):
        return _counts_with_channels(sizes, target, round_to)
    return _counts_without_channels(sizes, target)


def _counts_without_channels(sizes: Sizes, target: int) -> dict[int, dict[str, int]]:
    """Spread the share of experts over the blocks, then attention units that make up the rest."""
    left, share = target, target / available(sizes)
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    names = [name for name in COARSE if _blocks_with(sizes, name)]
    for name in names:
        blocks = _blocks_with(sizes, name)
        parameters = next(iter(blocks.values())).parameters
        wanted = left / parameters if name == names[-1] else share * sum(size.count for size in blocks.values())
        base, extra = divmod(max(round(wanted), 0), len(blocks))
        for position, (index, size) in enumerate(blocks.items()):
            removed[index][name] = count = min(base + int(position < extra), size.most)
            left -= count * parameters
    return removed


def _counts_with_channels(sizes: Sizes, target: int, round_to: int) -> dict[int, dict[str, int]]:
    share, left = target / available(sizes), target
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    for name in COARSE:
        blocks = _blocks_with(sizes, name)
        counts = {index: min(int(share * size.count + 0.5), size.most) for index, size in blocks.items()}
        # Finer units can remove more afterwards, but cannot give anything back.
        while (num_removed := sum(count * blocks[index].parameters for index, count in counts.items())) > left:
            counts = {index: max(count - 1, 0) for index, count in counts.items()}
        for index, count in counts.items():
            removed[index][name] = count
        left -= num_removed
    channels = _blocks_with(sizes, MLP)
    # If channels cannot fill the rest, more coarse units are removed, of any kind that has some.
    most = sum((size.count - round_to) * size.parameters for size in channels.values())
    half_a_bundle = min(size.parameters for size in channels.values()) * round_to / 2
    while left > most + half_a_bundle:
        candidates = [
            (COARSE.index(name), removed[index][name], index, name)
            for index, kinds in sizes.items()
            for name, size in kinds.items()
            if name != MLP and removed[index][name] < size.most
        ]
        if not candidates:
            break
        *_, index, name = min(candidates)  # from the block that has lost the fewest
        gained = sizes[index][name].parameters
        if gained - left > left - most:  # exceeds the target by more than is missing
            break
        removed[index][name] += 1
        left -= gained
    for index, count in _channel_counts(channels, left, round_to).items():
        removed[index][MLP] = count
    return removed


def _blocks_with(sizes: Sizes, name: str) -> dict[int, KindSize]:
    return {index: kinds[name] for index, kinds in sizes.items() if name in kinds}


def _channel_counts(channels: Mapping[int, KindSize], target: int, round_to: int) -> dict[int, int]:
    """Count the channels to remove per block: equal shares in multiples of `round_to`, `target` parameters in all."""
    share = max(target, 0) / sum(size.parameters * size.count for size in channels.values())
    bundles = {index: (1 - share) * size.count / round_to for index, size in channels.items()}
    stays = {index: min(max(int(bundles[index]), 1), size.count // round_to) for index, size in channels.items()}
    # Give bundles back until the target is nearest, first to blocks that lost the most by rounding.
    order = sorted(stays, key=lambda index: (stays[index] - bundles[index], index))
    over = sum((size.count - stays[index] * round_to) * size.parameters for index, size in channels.items()) - target
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
    """Choose how many units of each kind every block loses, nearest to `target`.

    Misses of at most half the smallest unit in each block count as equal; then the choice is taken that exceeds the
    even share of attention units and experts least, then the most even one.
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
    # Try every number of coarse units of a plain checkpoint, with the channels nearest to the rest.
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
            f"`prune.rate` asks to remove {target:,} parameters, but `prune.uniform` allows at most {most:,}, because "
            "each block keeps a unit of each kind, and a number of key/value groups with which the model loads without "
            "qpruner: lower the rate, name more `prune.units`, or set `uniform: false`"
        )
    return min(found, key=order)
