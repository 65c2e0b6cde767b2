"""Select the units to keep, so that the least important are removed.

The requested share of parameters is met to within one MLP channel, or `round_to` channels; without
channels, to within a key/value group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    step_of,
)

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
    """Select the units to keep, so that the share `progress` of `target` parameters is removed.

    `values` are importances, -inf for units that an earlier step removed. `per_layer` removes the
    same share from every block, `global` the units of least importance per parameter from any
    block. The number of kept channels is a multiple of `round_to`, and with `uniform` the same in
    every block. Raise `RateTooHigh` if so many parameters cannot be removed.
    """
    _check_round_to(sizes, round_to)
    most = most_removable(sizes, round_to)
    if target > most + smallest_step(sizes, round_to) // 2:
        raise RateTooHigh(target, most)
    if selection == "global":
        return _select_global(values, sizes, round(target * progress), round_to)
    removed = counts_per_layer(sizes, target, round_to, uniform)
    return _keep_most_important(values, removed, round_to, progress)


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
    (`prune_local` in the `metapruner.py` of LLM-Pruner). Raise `UserError` if that removes all
    units of a kind or none at all, or cannot be `uniform`.
    """
    _check_round_to(sizes, round_to)
    removed: dict[int, dict[str, int]] = {index: {} for index in sizes}
    for index, kinds in sizes.items():
        for name, size in kinds.items():
            count = units_at_rate(size, layer_rate, step_of(name, round_to))
            if count > size.most:
                raise UserError(
                    f"`prune.layer_rate` {layer_rate:g} leaves no {name} unit in block {index}: "
                    "lower it"
                )
            if uniform:
                _check_plain(size, size.count - count, layer_rate)
            removed[index][name] = count

    if not any(any(counts.values()) for counts in removed.values()):
        raise UserError(
            f"`prune.layer_rate` {layer_rate:g} removes no unit, as only whole ones, and channels "
            "in multiples of `prune.round_to`, can be: raise the rate, lower `prune.round_to`, or "
            "add mlp to `prune.units`"
        )
    return _keep_most_important(values, removed, round_to, progress)


def _check_round_to(sizes: Sizes, round_to: int) -> None:
    widths = [kinds[MLP].count for kinds in sizes.values() if MLP in kinds]
    narrowest = min(widths, default=round_to)
    if round_to > narrowest:
        raise UserError(
            f"`prune.round_to` must be at most {narrowest}, the narrowest block's channels, got "
            f"{round_to}"
        )


def _check_plain(size: KindSize, left: int, layer_rate: float) -> None:
    if size.plain and left not in size.plain:
        allowed = " or ".join(map(str, size.plain))
        raise UserError(
            f"`prune.uniform`: `layer_rate` {layer_rate:g} leaves {left} key/value groups in a "
            f"block, not {allowed}, with which the model loads without qpruner: give `prune.rate` "
            "instead, or set `prune.uniform: false`"
        )


def units_at_rate(size: KindSize, layer_rate: float, round_to: int = 1) -> int:
    """Count the units of one kind that a block loses at a given `prune.layer_rate`."""
    rows = size.count * size.rows
    removed = (rows - int(rows * (1 - layer_rate))) // size.rows
    if round_to == 1:
        return removed
    bundles = max(round((size.count - removed) / round_to), 1)
    return max(size.count - bundles * round_to, 0)


def _keep_most_important(
    values: Values, removed: Mapping[int, Mapping[str, int]], round_to: int, progress: float
) -> Kept:
    """Keep the most important units of each block.

    Only the share `progress` of the numbers in `removed` is removed.
    """
    kept: Kept = {}
    for index, by_kind in values.items():
        kept[index] = {}
        for name, scores in by_kind.items():
            # After every step the number of kept channels is a multiple of `round_to`.
            step = step_of(name, round_to)
            num_kept = len(scores) - int(removed[index][name] * progress)
            num_kept = math.ceil(num_kept / step) * step
            num_removed = max(len(scores) - num_kept, 0)
            kept[index][name] = tuple(sorted(_by_importance(scores)[num_removed:]))
    return kept


def _by_importance(scores: Sequence[float]) -> list[int]:
    """List units, least important first."""
    return sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))


# ---- global selection


class _Bundle(NamedTuple):
    """Units of a place that are removed together: a key/value group, or `round_to` channels.

    Tuples are ordered by importance.
    """

    importance: float  # mean per parameter
    block: int
    kind: str
    number: int  # among the bundles of its place, least important first
    units: list[int]
    parameters: int

    @property
    def place(self) -> Place:
        return self.block, self.kind


def _bundles(place: Place, scores: Sequence[float], size: KindSize, width: int) -> list[_Bundle]:
    """Group units into bundles of `width`, least important first; the first takes the remainder."""
    order = _by_importance(scores)
    first = size.count % width or width
    parts = [order[:first]]
    for start in range(first, size.count, width):
        parts.append(order[start : start + width])

    bundles = []
    for number, units in enumerate(parts):
        parameters = size.parameters * len(units)
        bundle = _Bundle(
            importance=sum(scores[unit] for unit in units) / parameters,
            block=place[0],
            kind=place[1],
            number=number,
            units=units,
            parameters=parameters,
        )
        bundles.append(bundle)
    return bundles


def _select_global(values: Values, sizes: Sizes, target: int, round_to: int) -> Kept:
    """Remove the bundles of least importance per parameter, from any block.

    The bundles of a place are removed in order, and its last bundle stays.
    """
    bundles: dict[Place, list[_Bundle]] = {}
    num_cut: dict[Place, int] = {}
    order: list[_Bundle] = []  # those that may go, least important per parameter first
    removed = 0  # parameters
    for index, by_kind in values.items():
        for kind, scores in by_kind.items():
            place = (index, kind)
            of_place = _bundles(place, scores, sizes[index][kind], step_of(kind, round_to))
            # Earlier steps removed units whose score is -inf.
            gone = [bundle for bundle in of_place if scores[bundle.units[0]] == -math.inf]
            bundles[place] = of_place
            num_cut[place] = len(gone)
            removed += sum(bundle.parameters for bundle in gone)
            order += of_place[len(gone) : -1]
    order.sort()

    tolerance = smallest_step(sizes, round_to)
    for bundle in order:
        # A bundle that is too large also keeps its successors.
        fits = removed + bundle.parameters <= target + tolerance // 2
        if fits and num_cut[bundle.place] == bundle.number:
            num_cut[bundle.place] += 1
            removed += bundle.parameters

    # Coarse units go until at most `tolerance` parameters are missing.
    kinds = {kind for _, kind in bundles}
    finest = MLP if MLP in kinds else ATTENTION
    for bundle in order:
        if target - removed <= tolerance:
            break
        if bundle.kind != finest and num_cut[bundle.place] == bundle.number:
            num_cut[bundle.place] += 1
            removed += bundle.parameters

    # Fine units come back while more than the target is removed.
    for bundle in reversed(order):
        is_surplus = removed - target > bundle.parameters // 2
        is_last_removed = num_cut[bundle.place] == bundle.number + 1
        if is_surplus and bundle.kind == finest and is_last_removed:
            num_cut[bundle.place] -= 1
            removed -= bundle.parameters

    kept: Kept = {index: {} for index in values}
    for (index, kind), of_place in bundles.items():
        stays = [unit for bundle in of_place[num_cut[index, kind] :] for unit in bundle.units]
        kept[index][kind] = tuple(sorted(stays))
    return kept
