"""Select the units to keep, so that the least important are removed.

The requested share of parameters is met to within one MLP channel, or `round_to` channels; without
channels, to within a key/value group.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

from qpruner.errors import UserError
from qpruner.models.families import ATTENTION, MLP
from qpruner.pruning.allocation import counts_per_layer
from qpruner.pruning.units import (
    Kept,
    KindSize,
    RateTooHigh,
    Sizes,
    Values,
    most_removable,
    smallest_step,
)

Place = tuple[int, str]  # block index and kind of unit


def select(
    values: Values,
    sizes: Sizes,
    target: int,
    selection: str,
    round_to: int = 1,
    uniform: bool = False,
    progress: float = 1.0,
) -> Kept:
    """Select the units to keep, so that the share `progress` of `target` parameters is removed.

    `values` are importances, -inf for units that an earlier step removed. `per_layer` removes the
    same share from every block, `global` the units of least importance per parameter from any
    block. The number of kept channels is a multiple of `round_to`, and with `uniform` the same in
    every block.
    """
    _check_round_to(sizes, round_to)
    most = most_removable(sizes, round_to)
    if target > most + smallest_step(sizes, round_to) // 2:
        raise RateTooHigh(target, most)
    if selection == "global":
        return _select_global(values, sizes, round(target * progress), round_to)
    return _keep_most_important(
        values, sizes, counts_per_layer(sizes, target, round_to, uniform), round_to, progress
    )


def select_rate(
    values: Values,
    sizes: Sizes,
    layer_rate: float,
    round_to: int = 1,
    uniform: bool = False,
    progress: float = 1.0,
) -> Kept:
    """Select the units to keep when every block loses the share `layer_rate` of its units.

    Numbers are rounded as in LLM-Pruner: of ``C`` channels, and of ``C`` rows of the key
    projection, ``C - int(C * (1 - layer_rate))`` are removed, rounded down to whole heads
    (`prune_local` in the `metapruner.py` of LLM-Pruner).
    """
    _check_round_to(sizes, round_to)
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    for index, kinds in sizes.items():
        for name, size in kinds.items():
            removed[index][name] = count = units_at_rate(
                size, layer_rate, round_to if name == MLP else 1
            )
            if count > size.most:
                raise UserError(
                    f"`prune.layer_rate` {layer_rate:g} leaves no {name} unit in block {index}: lower it"
                )
            if uniform and size.plain and size.count - count not in size.plain:
                left = f"{size.count - count} key/value groups in a block, not {' or '.join(map(str, size.plain))}"
                why = f"`layer_rate` {layer_rate:g} leaves {left}, with which the model loads without qpruner"
                raise UserError(
                    f"`prune.uniform`: {why}: give `prune.rate` instead, or set `prune.uniform: false`"
                )
    if not any(count for of_block in removed.values() for count in of_block.values()):
        remedy = "raise the rate, lower `prune.round_to`, or add mlp to `prune.units`"
        whole = "as only whole ones, and channels in multiples of `prune.round_to`, can be"
        raise UserError(f"`prune.layer_rate` {layer_rate:g} removes no unit, {whole}: {remedy}")
    return _keep_most_important(values, sizes, removed, round_to, progress)


def _check_round_to(sizes: Sizes, round_to: int) -> None:
    narrowest = min(
        (kinds[MLP].count for kinds in sizes.values() if MLP in kinds), default=round_to
    )
    if round_to > narrowest:
        raise UserError(
            f"`prune.round_to` must be at most {narrowest}, the narrowest block's channels, got {round_to}"
        )


def units_at_rate(size: KindSize, layer_rate: float, round_to: int = 1) -> int:
    """Count the units of one kind that a block loses at a given `prune.layer_rate`."""
    rows = size.count * size.rows
    removed = (rows - int(rows * (1 - layer_rate))) // size.rows
    if round_to == 1:
        return removed
    return max(size.count - max(round((size.count - removed) / round_to), 1) * round_to, 0)


def _keep_most_important(
    values: Values,
    sizes: Sizes,
    removed: Mapping[int, Mapping[str, int]],
    round_to: int,
    progress: float,
) -> Kept:
    """Keep the most important units of each block.

    Only the share `progress` of the numbers in `removed` is removed.
    """
    bundles, num_cut = {}, {}
    for index, by_kind in values.items():
        for name, scores in by_kind.items():
            size, multiple = sizes[index][name], round_to if name == MLP else 1
            bundles[index, name] = _bundles(scores, size, 1)
            # After every step the number of kept channels is a multiple of `round_to`.
            stays = (
                math.ceil((size.count - int(removed[index][name] * progress)) / multiple) * multiple
            )
            num_cut[index, name] = max(size.count - stays, 0)
    return _kept_units(bundles, num_cut)


def _kept_units(
    bundles: Mapping[Place, Sequence[Sequence[int]]], num_cut: Mapping[Place, int]
) -> Kept:
    """List the units that stay when each place loses its first `num_cut` bundles (`_bundles`)."""
    kept: Kept = {}
    for (index, name), ordered in bundles.items():
        stays = sorted(unit for bundle in ordered[num_cut[index, name] :] for unit in bundle)
        kept.setdefault(index, {})[name] = tuple(stays)
    return kept


def _bundles(scores: Sequence[float], size: KindSize, width: int) -> list[list[int]]:
    """Group units into bundles of `width`, least important first; the first takes the remainder."""
    order = sorted(range(size.count), key=lambda unit: (scores[unit], unit))
    starts = [0, *range(size.count % width or width, size.count, width)]
    return [order[a:b] for a, b in itertools.pairwise([*starts, size.count])]


# ---- global selection


class _Ranking:
    """Rank the bundles of all blocks, least important per parameter first.

    A bundle is a key/value group, or `round_to` channels of adjacent scores in one block. `num_cut`
    counts those that earlier steps removed from a place; `order` lists the others by place and
    position in `bundles[place]`.
    """

    def __init__(self, values: Values, sizes: Sizes, round_to: int) -> None:
        self.parameters: dict[tuple[Place, int], int] = {}
        self.bundles: dict[Place, list[list[int]]] = {}
        self.num_cut: dict[Place, int] = {}
        ranked: list[tuple[float, int, str, int]] = []
        for index, by_kind in values.items():
            for name, scores in by_kind.items():
                size = sizes[index][name]
                bundles = self.bundles[index, name] = _bundles(
                    scores, size, round_to if name == MLP else 1
                )
                num_cut = self.num_cut[index, name] = sum(
                    scores[bundle[0]] == float("-inf") for bundle in bundles
                )
                for position, bundle in enumerate(bundles):
                    self.parameters[(index, name), position] = size.parameters * len(bundle)
                    if num_cut <= position < len(bundles) - 1:
                        score = sum(scores[unit] for unit in bundle) / (
                            size.parameters * len(bundle)
                        )
                        ranked.append((score, index, name, position))
        self.order = [((index, name), position) for _, index, name, position in sorted(ranked)]


def _select_global(values: Values, sizes: Sizes, target: int, round_to: int) -> Kept:
    """Remove the bundles of least importance per parameter, from any block."""
    ranking = _Ranking(values, sizes, round_to)
    finest, num_cut = smallest_step(sizes, round_to), dict(ranking.num_cut)
    removed = sum(
        ranking.parameters[place, position]
        for place, count in num_cut.items()
        for position in range(count)
    )
    for place, position in ranking.order:
        parameters = ranking.parameters[place, position]
        # The bundles of a place are removed in order, so a bundle that is too large also keeps its
        # successors.
        if removed + parameters <= target + finest // 2 and num_cut[place] == position:
            num_cut[place] += 1
            removed += parameters
    _correct_with_coarse_units(ranking, num_cut, removed, target, finest)
    return _kept_units(ranking.bundles, num_cut)


def _correct_with_coarse_units(
    ranking: _Ranking, num_cut: dict[Place, int], removed: int, target: int, tolerance: int
) -> None:
    """Remove coarse units until at most `tolerance` parameters are missing, then restore fine ones.

    Fine units are restored while more than the target is removed.
    """
    finest = MLP if any(name == MLP for _, name in num_cut) else ATTENTION
    for place, position in ranking.order:
        if target - removed <= tolerance:
            break
        if place[1] != finest and num_cut[place] == position:
            num_cut[place] += 1
            removed += ranking.parameters[place, position]
    for place, position in reversed(ranking.order):
        parameters = ranking.parameters[place, position]
        went_last = place[1] == finest and num_cut[place] == position + 1
        if went_last and removed - target > parameters // 2:
            num_cut[place] -= 1
            removed -= parameters
