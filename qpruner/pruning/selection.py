"""Which units stay: the least important go until the asked share of all parameters is gone.

The share is reached to within one MLP channel, or `round_to` of them; without channels, to the nearest coarse unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from qpruner.errors import UserError
from qpruner.models.families import MLP
from qpruner.pruning.allocation import COARSE, counts_per_layer, nearest_totals
from qpruner.pruning.units import Kept, KindSize, Sizes, TooMuch, Values, most_removable, smallest_step

Place = tuple[int, str]
"""Block index and kind of unit."""


def select(
    values: Values,
    sizes: Sizes,
    target: int,
    selection: str,
    round_to: int = 1,
    uniform: bool = False,
    progress: float = 1.0,
) -> Kept:
    """Select the units that stay so that `target` parameters go, after `progress` of the way in several steps.

    `values` are -inf for units that an earlier step removed. `per_layer` takes the same share from every block,
    `global` the units of least importance per parameter wherever they are; channels that stay are a multiple of
    `round_to`; `uniform` keeps the same number in every block.

    Raises:
        UserError: If the blocks do not have that many parameters to give, or are narrower than `round_to`.
    """
    _check_round_to(sizes, round_to)
    most = most_removable(sizes, round_to)
    if target > most + smallest_step(sizes, round_to) // 2:
        raise TooMuch(target, most)
    if selection == "global":
        return _select_global(values, sizes, round(target * progress), round_to, is_last=progress == 1.0)
    return _keep_most_important(values, sizes, counts_per_layer(sizes, target, round_to, uniform), round_to, progress)


def select_rate(
    values: Values, sizes: Sizes, layer_rate: float, round_to: int = 1, uniform: bool = False, progress: float = 1.0
) -> Kept:
    """Select the units that stay when every block loses a share of its own units, with LLM-Pruner's arithmetic.

    Of ``C`` channels, and of ``C`` rows of the key projection, ``C - int(C * (1 - layer_rate))`` go: channels are
    rounded up and heads, of which only whole ones can go, down (its `metapruner.py`, `prune_local`).

    Raises:
        UserError: If a block would keep fewer units of a kind than it needs, or all, or is narrower than `round_to`.
    """
    _check_round_to(sizes, round_to)
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    for index, kinds in sizes.items():
        for name, size in kinds.items():
            removed[index][name] = count = units_at_rate(size, layer_rate, round_to if name == MLP else 1)
            if count > size.most:
                raise UserError(
                    f"`prune.layer_rate` {layer_rate:g} would leave {size.count - count} of the {size.count} {name} "
                    f"units of block {index}, but at least {size.least} must stay: lower it"
                )
            if uniform and size.plain and size.count - count not in size.plain:
                raise UserError(
                    f"`prune.uniform`: `layer_rate` {layer_rate:g} leaves {size.count - count} key/value groups in a "
                    f"block, but a plain checkpoint of this family can have {', '.join(map(str, size.plain))}: give "
                    "`rate` instead, or set `uniform: false`"
                )
    if not any(count for of_block in removed.values() for count in of_block.values()):
        raise UserError(
            f"`prune.layer_rate` {layer_rate:g} takes no unit out of any block: whole ones alone can go, channels in "
            "multiples of `prune.round_to`: raise it, lower that, or name finer `prune.units`"
        )
    return _keep_most_important(values, sizes, removed, round_to, progress)


def _check_round_to(sizes: Sizes, round_to: int) -> None:
    narrowest = min((kinds[MLP].count for kinds in sizes.values() if MLP in kinds), default=round_to)
    if round_to > narrowest:
        raise UserError(
            f"`prune.round_to` must be at most the {narrowest} MLP channels of a block, got {round_to}: no multiple of "
            "it would be left"
        )


def units_at_rate(size: KindSize, layer_rate: float, round_to: int = 1) -> int:
    """Count the units of one kind that a block loses at `layer_rate`."""
    rows = size.count * size.rows
    removed = (rows - int(rows * (1 - layer_rate))) // size.rows
    if round_to == 1:
        return removed
    return max(size.count - max(round((size.count - removed) / round_to), 1) * round_to, 0)


def _keep_most_important(
    values: Values, sizes: Sizes, removed: Mapping[int, Mapping[str, int]], round_to: int, progress: float
) -> Kept:
    """Keep the most important units of each block, after a share of the way to the numbers that go."""
    bundles, gone = {}, {}
    for index, by_kind in values.items():
        for name, scores in by_kind.items():
            size, multiple = sizes[index][name], round_to if name == MLP else 1
            bundles[index, name] = _bundles(scores, size, 1)
            # Between steps, too, the channels that stay are a multiple.
            stays = math.ceil((size.count - int(removed[index][name] * progress)) / multiple) * multiple
            gone[index, name] = max(size.count - stays, 0)
    return _units_behind(bundles, gone)


def _units_behind(bundles: Mapping[Place, Sequence[Sequence[int]]], gone: Mapping[Place, int]) -> Kept:
    """List the units of the bundles that stay when the first `gone` of each place go."""
    kept: Kept = {}
    for (index, name), ordered in bundles.items():
        stays = sorted(unit for bundle in ordered[gone[index, name] :] for unit in bundle)
        kept.setdefault(index, {})[name] = tuple(stays)
    return kept


def _bundles(scores: Sequence[float], size: KindSize, width: int) -> list[list[int]]:
    """Group units in the order in which they go, `width` of them at once, of every expert where they are stacked.

    The first bundle takes the remainder, so that what stays is always a multiple of `width`.
    """
    orders = [
        sorted(range(part * size.count, (part + 1) * size.count), key=lambda unit: (scores[unit], unit))
        for part in range(size.partitions)
    ]
    starts = [0, *range(size.count % width or width, size.count, width)]
    return [[unit for order in orders for unit in order[a:b]] for a, b in itertools.pairwise([*starts, size.count])]


# ---- global selection


class _Ranking:
    """Bundles of units over all blocks, the least important per parameter first.

    A bundle is a key/value group, an expert, or `round_to` channels of one block that are adjacent in its ranking.
    `gone` counts those of each place that earlier steps removed; `order` lists place and position of all others.
    """

    def __init__(self, values: Values, sizes: Sizes, round_to: int) -> None:
        self.parameters: dict[tuple[Place, int], int] = {}
        self.bundles: dict[Place, list[list[int]]] = {}
        self.gone: dict[Place, int] = {}
        ranked: list[tuple[float, int, str, int]] = []
        for index, by_kind in values.items():
            for name, scores in by_kind.items():
                size = sizes[index][name]
                bundles = self.bundles[index, name] = _bundles(scores, size, round_to if name == MLP else 1)
                gone = self.gone[index, name] = sum(scores[bundle[0]] == float("-inf") for bundle in bundles)
                weight = size.parameters / size.partitions
                for position, bundle in enumerate(bundles):
                    self.parameters[(index, name), position] = size.parameters * len(bundle) // size.partitions
                    if gone <= position < len(bundles) - size.least:
                        score = sum(scores[unit] for unit in bundle) / (weight * len(bundle))
                        ranked.append((score, index, name, position))
        self.order = [((index, name), position) for _, index, name, position in sorted(ranked)]


def _select_global(values: Values, sizes: Sizes, target: int, round_to: int, is_last: bool) -> Kept:
    """Remove the bundles of least importance per parameter wherever they are."""
    ranking = _Ranking(values, sizes, round_to)
    has_channels = any(name == MLP for _, name in ranking.bundles)
    finest, gone = smallest_step(sizes, round_to), dict(ranking.gone)
    removed = sum(ranking.parameters[place, position] for place, count in gone.items() for position in range(count))
    for place, position in ranking.order:
        parameters = ranking.parameters[place, position]
        # Bundles of a block go in order; one that was too large for what is left keeps its successors.
        if removed + parameters <= target + finest // 2 and gone[place] == position:
            gone[place] += 1
            removed += parameters
        elif not (has_channels or is_last):
            break  # what would fill the gap before an expert is wanted at the end
    if has_channels:
        _correct_with_coarse_units(ranking, gone, removed, target, finest)
    elif is_last:
        gone = _nearest_without_channels(ranking, sizes, target, gone)
    return _units_behind(ranking.bundles, gone)


def _correct_with_coarse_units(
    ranking: _Ranking, gone: dict[Place, int], removed: int, target: int, finest: int
) -> None:
    """Where channels do not suffice, remove coarse units although they are too large, and give channels back."""
    for place, position in ranking.order:
        if target - removed <= finest:
            break
        if place[1] != MLP and gone[place] == position:
            gone[place] += 1
            removed += ranking.parameters[place, position]
    for place, position in reversed(ranking.order):
        parameters = ranking.parameters[place, position]
        went_last = place[1] == MLP and gone[place] == position + 1
        if went_last and removed - target > parameters // 2:
            gone[place] -= 1
            removed -= parameters


def _nearest_without_channels(
    ranking: _Ranking, sizes: Sizes, target: int, gone: Mapping[Place, int]
) -> dict[Place, int]:
    """Remove the least important of each kind, in numbers that come as near the target as one head.

    Of the experts about as many go as by importance alone.
    """

    def totals_of(counts: Mapping[Place, int]) -> dict[str, int]:
        return {name: sum(count for (_, kind), count in counts.items() if kind == name) for _, name in counts}

    before, wanted = totals_of(ranking.gone), totals_of(gone)
    coarsest = next(name for name in COARSE if name in wanted)
    totals = nearest_totals(sizes, target, lambda totals: abs(totals[coarsest] - wanted[coarsest]), before)
    left = {name: count - before[name] for name, count in totals.items()}
    counts = dict(ranking.gone)
    for place, position in ranking.order:
        if left[place[1]] > 0 and counts[place] == position:
            counts[place] += 1
            left[place[1]] -= 1
    return counts
