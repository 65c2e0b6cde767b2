"""The prune step: drop blocks, then score, select, compensate and cut, once or in several steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qpruner.config.pruning import MOST_OF_BLOCKS, PruneConfig
from qpruner.data.calibration import Samples
from qpruner.errors import TrainingDiverged, UserError
from qpruner.models.families import ATTENTION, family_of
from qpruner.models.layout import num_layers, skeleton
from qpruner.pruning.compensation import new_biases
from qpruner.pruning.criteria import CalibratedCriteria, OnWork, ShapeCriteria
from qpruner.pruning.depth import num_blocks_to_drop
from qpruner.pruning.importance import Scores, check_weights
from qpruner.pruning.selection import select, select_rate, units_at_rate
from qpruner.pruning.settings import check_settings, cuttable_layers, settled
from qpruner.pruning.surgery import check_not_shared, cut, keep_blocks
from qpruner.pruning.units import Kept, KindSize, Sizes, TooMuch, Values, unit_sizes
from qpruner.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GONE = float("-inf")
"""Score of a unit that an earlier step removed."""


@dataclass(frozen=True)
class Cut:
    """A planned cut: the settings as this model takes them, and the config that is expected after it."""

    settings: PruneConfig
    expected: Any


@dataclass(frozen=True)
class Pruned:
    """The cut model and what it kept, by block of the base model.

    Attributes:
        model: The smaller model.
        kept: Units that stay; blocks that were not cut are not listed.
        parameters_before: Parameters of the base model, tied ones once.
        parameters_after: Parameters of the smaller model.
        dropped_blocks: Blocks that went whole.
        scores: Importance of every unit, measured before the first cut of one, whole blocks gone.
        block_scores: Importance of every block that might have gone whole.
    """

    model: PreTrainedModel
    kept: Kept
    parameters_before: int
    parameters_after: int
    dropped_blocks: tuple[int, ...] = ()
    scores: Scores = field(default_factory=dict)
    block_scores: dict[int, float] = field(default_factory=dict)


def prune(
    model: PreTrainedModel,
    settings: PruneConfig,
    samples: Samples,
    seed: int = 0,
    on_work: OnWork = lambda work, done, total: None,
) -> Pruned:
    """Cut the least important units until the asked share of all parameters is gone.

    Args:
        model: Dense model; it is cut in place.
        settings: Rate, criterion, selection, compensation, range of blocks.
        samples: Calibration samples.
        seed: Of the random control.
        on_work: Told what is measured, and how much of it is done.

    Raises:
        UserError: If the rate cannot be met, or the model shares weights that a cut would break.
        TrainingDiverged: Naming the weight, gradient or importance that is NaN or infinite.
    """
    check_weights(model)
    settings = settled(model.config, settings)
    return prune_by(CalibratedCriteria(settings, samples, seed, on_work), model, settings)


def planned_cut(model_config: Any, settings: PruneConfig) -> Cut:
    """Settle the settings for this model and compute the config after the cut.

    Raises:
        UserError: For everything about the settings that this model cannot meet.
    """
    settings = settled(model_config, settings)
    return Cut(settings, expected_config(model_config, settings))


def expected_config(model_config: Any, settings: PruneConfig) -> Any:
    """Compute the config after pruning without weights; where scores decide on widths, their average.

    Raises:
        UserError: For everything about the settings that this model cannot meet.
    """
    if settings.is_off:
        cuttable_layers(model_config, settings)
        return model_config
    settings = settled(model_config, settings)
    check_settings(model_config, settings)
    equal = settings.model_copy(update={"selection": "per_layer", "steps": 1})
    return prune_by(ShapeCriteria(equal), skeleton(copy.deepcopy(model_config)), equal).model.config


def prune_by(criteria: ShapeCriteria, model: PreTrainedModel, settings: PruneConfig) -> Pruned:
    """Drop blocks, then select, compensate and cut units by some criteria.

    Args:
        criteria: Importance, and how what stays makes up for what goes.
        model: Dense model, or one on the meta device; it is cut in place.
        settings: Rate, selection, kinds of unit, range of blocks.

    Raises:
        UserError: If the rate cannot be met, or the model shares weights that a cut would break.
    """
    before = num_parameters(model)
    if settings.is_off:
        return Pruned(model, {}, before, before)
    check_not_shared(model)
    check_settings(model.config, settings)
    layers = cuttable_layers(model.config, settings)
    blocks, block_scores = list(range(num_layers(model.config))), {}
    gone: set[int] = set()
    if settings.drops_blocks:
        block_scores = criteria.score_blocks(model, layers)
        order = sorted(layers, key=lambda index: block_scores[index])
        gone = set(order[: _num_dropped(model, settings, order)])
        criteria.compensate_blocks(model, gone, layers)
        blocks = [index for index in blocks if index not in gone]
        keep_blocks(model, blocks)
        layers = tuple(new for new, old in enumerate(blocks) if old in layers)
    kept: Kept = {}
    scores: Scores = {}
    if settings.width_units:
        target = _width_target(model, settings, layers, before)
        with _after_blocks_went(len(gone)), _with_highest_rate(settings, target, before, bool(gone)):
            kept, scores = _cut_widths(criteria, model, settings, layers, target)
    return Pruned(
        model,
        {blocks[index]: by_kind for index, by_kind in kept.items()},
        before,
        num_parameters(model),
        tuple(sorted(gone)),
        {blocks[index]: by_kind for index, by_kind in scores.items()},
        block_scores,
    )


@contextmanager
def _after_blocks_went(count: int) -> Iterator[None]:
    """Add to errors that blocks went before what they report."""
    try:
        yield
    except (UserError, TrainingDiverged) as error:
        if not count:
            raise
        blocks = counted(count, "whole block")
        raise type(error)(f"{error} (once {blocks} went: numbers of parameters and blocks are without them)") from error


@contextmanager
def _with_highest_rate(settings: PruneConfig, target: int, before: int, has_dropped: bool) -> Iterator[None]:
    """Add the highest possible rate to the error of one that is too high."""
    try:
        yield
    except TooMuch as error:
        if has_dropped:  # at a lower rate fewer blocks go, too
            raise UserError(str(error)) from error
        asked = round((settings.rate or 0.0) * before)
        most = math.floor(1000 * (asked - target + error.most) / before) / 1000
        raise UserError(f"{error}; as it is, a rate of {most:g} is the most") from error


def _cut_widths(
    criteria: ShapeCriteria, model: PreTrainedModel, settings: PruneConfig, layers: Sequence[int], target: int
) -> tuple[Kept, Scores]:
    """Cut units in `settings.num_steps` steps; importance is measured anew before each."""
    sizes = unit_sizes(model, layers, settings.width_units)
    alive: Kept = {
        index: {name: tuple(range(size.count * size.partitions)) for name, size in kinds.items()}
        for index, kinds in sizes.items()
    }
    first: Scores = {}
    for step in range(1, settings.num_steps + 1):
        scores = criteria.score_units(model, layers)
        first = first or scores
        values = {
            index: {
                name: _spread(scores[index][name].tolist(), alive[index][name], size) for name, size in kinds.items()
            }
            for index, kinds in sizes.items()
        }
        kept = choose(values, sizes, settings, target, step / settings.num_steps)
        present = {
            index: {name: _positions(alive[index][name], units) for name, units in by_kind.items()}
            for index, by_kind in kept.items()
        }
        criteria.compensate_units(model, present)
        cut(model, present, criteria.progress_of("cutting"))
        alive = kept
    return alive, first


def choose(values: Values, sizes: Sizes, settings: PruneConfig, target: int, progress: float = 1.0) -> Kept:
    """Select the units that stay under `settings`, after a share of the way."""
    if settings.layer_rate is None:
        return select(values, sizes, target, settings.selection, settings.round_to, settings.uniform, progress)
    if settings.uniform:
        _check_plain(sizes, settings.layer_rate)
    return select_rate(values, sizes, settings.layer_rate, settings.round_to, progress)


def _check_plain(sizes: Sizes, layer_rate: float) -> None:
    """Refuse a rate that leaves a number of heads that no plain checkpoint can have."""
    for size in (kinds[ATTENTION] for kinds in sizes.values() if ATTENTION in kinds):
        stays = size.count - units_at_rate(size, layer_rate)
        if size.plain and stays not in size.plain:
            raise UserError(
                f"`prune.uniform`: `layer_rate` {layer_rate:g} leaves {stays} key/value groups in a block, but a plain "
                f"checkpoint of this family can have {', '.join(map(str, size.plain))}: give `rate` instead, or set "
                "`uniform: false`"
            )


def _spread(scores: list[float], alive: tuple[int, ...], size: KindSize) -> list[float]:
    """Give scores of the present units the base model's numbers; units that are gone come first to go."""
    spread = [GONE] * (size.count * size.partitions)
    for unit, value in zip(alive, scores, strict=True):
        spread[unit] = value
    return spread


def _positions(alive: tuple[int, ...], kept: tuple[int, ...]) -> tuple[int, ...]:
    """Find the positions of the units that stay among the present ones."""
    position = {unit: index for index, unit in enumerate(alive)}
    return tuple(position[unit] for unit in kept)


def _width_target(model: PreTrainedModel, settings: PruneConfig, layers: Sequence[int], before: int) -> int:
    """Count the parameters that must go out of the remaining blocks; new biases have to be made up for."""
    family = family_of(model.config)
    hidden = [
        model.get_submodule(f"{family.block_path(index)}.{linear}").out_features
        for linear in new_biases(model, settings, layers)
        for index in range(num_layers(model.config))
    ]
    asked: int = round((settings.rate or 0.0) * before)
    return int(max(asked - (before - num_parameters(model)) + sum(hidden), 0))


def _num_dropped(model: PreTrainedModel, settings: PruneConfig, order: Sequence[int]) -> int:
    """Count the blocks that go whole, of those that may go in the order in which they would.

    Raises:
        UserError: If the rate is too small for one block or leaves none.
    """
    sizes, total, share = block_sizes(model, order), num_parameters(model), settings.block_rate
    count = num_blocks_to_drop(share, total, sizes)
    # Finer units can take more away, not give it back.
    while settings.width_units and sum(sizes[:count]) > (settings.rate or 0.0) * total:
        count -= 1
    if len(sizes) < 2:
        raise UserError(
            "`prune.units` names block, but only one block may go and one must stay: widen `prune.first_layer` / "
            "`prune.last_layer`, name fewer `prune.protected_layers`, or take `block` out"
        )
    if count < 1:
        is_most = bool(settings.width_units) and settings.depth_share is None and share == MOST_OF_BLOCKS
        beside = "raise the rate or `prune.depth_share`" if settings.width_units else "raise the rate"
        remedy = "give `prune.depth_share`" if is_most else beside
        raise UserError(
            f"`prune.rate`: whole blocks are to take {share:.2%} of all parameters"
            f"{' (the most, unless `prune.depth_share` says more)' if is_most else ''}, but one block has "
            f"{sizes[0] / total:.2%}: {remedy}, or take `block` out of `prune.units`"
        )
    if abs(sum(sizes[:count]) - share * total) > max(sizes):
        raise UserError(
            f"`prune.rate`: whole blocks are to take {share:.2%} of all parameters, but the {len(sizes)} blocks that "
            f"may go have {sum(sizes) / total:.2%} and one must stay: lower the rate or widen the range"
        )
    return count


def block_sizes(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Count the parameters of each of some blocks."""
    family = family_of(model.config)
    return [num_parameters(model.get_submodule(family.block_path(index))) for index in layers]


def num_parameters(model: Any) -> int:
    """Count the parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
