"""The best of the cuts that the settings leave open, by the loss on rows that no cut was fitted to.

Which blocks can go whole, and whether any should, no score tells on every text (docs/pruning.md); so both are done.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import Samples
from qpruner.data.losses import LossResult, mean_loss
from qpruner.errors import QprunerError, TrainingDiverged, UserError
from qpruner.models.families import family_of
from qpruner.pruning.prune import Pruned, expected_config, prune, settled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """A cut that may be made.

    Attributes:
        settings: Its settings; heads and channels go where `units` is null.
        expected: The config after it; where scores decide on widths, what it would be on average.
    """

    settings: PruneConfig
    expected: Any


@dataclass(frozen=True)
class Made:
    """A cut that was made.

    Attributes:
        settings: Its settings.
        pruned: The smaller model, and what it kept.
        is_best: Whether it loses less than those before it.
    """

    settings: PruneConfig
    pruned: Pruned
    is_best: bool


@dataclass(frozen=True)
class Tried:
    """A cut that was compared with others.

    Attributes:
        dropped_blocks: Blocks that went whole.
        loss: Of the held-out rows, in nats a predicted token.
        behind_stderr: Standard error, over rows, of its distance from the best; 0 of that one.
    """

    dropped_blocks: tuple[int, ...]
    loss: float
    behind_stderr: float


def cuts_of(model_config: Any, settings: PruneConfig) -> tuple[Cut, ...]:
    """The cuts to choose from: that of the settings, and where they leave `units` open, one with whole blocks beside.

    There is no second one where nothing would make up for blocks (another compensation, a norm or experts in the
    place), where each block is to lose its own share, where the rate is too small for one block, and beside the random
    control.

    Raises:
        UserError: For everything about the settings that this model cannot meet.
    """
    settings = settled(model_config, settings)
    first = Cut(settings, expected_config(model_config, settings))
    if not settings.may_add_blocks or family_of(model_config).residual_factor(model_config) is None:
        return (first,)
    beside = settings.model_copy(update={"units": ("block", *settings.width_units)})
    with suppress(UserError):
        return first, Cut(beside, expected_config(model_config, beside))
    return (first,)


def prune_best(
    load: Callable[[], PreTrainedModel],
    cuts: Sequence[PruneConfig],
    samples: Samples,
    held_out: Samples,
    made: Callable[[Made], None],
    seed: int = 0,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
    failed: Callable[[PruneConfig, QprunerError], None] = lambda settings, error: None,
) -> tuple[Tried, ...]:
    """Make one cut after the other, each of a model loaded anew: there is never more than one.

    Args:
        load: Gives the dense model; what it gave before may be dropped.
        cuts: Settings of each.
        samples: Calibration samples.
        held_out: Rows that are no calibration samples; several cuts are compared on them.
        made: Given every cut while its model is there; the last that is best is the best of all.
        seed: Of the random control.
        told: Told what is measured, and how much of it is done.
        failed: Told of a cut that cannot be made, where another can.

    Returns:
        What was compared; nothing where but one cut was made.

    Raises:
        UserError: If the rate cannot be met, or the model shares weights that a cut would break.
        TrainingDiverged: If something is NaN or infinite.
    """
    if len(cuts) == 1:
        made(Made(cuts[0], prune(load(), cuts[0], samples, seed, told), is_best=True))
        return ()
    losses: list[LossResult] = []
    dropped: list[tuple[int, ...]] = []
    errors: list[QprunerError] = []
    for settings in cuts:
        telling = partial(_tell, told, f", {with_or_without(settings)} whole blocks")
        try:
            pruned, loss = _cut_and_score(load, settings, samples, held_out, seed, telling)
        except (UserError, TrainingDiverged) as error:
            errors.append(_without_frames(error))
            if len(errors) == len(cuts):
                raise errors[0] from None
            failed(settings, error)
            continue
        is_best = all(loss.mean < other.mean for other in losses)
        losses.append(loss)
        dropped.append(pruned.dropped_blocks)
        made(Made(settings, pruned, is_best))
        del pruned
    if len(losses) == 1:
        return ()
    best = min(losses, key=lambda loss: loss.mean)
    return tuple(
        Tried(blocks, loss.mean, _stderr_of_distance(loss, best)) for blocks, loss in zip(dropped, losses, strict=True)
    )


def _cut_and_score(
    load: Callable[[], PreTrainedModel],
    settings: PruneConfig,
    samples: Samples,
    held_out: Samples,
    seed: int,
    told: Callable[[str, int, int], None],
) -> tuple[Pruned, LossResult]:
    pruned = prune(load(), settings, samples, seed, told)
    told("validation loss", 0, 1)
    loss = mean_loss(pruned.model, held_out.rows, held_out.pad_id, held_out.batch_size)
    told("validation loss", 1, 1)
    return pruned, loss


def _without_frames(error: QprunerError) -> QprunerError:
    """The error alone: the frames that it came through hold the model, and would while the next is loaded."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def with_or_without(settings: PruneConfig) -> str:
    """Of whole blocks."""
    return "with" if settings.drops_blocks else "without"


def _stderr_of_distance(one: LossResult, other: LossResult) -> float:
    """Of two mean losses, paired by row."""
    distances = [mine - its for mine, its in zip(one.by_row, other.by_row, strict=True)]
    return statistics.stdev(distances) / math.sqrt(len(distances)) if len(distances) > 1 else 0.0


def _tell(told: Callable[[str, int, int], None], beside: str, what: str, done: int, total: int) -> None:
    told(f"{what}{beside}", done, total)
