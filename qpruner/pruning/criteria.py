"""What a cut goes by: importance and compensation measured on calibration samples, or the shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import OnProgress, Samples
from qpruner.pruning.compensation import compensate, compensate_blocks, declare_biases, new_biases
from qpruner.pruning.depth import block_importance
from qpruner.pruning.importance import Scores, score, unit_kinds_of
from qpruner.pruning.units import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnWork = Callable[[str, int, int], None]
"""Called with what is measured, how much of it is done, and how much there is."""


class ShapeCriteria:
    """Score all units alike, the last blocks least: for a model without weights.

    Args:
        settings: Kinds of unit and compensation.
    """

    def __init__(self, settings: PruneConfig) -> None:
        self._settings = settings

    def score_blocks(self, model: PreTrainedModel, layers: Sequence[int]) -> dict[int, float]:
        """Score every block that may go whole."""
        return {index: -float(index) for index in layers}

    def compensate_blocks(self, model: PreTrainedModel, gone: Collection[int], layers: Sequence[int]) -> None:
        """Change blocks of `layers` so that they make up for those that go; shapes stay as they are."""

    def score_units(self, model: PreTrainedModel, layers: Sequence[int]) -> Scores:
        """Score every unit that may go."""
        kinds = unit_kinds_of(model, layers, self._settings.width_units)
        return {index: {kind.name: torch.zeros(kind.num_units) for kind in some} for index, some in kinds.items()}

    def compensate_units(self, model: PreTrainedModel, kept: Kept) -> None:
        """Change what stays, before the cut, so that it makes up for what goes."""
        declare_biases(model, new_biases(model, self._settings, list(kept)))

    def progress_of(self, work: str) -> OnProgress:
        """Return what reports the progress of some work."""
        return lambda done, total: None


class CalibratedCriteria(ShapeCriteria):
    """Measure importance and compensation on calibration samples.

    Args:
        settings: Criteria and compensation.
        samples: Calibration samples.
        seed: Of the random control.
        on_work: Told what is measured, and how much of it is done.
    """

    def __init__(
        self,
        settings: PruneConfig,
        samples: Samples,
        seed: int,
        on_work: OnWork = lambda work, done, total: None,
    ) -> None:
        super().__init__(settings)
        self._samples, self._seed, self._on_work = samples, seed, on_work
        self._step = 0

    def score_blocks(self, model: PreTrainedModel, layers: Sequence[int]) -> dict[int, float]:
        """Score blocks by `depth_importance`."""
        samples = self._samples_for("importance of blocks")
        return block_importance(model, layers, self._settings.depth_importance, samples)

    def compensate_blocks(self, model: PreTrainedModel, gone: Collection[int], layers: Sequence[int]) -> None:
        """Solve the projection in front of the blocks that go, where the compensation is least squares."""
        if self._settings.compensates_by == "least_squares":
            compensate_blocks(model, gone, layers, self._settings.ridge, self._samples_for("making up for blocks"))

    def score_units(self, model: PreTrainedModel, layers: Sequence[int]) -> Scores:
        """Score units by `importance`."""
        self._step += 1
        return score(model, layers, self._settings, self._samples_for("importance"), self._seed)

    def compensate_units(self, model: PreTrainedModel, kept: Kept) -> None:
        """Make up for units by `compensation`."""
        if self._settings.compensates_by != "none":
            samples = self._samples_for("compensation")
            compensate(model, kept, self._settings.compensates_by, self._settings.ridge, samples)

    def progress_of(self, work: str) -> OnProgress:
        """Return what reports the progress of some work, with the step where there are several."""
        total = self._settings.num_steps
        step = f", step {self._step} of {total}" if self._step and total > 1 else ""
        return partial(self._on_work, f"{work}{step}")

    def _samples_for(self, work: str) -> Samples:
        return replace(self._samples, on_progress=self.progress_of(work))
