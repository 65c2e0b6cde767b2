"""What a cut goes by: what calibration samples say of blocks and units, or nothing, where only shapes are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import OnProgress, Samples
from qpruner.pruning.compensation import compensate, declare_biases, fold_blocks, new_biases
from qpruner.pruning.depth import block_importance
from qpruner.pruning.importance import Scores, score, unit_kinds_of
from qpruner.pruning.selection import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Evidence(Protocol):
    """What `prune.cut_by` asks on its way."""

    def of_blocks(self, model: PreTrainedModel, layers: Sequence[int]) -> dict[int, float]:
        """Importance of every block that may go whole."""

    def make_up_for_blocks(self, model: PreTrainedModel, gone: Collection[int], layers: Sequence[int]) -> None:
        """Change the blocks of `layers` that stay, before others go, so that they make up for them."""

    def of_units(self, model: PreTrainedModel, layers: Sequence[int]) -> Scores:
        """Importance of every unit that may go."""

    def make_up(self, model: PreTrainedModel, kept: Kept) -> None:
        """Change what stays, before the cut, so that it makes up for what goes."""

    def telling(self, what: str) -> OnProgress:
        """Who is told how much of some work is done."""


class Measured:
    """Importance and compensation measured on calibration samples.

    Args:
        settings: Criteria and compensation.
        samples: Calibration samples.
        seed: Of the random control.
        told: Told what is measured, and how much of it is done.
    """

    def __init__(
        self,
        settings: PruneConfig,
        samples: Samples,
        seed: int,
        told: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self._settings, self._samples, self._seed, self._told = settings, samples, seed, told
        self._step = 0

    def of_blocks(self, model: PreTrainedModel, layers: Sequence[int]) -> dict[int, float]:
        """By the criterion for blocks of the settings."""
        samples = self._samples_telling("importance of blocks")
        return block_importance(model, layers, self._settings.depth_importance, samples)

    def make_up_for_blocks(self, model: PreTrainedModel, gone: Collection[int], layers: Sequence[int]) -> None:
        """By least squares, where that is the compensation."""
        if self._settings.compensates_by == "least_squares":
            samples = self._samples_telling("making up for blocks")
            fold_blocks(model, gone, layers, self._settings.ridge, samples)

    def of_units(self, model: PreTrainedModel, layers: Sequence[int]) -> Scores:
        """By the criterion of the settings."""
        self._step += 1
        return score(model, layers, self._settings, self._samples_telling("importance"), self._seed)

    def make_up(self, model: PreTrainedModel, kept: Kept) -> None:
        """By the compensation of the settings."""
        if self._settings.compensates_by != "none":
            samples = self._samples_telling("compensation")
            compensate(model, kept, self._settings.compensates_by, self._settings.ridge, samples)

    def telling(self, what: str) -> OnProgress:
        """Whoever is told what is measured; blocks go before the first step."""
        total = self._settings.num_steps
        of_steps = f", step {self._step} of {total}" if self._step and total > 1 else ""
        return partial(self._told, f"{what}{of_steps}")

    def _samples_telling(self, what: str) -> Samples:
        return replace(self._samples, on_progress=self.telling(what))


class Unweighed:
    """All units alike and the last blocks least, for a model without weights: widths and biases come out as they will.

    Args:
        settings: Kinds of unit and compensation.
    """

    def __init__(self, settings: PruneConfig) -> None:
        self._settings = settings

    def of_blocks(self, model: PreTrainedModel, layers: Sequence[int]) -> dict[int, float]:
        """The later, the less."""
        return {index: -float(index) for index in layers}

    def make_up_for_blocks(self, model: PreTrainedModel, gone: Collection[int], layers: Sequence[int]) -> None:
        """It leaves no trace in the shapes."""

    def of_units(self, model: PreTrainedModel, layers: Sequence[int]) -> Scores:
        """Zeros."""
        kinds = unit_kinds_of(model, layers, self._settings.width_units)
        return {index: {kind.name: torch.zeros(kind.num_units) for kind in some} for index, some in kinds.items()}

    def make_up(self, model: PreTrainedModel, kept: Kept) -> None:
        """Biases, where compensation adds some."""
        declare_biases(model, new_biases(model, self._settings, list(kept)))

    def telling(self, what: str) -> OnProgress:
        """Nobody: shapes take no time."""
        return lambda done, total: None
