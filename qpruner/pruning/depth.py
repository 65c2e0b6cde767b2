"""Whole blocks: which matter least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qpruner.calibration import Samples, at_tokens, batches, entering
from qpruner.models.layout import num_layers
from qpruner.models.structure import EXPERT, MLP, UnitKind, family_of
from qpruner.pruning.block_stream import BlockStream
from qpruner.pruning.compensation import fold
from qpruner.pruning.importance import check_finite, taylor
from qpruner.rerun import Rerun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NUM_TOKENS = 2048
"""Calibration tokens on which predictions without a block are compared."""


def block_importance(
    model: PreTrainedModel, layers: Sequence[int], method: str, samples: Samples, ridge: float | None = None
) -> dict[int, float]:
    """Importance of every block that may go.

    Args:
        model: Dense model.
        layers: Blocks that may go.
        method: `kl`, `block_influence` or `taylor`.
        samples: Calibration samples.
        ridge: For `kl`, that of the least squares by which the block in front makes up for one; None for nothing.

    Raises:
        TrainingDiverged: Naming the weight, or else the block whose importance is NaN or infinite.
    """
    family = family_of(model.config)
    for index in layers:
        # Once some blocks are gone, nobody would find it, or by another number.
        for name, parameter in model.get_submodule(family.block_path(index)).named_parameters():
            check_finite(parameter, f"the weight {family.block_path(index)}.{name}")
    if method == "kl":
        scores = divergence_without(model, layers, samples, ridge)
    else:
        scores = (block_influence if method == "block_influence" else _taylor)(model, layers, samples)
    for index, value in scores.items():
        check_finite(torch.tensor(value), f"the importance of {family.block_path(index)}")
    return scores


def _taylor(model: PreTrainedModel, layers: Sequence[int], samples: Samples) -> dict[int, float]:
    """Sum over the weights of each block."""
    family, config = family_of(model.config), model.config
    kinds = {index: _once(family.unit_kinds(config.per_layer_config[index], index)) for index in layers}
    scores = taylor(model, kinds, samples)
    return {index: sum(float(score.sum()) for score in by_kind.values()) for index, by_kind in scores.items()}


def _once(kinds: Sequence[UnitKind]) -> tuple[UnitKind, ...]:
    """Kinds of unit that own each matrix of a block once: whole experts (and the router), not their channels too."""
    has_experts = any(kind.name == EXPERT for kind in kinds)
    return tuple(kind for kind in kinds if not (has_experts and kind.name == MLP))


@torch.no_grad()
def divergence_without(
    model: PreTrainedModel, layers: Sequence[int], samples: Samples, ridge: float | None = None
) -> dict[int, float]:
    """How far predictions move when a block alone is left out: KL divergence from the model's own, nats a token.

    With a ridge the block in front makes up for it, as `compensation.fold_blocks` does: fitted on most samples,
    compared on the last, about `NUM_TOKENS` tokens and a quarter of the samples at most. So what counts is what cannot
    be made up for. A divergence is told apart on fewer tokens than a rise of the loss, which may be negative.
    """
    family = family_of(model.config)
    fitted, compared = _split(samples)
    stream = None
    if ridge is not None and family.residual_factor(model.config) is not None:
        stream = BlockStream(model, replace(fitted, told=lambda done, total: None))
    runs = [Rerun(model, batch) for batch in batches(compared.rows, compared.batch_size, compared.pad_id, model.device)]
    count = sum(float(run.counts.sum()) for run in runs)

    def without(index: int, first: int) -> float:
        return sum(float(run.rise_without(index, first)[0].sum()) for run in runs) / count

    found: dict[int, float] = {}
    for index in range(num_layers(model.config)):
        front = index - 1
        if index in layers and stream is not None and front in layers:
            with _unchanged(model.get_submodule(family.block_path(front))):
                fold(model, stream, front, [index], ridge or 0.0)
                found[index] = without(index, front)
        elif index in layers:
            found[index] = without(index, index)
        if stream is not None and index > 0:
            stream.advance(front)
        samples.told(index + 1, num_layers(model.config))
    return found


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to fit on, and others to compare on; of so few that none can be spared, the same."""
    rows = list(samples.rows)
    count = num_compared([len(row["input_ids"]) for row in rows])
    if not count:
        return samples, samples
    return replace(samples, rows=rows[:-count]), replace(samples, rows=rows[-count:])


def num_compared(lengths: Sequence[int]) -> int:
    """How many samples of such lengths, the last ones, predictions are compared on."""
    count = tokens = 0
    while count < len(lengths) // 4 and tokens < NUM_TOKENS:
        count += 1
        tokens += lengths[-count]
    return count


@contextmanager
def _unchanged(block: torch.nn.Module) -> Iterator[None]:
    """Weights are afterwards what they were."""
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in block.named_parameters():
            parameter.data.copy_(before[name])


@torch.no_grad()
def block_influence(model: PreTrainedModel, layers: Sequence[int], samples: Samples) -> dict[int, float]:
    """One minus the mean cosine between a block's input and output (ShortGPT, arXiv 2403.03853, eq. 1): a block that
    hardly turns its hidden states can go."""
    family = family_of(model.config)
    sums = dict.fromkeys(layers, 0.0)
    tokens = torch.empty(0, dtype=torch.bool)
    count = 0

    def hook_for(index: int) -> Callable[..., None]:
        def hook(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = entering(args, kwargs)
            after = output[0] if isinstance(output, tuple) else output
            # Spread over several devices, a block is given what lies on the device of the one before.
            pair = at_tokens(before.to(after.device), tokens).float(), at_tokens(after, tokens).float()
            sums[index] += float(torch.nn.functional.cosine_similarity(*pair).sum())

        return hook

    handles = [
        model.get_submodule(family.block_path(index)).register_forward_hook(hook_for(index), with_kwargs=True)
        for index in layers
    ]
    try:
        for batch in samples.batches(model.device):
            tokens = batch["attention_mask"].bool()
            count += int(tokens.sum())
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {index: 1.0 - total / count for index, total in sums.items()}


def num_blocks_to_drop(rate: float, num_parameters: int, block_parameters: Sequence[int]) -> int:
    """How many blocks, given in the order in which they go, are nearest to a share of all parameters; one stays."""
    gone = list(itertools.accumulate(block_parameters[:-1], initial=0))
    return min(range(len(gone)), key=lambda count: abs(gone[count] - rate * num_parameters))
