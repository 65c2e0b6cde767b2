"""The prune step: drop blocks, then score, select, compensate and cut, once or in several steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qpruner.config.pruning import MOST_OF_BLOCKS
from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import Samples
from qpruner.errors import TrainingDiverged, UserError
from qpruner.models.families import ATTENTION, EXPERT, MLP, UnitKind, family_of
from qpruner.models.layout import num_layers, skeleton
from qpruner.pruning.compensation import new_biases
from qpruner.pruning.depth import num_blocks_to_drop
from qpruner.pruning.evidence import Evidence, Measured, Unweighed
from qpruner.pruning.importance import Scores, check_weights
from qpruner.pruning.selection import (
    Kept,
    Sizes,
    TooMuch,
    layer_range,
    plain_counts,
    select,
    select_rate,
    unit_sizes,
    units_at_rate,
)
from qpruner.pruning.surgery import check_not_shared, cut, keep_blocks
from qpruner.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPED_MATMUL_MULTIPLE = 8
"""Channels of a stacked expert come in multiples of this: `torch._grouped_mm` (2.13) refuses strides that are no
multiple of 16 bytes."""
GONE = float("-inf")
"""Score of a unit that an earlier step removed."""


@dataclass(frozen=True)
class Cut:
    """A cut as planned: its settings as this model takes them, and the config that is expected after it."""

    settings: PruneConfig
    expected: Any


@dataclass(frozen=True)
class Pruned:
    """The cut model and what it kept, by block of the base model.

    Attributes:
        model: The smaller model.
        kept: Units that stay; blocks that were not cut are not listed.
        dropped_blocks: Blocks that went whole.
        scores: Importance of every unit, as measured before the first cut of one, whole blocks gone.
        block_scores: Importance of every block that might have gone whole.
        parameters_before: Parameters of the base model, tied ones once.
        parameters_after: Parameters of the smaller model.
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
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Pruned:
    """Cut the least important units until the asked share of all parameters is gone.

    Args:
        model: Dense model; it is cut in place.
        settings: Rate, criterion, selection, compensation, range of blocks.
        samples: Calibration samples.
        seed: Of the random control.
        told: Told what is measured, and how much of it is done.

    Raises:
        UserError: If the rate cannot be met, or the model shares weights that a cut would break.
        TrainingDiverged: Naming the weight, gradient or importance that is NaN or infinite.
    """
    check_weights(model)
    settings = settled(model.config, settings)
    return cut_by(Measured(settings, samples, seed, told), model, settings)


def planned_cut(model_config: Any, settings: PruneConfig) -> Cut:
    """Settle the settings for this model and compute the config after the cut.

    Raises:
        UserError: For everything about the settings that this model cannot meet.
    """
    settings = settled(model_config, settings)
    return Cut(settings, expected_config(model_config, settings))


def expected_config(model_config: Any, settings: PruneConfig) -> Any:
    """The config after pruning, with no weights read; where scores decide on widths, what it would be on average.

    Raises:
        UserError: For everything about the settings that this model cannot meet.
    """
    if settings.is_off:
        cuttable_layers(model_config, settings)
        return model_config
    settings = settled(model_config, settings)
    check_settings(model_config, settings)
    equal = settings.model_copy(update={"selection": "per_layer", "steps": 1})
    return cut_by(Unweighed(equal), skeleton(copy.deepcopy(model_config)), equal).model.config


def cut_by(evidence: Evidence, model: PreTrainedModel, settings: PruneConfig) -> Pruned:
    """Drop blocks, then choose, make up for and cut units, as some evidence says.

    Args:
        evidence: Importance, and how what stays makes up for what goes.
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
    asked = round((settings.rate or 0.0) * before)
    blocks, block_scores = list(range(num_layers(model.config))), {}
    gone: set[int] = set()
    if settings.drops_blocks:
        block_scores = evidence.of_blocks(model, layers)
        order = sorted(layers, key=lambda index: block_scores[index])
        gone = set(order[: num_dropped(model, settings, order)])
        evidence.make_up_for_blocks(model, gone, layers)
        blocks, layers = _drop_blocks(model, layers, gone)
    kept: Kept = {}
    scores: Scores = {}
    if settings.width_units:
        target = width_target(model, settings, layers, before)
        with _beside_blocks(len(gone)):
            sizes = unit_sizes(model, layers, settings.width_units)
            try:
                kept, scores = _cut_widths(evidence, model, settings, sizes, target)
            except TooMuch as error:
                if gone:  # at a lower rate fewer blocks go, too
                    raise UserError(str(error)) from error
                most = math.floor(1000 * (asked - target + error.most) / before) / 1000
                raise UserError(f"{error}; as it is, a rate of {most:g} is the most") from error
    return Pruned(
        model,
        {blocks[index]: by_kind for index, by_kind in kept.items()},
        before,
        num_parameters(model),
        tuple(sorted(gone)),
        {blocks[index]: by_kind for index, by_kind in scores.items()},
        block_scores,
    )


def cuttable_layers(model_config: Any, settings: PruneConfig) -> tuple[int, ...]:
    """The blocks that may be cut; `UserError` when the model does not have those of the settings."""
    return layer_range(settings.first_layer, settings.last_layer, num_layers(model_config), settings.protected_layers)


@contextmanager
def _beside_blocks(count: int) -> Iterator[None]:
    """Errors say that blocks went before what they tell of."""
    try:
        yield
    except (UserError, TrainingDiverged) as error:
        if not count:
            raise
        blocks = counted(count, "whole block")
        raise type(error)(f"{error} (once {blocks} went: numbers of parameters and blocks are without them)") from error


def _drop_blocks(model: PreTrainedModel, layers: Sequence[int], gone: set[int]) -> tuple[list[int], tuple[int, ...]]:
    """Remove whole blocks; returns the base model's index of each that stays, and where the rest of `layers` now is."""
    blocks = [index for index in range(num_layers(model.config)) if index not in gone]
    keep_blocks(model, blocks)
    return blocks, tuple(new for new, old in enumerate(blocks) if old in layers)


def _cut_widths(
    evidence: Evidence,
    model: PreTrainedModel,
    settings: PruneConfig,
    sizes: Sizes,
    target: int,
) -> tuple[Kept, Scores]:
    """Cut units in `settings.num_steps` steps; importance is measured anew before each."""
    layers = tuple(sizes)
    alive: Kept = {
        index: {name: tuple(range(size.count * size.partitions)) for name, size in kinds.items()}
        for index, kinds in sizes.items()
    }
    first: Scores = {}
    for step in range(1, settings.num_steps + 1):
        scores = evidence.of_units(model, layers)
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
        evidence.make_up(model, present)
        cut(model, present, evidence.telling("cutting"))
        alive = kept
    return alive, first


def choose(values: Any, sizes: Sizes, settings: PruneConfig, target: int, progress: float = 1.0) -> Kept:
    """The units that stay under `settings`, after a share of the way."""
    if settings.layer_rate is not None:
        if settings.uniform:
            _check_plain(sizes, settings.layer_rate)
        return select_rate(values, sizes, settings.layer_rate, settings.round_to, progress)
    return select(values, sizes, target, settings.selection, settings.round_to, settings.uniform, progress)


def _check_plain(sizes: Sizes, layer_rate: float) -> None:
    for size in (kinds[ATTENTION] for kinds in sizes.values() if ATTENTION in kinds):
        stays = size.count - units_at_rate(size, layer_rate)
        if size.plain and stays not in size.plain:
            raise UserError(
                f"`prune.uniform`: `layer_rate` {layer_rate:g} leaves {stays} key/value groups in a block, but a plain "
                f"checkpoint of this family can have {', '.join(map(str, size.plain))}: give `rate` instead, or set "
                "`uniform: false`"
            )


def width_target(model: PreTrainedModel, settings: PruneConfig, layers: Sequence[int], before: int) -> int:
    """Parameters that must go out of blocks when the whole blocks are gone; new biases have to be made up for."""
    family = family_of(model.config)
    hidden = [
        model.get_submodule(f"{family.block_path(index)}.{linear}").out_features
        for linear in new_biases(model, settings, layers)
        for index in range(num_layers(model.config))
    ]
    asked: int = round((settings.rate or 0.0) * before)
    return int(max(asked - (before - num_parameters(model)) + sum(hidden), 0))


def num_dropped(model: PreTrainedModel, settings: PruneConfig, order: Sequence[int]) -> int:
    """How many blocks go whole, of those that may go in the order in which they would.

    Raises:
        UserError: If the rate is too small for one block or leaves none.
    """
    sizes = block_sizes(model, order)
    share = settings.block_rate
    count = num_blocks_to_drop(share, num_parameters(model), sizes)
    # Finer units can take more away, not give it back.
    while settings.width_units and sum(sizes[:count]) > (settings.rate or 0.0) * num_parameters(model):
        count -= 1
    one = sizes[0] / num_parameters(model)
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
            f"{' (the most, unless `prune.depth_share` says more)' if is_most else ''}, but one block has {one:.2%}: "
            f"{remedy}, or take `block` out of `prune.units`"
        )
    if abs(sum(sizes[:count]) - share * num_parameters(model)) > max(sizes):
        raise UserError(
            f"`prune.rate`: whole blocks are to take {share:.2%} of all parameters, but the {len(sizes)} blocks that "
            f"may go have {sum(sizes) / num_parameters(model):.2%} and one must stay: lower the rate or widen the range"
        )
    return count


def block_sizes(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Parameters of each of some blocks."""
    family = family_of(model.config)
    return [num_parameters(model.get_submodule(family.block_path(index))) for index in layers]


def check_settings(model_config: Any, settings: PruneConfig) -> None:
    """Refuse what this model's family cannot do, and blocks that it does not have.

    Raises:
        UserError: Naming the key and the remedy.
    """
    family, count = family_of(model_config), num_layers(model_config)
    layers, stacked = cuttable_layers(model_config, settings), _stacked(model_config, settings)
    by_linear = [
        f"{key} {value} ({remedy})"
        for key, value, remedy, looks_at_linears in (
            ("importance", settings.importance, "fisher, taylor, magnitude or random", settings.looks_at_linears),
            ("aggregation", settings.aggregation, "element", settings.aggregation == "vector"),
            ("compensation", settings.compensates_by, "none", settings.compensates_by != "none"),
        )
        if looks_at_linears
    ]
    if stacked and by_linear:
        raise UserError(
            f"`prune`: the experts of a {family.model_type} model are stacked in one parameter "
            f"({stacked[0].slices[0].parameter}), which no linear layer holds; what looks at linear layers cannot be "
            f"used: {', '.join(by_linear)}; take the ones in brackets, or `prune.units: [attention]`"
        )
    if any(kind.name == MLP for kind in stacked) and settings.round_to % GROUPED_MATMUL_MULTIPLE:
        raise UserError(
            f"`prune.round_to` must be a multiple of {GROUPED_MATMUL_MULTIPLE} for the experts of a "
            f"{family.model_type} model, got {settings.round_to}: torch's grouped matrix product takes rows of whole "
            "16 bytes only"
        )
    obstacle = None if settings.width_units else _obstacle(model_config, settings)
    if obstacle and settings.compensates_by == "least_squares":
        what, why, remedy = obstacle
        raise UserError(f"`prune.compensation`: {what} cannot have least squares, for {why}: take it out, or {remedy}")
    if settings.uniform:
        _check_uniform(model_config, settings, layers, count)


def settled(model_config: Any, settings: PruneConfig) -> PruneConfig:
    """With defaults in place of keys that have no effect, the number of steps and, where none is named, the
    compensation that this model can have."""
    settings = settings.in_effect()
    settings = settings.model_copy(update={"steps": settings.num_steps})
    if settings.compensation is not None:
        return settings
    obstacle = _obstacle(model_config, settings)
    return settings.model_copy(update={"compensation": "none" if obstacle else "least_squares"})


def _obstacle(model_config: Any, settings: PruneConfig) -> tuple[str, str, str] | None:
    """What nothing can make up for, why, and what to cut instead; None where nothing stands in the way."""
    family = family_of(model_config)
    if _stacked(model_config, settings):
        why = "they are stacked in one parameter"
        return f"experts of a {family.model_type} model", why, "take `prune.units: [attention]`"
    if not settings.width_units and family.residual_factor(model_config) is None:
        why = "behind its MLP there is a norm, or experts stand in its place"
        return f"the whole blocks of a {family.model_type} model", why, f"name `{ATTENTION}` in `prune.units`, too"
    return None


def _stacked(model_config: Any, settings: PruneConfig) -> list[UnitKind]:
    """Kinds of unit that may go, block by block, whose weights no linear layer holds."""
    family = family_of(model_config)
    return [
        kind
        for index in range(num_layers(model_config))
        for kind in family.unit_kinds(model_config.per_layer_config[index], index)
        if kind.name in settings.width_units and (kind.partitions > 1 or kind.name == EXPERT)
    ]


def are_alike(model_config: Any) -> bool:
    """Whether all blocks of a model have the same units."""
    family = family_of(model_config)
    first, *others = (
        family.unit_kinds(model_config.per_layer_config[index], index) for index in range(num_layers(model_config))
    )
    return all(kinds == first for kinds in others)


def _check_uniform(model_config: Any, settings: PruneConfig, layers: Sequence[int], count: int) -> None:
    family = family_of(model_config)
    if len(layers) < count and settings.width_units:
        raise UserError(
            f"`prune.uniform`: all {count} blocks must be cut alike, but only {len(layers)} may be cut: leave "
            "`prune.first_layer`, `prune.last_layer` and `prune.protected_layers` out, or set `uniform: false`"
        )
    kinds = family.unit_kinds(model_config.per_layer_config[0], 0)
    if not are_alike(model_config):
        raise UserError("`prune.uniform`: the blocks of this model are not alike to begin with: set `uniform: false`")
    if ATTENTION in settings.width_units and len(plain_counts(model_config, 0)) < 2:
        raise UserError(
            f"`prune.uniform`: no plain {family.model_type} checkpoint can have fewer heads, for its hidden size must "
            f"be made up of them: set `prune.units: [{MLP}]`, or `uniform: false`"
        )
    if settings.compensates_by != "bias":
        return
    block = skeleton(model_config).get_submodule(family.block_path(0))
    outputs = [block.get_submodule(kind.output_linear) for kind in kinds if kind.output_linear]
    if any(output.bias is None for output in outputs):
        raise UserError(
            f"`prune.compensation`: a plain {family.model_type} checkpoint (`prune.uniform`) has no place for output "
            "biases: use least_squares or none"
        )


def _spread(scores: list[float], alive: tuple[int, ...], size: Any) -> list[float]:
    """Scores of the present units as scores of the base model's; units that are gone come first to go."""
    spread = [GONE] * (size.count * size.partitions)
    for unit, value in zip(alive, scores, strict=True):
        spread[unit] = value
    return spread


def _positions(alive: tuple[int, ...], kept: tuple[int, ...]) -> tuple[int, ...]:
    """Where the units that stay stand among those that are there now."""
    position = {unit: index for index, unit in enumerate(alive)}
    return tuple(position[unit] for unit in kept)


def num_parameters(model: Any) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
