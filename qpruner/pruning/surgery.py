"""The cut itself: weights really get smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from qpruner.models import ragged
from qpruner.models.structure import UnitSlice, family_of
from qpruner.pruning.selection import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cut(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """Remove every unit that is not kept.

    Layers are cut one after the other and the old weight is freed at once, so two copies never exist; the returned
    model is built from the cut tensors and its own config, as a loaded checkpoint would be.

    Args:
        model: Dense model; unusable afterwards.
        kept: The units that stay.
    """
    ragged.install()
    family = family_of(model.config)
    for index, by_kind in kept.items():
        for kind in family.unit_kinds(model.config.per_layer_config[index]):
            for item in kind.slices:
                linear = cast(torch.nn.Linear, model.get_submodule(f"{family.block_path(index)}.{item.linear}"))
                _cut_linear(linear, item, kind.num_units, by_kind[kind.name])
    config = model.config
    ragged.set_widths(
        config, {index: {kind: len(units) for kind, units in by_kind.items()} for index, by_kind in kept.items()}
    )
    device, state, generation = model.device, model.state_dict(), model.generation_config
    rebuilt: PreTrainedModel = type(model).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    rebuilt.generation_config = generation
    return rebuilt.to(device)


def unit_indices(item: UnitSlice, units: tuple[int, ...]) -> torch.Tensor:
    """The indices along `item.dim` that some units own."""
    starts = torch.tensor(units).unsqueeze(1) * item.width + item.offset
    return (starts + torch.arange(item.width)).flatten()


def _cut_linear(linear: torch.nn.Linear, item: UnitSlice, num_units: int, units: tuple[int, ...]) -> None:
    size = linear.weight.shape[item.dim]
    owned = torch.arange(item.offset, item.offset + num_units * item.width)
    stays = torch.ones(size, dtype=torch.bool)
    stays[owned] = False
    stays[unit_indices(item, units)] = True
    indices = stays.nonzero().flatten().to(linear.weight.device)
    linear.weight = torch.nn.Parameter(linear.weight.data.index_select(item.dim, indices))
    if item.dim == 0 and linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias.data.index_select(0, indices))
