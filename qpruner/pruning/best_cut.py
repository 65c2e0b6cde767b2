"""The best of the cuts that the settings leave open, by the loss on rows that no cut was fitted to.

Which blocks can go whole, and whether any should, no score tells on every text (docs/pruning.md); so both are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qpruner.calibration import Rows, Samples, mean_loss
from qpruner.config import PruneConfig
from qpruner.errors import UserError
from qpruner.models.structure import family_of
from qpruner.pruning.prune import Pruned, expected_config, prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """A cut that may be made.

    Attributes:
        settings: Its settings; `units` names what goes, unless nothing beside the usual can.
        expected: The config after it; where scores decide on widths, what it would be on average.
    """

    settings: PruneConfig
    expected: Any


@dataclass(frozen=True)
class Tried:
    """A cut that was made to be compared.

    Attributes:
        settings: Its settings.
        dropped_blocks: Blocks that went whole.
        loss: Of the held-out rows, in nats a predicted token.
    """

    settings: PruneConfig
    dropped_blocks: tuple[int, ...]
    loss: float


def cuts_of(model_config: Any, settings: PruneConfig) -> tuple[Cut, ...]:
    """The cuts to choose from: that of the settings, and where they leave `units` open, one with whole blocks beside.

    The second is none where nothing would make up for blocks (another compensation, a norm or experts in the place),
    where each block is to lose its own share, where one block is more than blocks may take, and beside the random
    control.

    Raises:
        UserError: For everything about the settings that this model cannot meet.
    """
    first = Cut(settings, expected_config(model_config, settings))
    if (
        settings.units is not None
        or not settings.rate
        or settings.compensation != "least_squares"
        or settings.importance == "random"
        or family_of(model_config).residual_factor(model_config) is None
    ):
        return (first,)
    beside = settings.model_copy(update={"units": ("block", *settings.width_units)})
    with suppress(UserError):
        return first, Cut(beside, expected_config(model_config, beside))
    return (first,)


def prune_best(
    load: Callable[[], PreTrainedModel],
    cuts: Sequence[PruneConfig],
    samples: Samples,
    held_out: Rows,
    keep: Callable[[PruneConfig, Pruned], None],
    seed: int = 0,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Tried, ...]:
    """Make one cut after the other, each of a model loaded anew: there is never more than one.

    Args:
        load: Gives the dense model; what it gave before may be dropped.
        cuts: Settings of each.
        samples: Calibration samples.
        held_out: Encoded rows that are no calibration samples.
        keep: Given every cut that loses less than those before it on `held_out`, while its model is there.
        seed: Of the random control.
        told: Told what is measured, and how much of it is done.

    Returns:
        What was compared; nothing where there is but one cut.

    Raises:
        UserError: If the rate cannot be met, or the model shares weights that a cut would break.
    """
    tried: list[Tried] = []
    for settings in cuts:
        beside = f", {with_or_without(settings)} whole blocks" if len(cuts) > 1 else ""
        pruned = prune(load(), settings, samples, seed, partial(_tell, told, beside))
        if len(cuts) == 1:
            keep(settings, pruned)
            break
        told(f"validation loss{beside}", 0, 1)
        loss = mean_loss(pruned.model, held_out, samples.pad_id, samples.batch_size).mean
        told(f"validation loss{beside}", 1, 1)
        if all(loss < other.loss for other in tried):
            keep(settings, pruned)
        tried.append(Tried(settings, pruned.dropped_blocks, loss))
        del pruned
    return tuple(tried)


def with_or_without(settings: PruneConfig) -> str:
    """Of whole blocks."""
    return "with" if settings.drops_blocks else "without"


def _tell(told: Callable[[str, int, int], None], beside: str, what: str, done: int, total: int) -> None:
    told(f"{what}{beside}", done, total)
