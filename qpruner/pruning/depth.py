"""Whole blocks: which matter least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qpruner.data.calibration import Samples, at_tokens, block_inputs
from qpruner.models.families import EXPERT, MLP, UnitKind, family_of
from qpruner.pruning.importance import check_finite, taylor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def block_importance(model: PreTrainedModel, layers: Sequence[int], method: str, samples: Samples) -> dict[int, float]:
    """Score every block that may go.

    Args:
        model: Dense model.
        layers: Blocks that may go.
        method: `block_influence` or `taylor`.
        samples: Calibration samples.

    Raises:
        TrainingDiverged: Naming the block whose importance is NaN or infinite.
    """
    family = family_of(model.config)
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
def block_influence(model: PreTrainedModel, layers: Sequence[int], samples: Samples) -> dict[int, float]:
    """Compute one minus the mean cosine between a block's input and output (ShortGPT, arXiv 2403.03853, eq. 1).

    A block that hardly turns its hidden states can go.
    """
    family = family_of(model.config)
    sums = dict.fromkeys(layers, 0.0)
    tokens = torch.empty(0, dtype=torch.bool)
    count = 0

    def hook_for(index: int) -> Callable[..., None]:
        def hook(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = block_inputs(args, kwargs)
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
    """Count the first blocks that come nearest to a share of all parameters; one stays."""
    gone = list(itertools.accumulate(block_parameters[:-1], initial=0))
    return min(range(len(gone)), key=lambda count: abs(gone[count] - rate * num_parameters))
