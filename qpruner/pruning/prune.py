"""Prune a model in one or several steps.

Blocks are dropped first. Then units inside blocks are scored, selected, compensated for and cut.
"""

import copy
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from qpruner.config.pruning import PruneConfig
from qpruner.data.calibration import OnProgress, Samples
from qpruner.errors import TrainingDiverged, UserError
from qpruner.models.families import block_paths, family_of
from qpruner.models.layout import skeleton
from qpruner.models.loading import OnWork, ignore_progress
from qpruner.pruning.compensation import compensate, compensate_blocks
from qpruner.pruning.importance import Scores, block_importance, check_finite, score
from qpruner.pruning.selection import select, select_rate
from qpruner.pruning.settings import Cut, check_settings, cuttable_layers, settled
from qpruner.pruning.surgery import check_not_shared, cut, keep_blocks
from qpruner.pruning.units import (
    Kept,
    RateTooHigh,
    Sizes,
    Values,
    unit_kinds_of,
    unit_sizes,
)

IMPORTANCE_FILE = "importance.npz"


@dataclass
class FirstScores:
    """Hold the importance of a base model, measured once for cuts that differ in the rate only."""

    blocks: dict[int, float] = field(default_factory=dict)
    units: dict[tuple[int, ...], Scores] = field(default_factory=dict)
    """Dropped blocks -> scores of the units of the other blocks."""

    def add(self, arrays: Mapping[str, Any], dropped: tuple[int, ...]) -> None:
        """Add scores as `load_importance` returns them, by the block numbers of the base model."""
        for index, value in arrays.get("block", ()):
            self.blocks[int(index)] = float(value)

        by_block: Scores = {}
        for name, values in arrays.items():
            if name != "block":
                index, _, kind = name.partition(".")
                number = int(index) - sum(other < int(index) for other in dropped)
                by_block.setdefault(number, {})[kind] = torch.from_numpy(values)
        if by_block:
            self.units[dropped] = by_block


def save_importance(folder: Path, scores: Scores, blocks: Mapping[int, float]) -> None:
    """Save the importance of units and blocks to a file of NumPy arrays.

    The scores of a block's units are an array such as `7.mlp`. Those of whole blocks are the rows
    (index, score) of the array `block`.
    """
    arrays: dict[str, Any] = {}
    for index, by_kind in scores.items():
        for kind, values in by_kind.items():
            arrays[f"{index}.{kind}"] = values.numpy()
    if blocks:
        arrays["block"] = np.array(list(blocks.items()))
    np.savez_compressed(folder / IMPORTANCE_FILE, **arrays)


def load_importance(folder: Path) -> dict[str, Any]:
    """Load the arrays that `save_importance` saved."""
    with np.load(folder / IMPORTANCE_FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


class Criteria:
    """Score units and blocks, and compensate for those removed, on calibration samples.

    `seed` is for `importance: random`. Without samples (for a model without weights) all units
    score the same, and the later a block, the lower its score.
    """

    def __init__(
        self,
        settings: PruneConfig,
        samples: Samples | None = None,
        seed: int = 0,
        on_work: OnWork = ignore_progress,
        first: FirstScores | None = None,
    ) -> None:
        self._settings = settings
        self._samples = samples
        self._seed = seed
        self._on_work = on_work
        self._first = first or FirstScores()
        self._step = 0
        self._dropped: tuple[int, ...] = ()

    def score_blocks(self, model: PreTrainedModel, layers: Sequence[int]) -> dict[int, float]:
        """Score the blocks in `layers`."""
        samples = self._samples_for("importance of blocks")
        if samples is None:
            return {index: -float(index) for index in layers}
        if not self._first.blocks:
            self._first.blocks = block_importance(model, layers, samples)
        return self._first.blocks

    def compensate_blocks(
        self, model: PreTrainedModel, dropped: Collection[int], layers: Sequence[int]
    ) -> None:
        """Compensate for the blocks to drop if `prune.compensation` is least_squares."""
        self._dropped = tuple(sorted(dropped))
        samples = self._samples_for("compensation of blocks")
        if samples and self._settings.compensates_by == "least_squares":
            compensate_blocks(model, dropped, layers, self._settings.ridge, samples)

    def score_units(self, model: PreTrainedModel, layers: Sequence[int]) -> Scores:
        """Score the units of the blocks in `layers` by `prune.importance`."""
        self._step += 1
        samples = self._samples_for("importance")
        if samples is None:
            return _equal_scores(model, layers, self._settings.width_units)
        if self._step == 1 and self._dropped in self._first.units:
            return self._first.units[self._dropped]

        scores = score(model, layers, self._settings, samples, self._seed)
        if self._step == 1:
            self._first.units[self._dropped] = scores
        return scores

    def compensate_units(self, model: PreTrainedModel, kept: Kept) -> None:
        """Compensate for all units missing from `kept`, before they are cut."""
        samples = self._samples_for("compensation")
        if samples and self._settings.compensates_by == "least_squares":
            compensate(model, kept, self._settings.ridge, samples)

    def progress_of(self, work: str) -> OnProgress:
        """Return a callback that reports the progress of `work`, with the number of the step."""
        total = self._settings.num_steps
        if self._step and total > 1:
            work = f"{work}, step {self._step} of {total}"
        return partial(self._on_work, work)

    def _samples_for(self, work: str) -> Samples | None:
        return self._samples and replace(self._samples, on_progress=self.progress_of(work))


def _equal_scores(model: PreTrainedModel, layers: Sequence[int], units: Collection[str]) -> Scores:
    """Score all units of a kind the same."""
    scores: Scores = {}
    for index, kinds in unit_kinds_of(model.config, layers, units).items():
        scores[index] = {kind.name: torch.zeros(kind.num_units) for kind in kinds}
    return scores


@dataclass(frozen=True)
class Pruned:
    """Hold a pruned model and the units that it kept, by block index of the base model."""

    model: PreTrainedModel
    kept: Kept  # blocks that were not cut are not listed
    parameters_before: int  # tied parameters count once
    parameters_after: int
    dropped_blocks: tuple[int, ...] = ()
    scores: Scores = field(default_factory=dict)
    """Scores after blocks were dropped, before the first units were cut."""
    block_scores: dict[int, float] = field(default_factory=dict)
    """Score of every block that could have been dropped."""


def prune(
    model: PreTrainedModel,
    settings: PruneConfig,
    samples: Samples,
    seed: int = 0,
    on_work: OnWork = ignore_progress,
    first: FirstScores | None = None,
) -> Pruned:
    """Cut the least important units of a model in place until the requested share is removed.

    Cuts of one model that differ in their rate only may share `first`, which is filled by the first
    of them. Raise `UserError` if the rate cannot be met or the model shares weights that a cut
    would break, and `TrainingDiverged` if a weight, gradient or score is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        check_finite(parameter, f"the weight {name}")  # it would make every gradient NaN
    settings = settled(model.config, settings)
    return prune_by(Criteria(settings, samples, seed, on_work, first), model, settings)


def planned_cut(model_config: Any, settings: PruneConfig) -> Cut:
    """Fill in the defaults of the settings, and compute the config of the pruned model.

    No weights are read. If widths depend on scores, the config has average widths. Raise
    `UserError` if the model cannot be cut like this.
    """
    settings = settled(model_config, settings)
    if settings.is_off:
        cuttable_layers(model_config, settings)
        return Cut(settings, model_config)
    check_settings(model_config, settings)
    equal = settings.model_copy(update={"selection": "per_layer", "steps": 1})
    model = skeleton(copy.deepcopy(model_config))
    return Cut(settings, prune_by(Criteria(equal), model, equal).model.config)


def prune_by(criteria: Criteria, model: PreTrainedModel, settings: PruneConfig) -> Pruned:
    """Drop blocks, then select, compensate and cut units in place, by the scores of `criteria`."""
    before = num_parameters(model)
    if settings.is_off:
        return Pruned(model, {}, before, before)
    check_not_shared(model)
    check_settings(model.config, settings)
    layers = cuttable_layers(model.config, settings)
    blocks = list(range(model.config.num_hidden_layers))
    dropped: list[int] = []
    block_scores: dict[int, float] = {}
    if settings.drops_blocks:
        block_scores = criteria.score_blocks(model, layers)
        order = sorted(layers, key=block_scores.__getitem__)
        dropped = sorted(order[: _num_dropped(model, settings, order)])
        criteria.compensate_blocks(model, dropped, layers)
        blocks = [index for index in blocks if index not in dropped]
        keep_blocks(model, blocks)
        layers = tuple(new for new, old in enumerate(blocks) if old in layers)

    kept: Kept = {}
    scores: Scores = {}
    if settings.width_units:
        requested = round((settings.rate or 0.0) * before)
        target = max(requested - (before - num_parameters(model)), 0)
        try:
            kept, scores = _cut_widths(criteria, model, settings, layers, target)
        except RateTooHigh as error:
            if dropped:
                raise
            most = math.floor(1000 * error.most / before) / 1000
            raise UserError(
                f"{error}; with the other keys as they are, the highest rate is {most:g}"
            ) from error
        except TrainingDiverged as error:
            # It names a block by its number after blocks were dropped.
            number = rf"(?<={re.escape(family_of(model.config).blocks)}\.)\d+"
            message = re.sub(number, lambda match: str(blocks[int(match[0])]), str(error))
            raise TrainingDiverged(message) from error
    return Pruned(
        model=model,
        kept={blocks[index]: by_kind for index, by_kind in kept.items()},
        parameters_before=before,
        parameters_after=num_parameters(model),
        dropped_blocks=tuple(dropped),
        scores={blocks[index]: by_kind for index, by_kind in scores.items()},
        block_scores=block_scores,
    )


def _cut_widths(
    criteria: Criteria,
    model: PreTrainedModel,
    settings: PruneConfig,
    layers: Sequence[int],
    target: int,
) -> tuple[Kept, Scores]:
    """Cut units in `settings.num_steps` steps, and score the remaining units before each step."""
    sizes = unit_sizes(model, layers, settings.width_units)
    alive: Kept = {}
    for index, kinds in sizes.items():
        alive[index] = {name: tuple(range(size.count)) for name, size in kinds.items()}

    first: Scores = {}
    for step in range(1, settings.num_steps + 1):
        scores = criteria.score_units(model, layers)
        first = first or scores
        kept = _selected(settings, _in_base(scores, alive, sizes), sizes, target, step)
        present = _positions(kept, alive)
        criteria.compensate_units(model, present)
        cut(model, present, criteria.progress_of("cutting"))
        alive = kept
    return alive, first


def _selected(settings: PruneConfig, values: Values, sizes: Sizes, target: int, step: int) -> Kept:
    """Select the units that stay after a step, by unit numbers of the base model."""
    progress = step / settings.num_steps
    round_to = settings.round_to
    uniform = settings.uniform
    if settings.layer_rate is not None:
        return select_rate(values, sizes, settings.layer_rate, round_to, uniform, progress)
    return select(values, sizes, target, settings.selection, round_to, uniform, progress)


def _in_base(scores: Scores, alive: Kept, sizes: Sizes) -> Values:
    """List scores by unit numbers of the base model; units that were removed rank lowest."""
    values: dict[int, dict[str, list[float]]] = {index: {} for index in sizes}
    for index, kinds in sizes.items():
        for name, size in kinds.items():
            of_units = [-math.inf] * size.count
            of_alive = scores[index][name].tolist()
            for unit, value in zip(alive[index][name], of_alive, strict=True):
                of_units[unit] = value
            values[index][name] = of_units
    return values


def _positions(kept: Kept, alive: Kept) -> Kept:
    """List the units that stay by their positions among those that are still there."""
    positions: Kept = {index: {} for index in kept}
    for index, by_kind in kept.items():
        for name, units in by_kind.items():
            positions[index][name] = tuple(np.searchsorted(alive[index][name], units).tolist())
    return positions


def _num_dropped(model: PreTrainedModel, settings: PruneConfig, order: Sequence[int]) -> int:
    """Count the blocks to drop: at least one, but not all that may go.

    `order` lists the blocks that may be dropped, least important first.
    """
    sizes = block_sizes(model, order)
    total = num_parameters(model)
    share = settings.block_rate
    removed = list(itertools.accumulate(sizes[:-1], initial=0))
    missed = [abs(parameters - share * total) for parameters in removed]
    count = missed.index(min(missed))
    # Finer units can remove more afterwards, but cannot give anything back.
    while settings.width_units and removed[count] > (settings.rate or 0.0) * total:
        count -= 1

    if len(sizes) < 2:
        raise UserError(
            "`prune.units` names `block`, but only one block may be dropped, and one of those that "
            "may must stay: allow more (`prune.first_layer`, `prune.last_layer`), or remove `block`"
        )
    if count < 1:
        beside = " or `prune.depth_share`" if settings.width_units else ""
        raise UserError(
            f"`prune.rate`: dropped blocks should remove {share:.2%} of all parameters, but one "
            f"block already has {sizes[0] / total:.2%}: raise the rate{beside}, or remove `block` "
            "from `prune.units`"
        )
    if missed[count] > max(sizes):
        raise UserError(
            f"`prune.rate`: dropped blocks should remove {share:.2%} of all parameters, but the "
            f"{len(sizes)} blocks that may be dropped have {sum(sizes) / total:.2%}, and one of "
            "them must stay: lower the rate, or allow more blocks (`prune.first_layer`, "
            "`prune.last_layer`)"
        )
    return count


def block_sizes(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Count the parameters of each block in `layers`."""
    paths = block_paths(model.config)
    return [num_parameters(model.get_submodule(paths[index])) for index in layers]


def num_parameters(model: Any) -> int:
    """Count the parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())
