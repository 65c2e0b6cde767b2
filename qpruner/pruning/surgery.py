"""Cut units and blocks out of a model, so that its weights become smaller."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qpruner.data.calibration import OnProgress
from qpruner.errors import UserError
from qpruner.models import ragged
from qpruner.models.families import UnitKind, UnitSlice, family_of, owned_parameters
from qpruner.pruning.units import Kept, unit_kinds_of


def cut(
    model: PreTrainedModel, kept: Kept, on_progress: OnProgress = lambda done, total: None
) -> PreTrainedModel:
    """Remove every unit that is not kept, in place.

    A cut block is rebuilt from its own config around the same tensors, so no parameter exists
    twice. Blocks and unit kinds that `kept` does not name keep all units.
    """
    family = family_of(model.config)
    ragged.install(family)
    num_units = {}
    for done, (index, by_kind) in enumerate(kept.items(), 1):
        block = model.get_submodule(family.block_path(index))
        for kind in unit_kinds_of(model.config, [index], by_kind)[index]:
            _cut_kind(block, kind, by_kind[kind.name])
        num_units[index] = {name: len(units) for name, units in by_kind.items()}
        on_progress(done, len(kept))

    ragged.set_widths(model.config, num_units)
    for index in kept:
        _rebuild_block(model, index)
    return model


def keep_blocks(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Remove all blocks in place except `kept`, which lists their indices in ascending order."""
    family = family_of(model.config)
    ragged.install(family)
    blocks: Any = model.get_submodule(family.blocks)
    ragged.keep_blocks(model.config, kept)
    model.set_submodule(family.blocks, torch.nn.ModuleList(blocks[index] for index in kept))
    # A block stores its position, for the cache and for the per-block lists of the config.
    for new, old in enumerate(kept):
        if new != old:
            _rebuild_block(model, new)
    return model


def check_not_shared(model: PreTrainedModel) -> None:
    """Refuse a model whose blocks share weights with other layers.

    A cut of one layer would break the other.
    """
    family = family_of(model.config)
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        memory = id(parameter) if parameter.is_meta else parameter.data_ptr()
        owner = owners.setdefault(memory, name)
        in_blocks = [path for path in (name, owner) if path.startswith(f"{family.blocks}.")]
        if owner != name and in_blocks:
            raise UserError(
                f"`model.source`: {owner} and {name} are one shared (tied) weight, so cutting one "
                "would break the other; untie them, or leave pruning out with `prune.rate: 0`"
            )


def unit_indices(item: UnitSlice, units: Sequence[int]) -> torch.Tensor:
    """List the indices that `units` own along `item.dim`."""
    starts = torch.tensor(units, dtype=torch.long).unsqueeze(1) * item.width + item.offset
    return (starts + torch.arange(item.width)).flatten()


def _cut_kind(block: torch.nn.Module, kind: UnitKind, units: tuple[int, ...]) -> None:
    """Cut all other units of one kind out of a block."""
    slices: dict[str, list[UnitSlice]] = {}
    for item, _ in owned_parameters(block, kind):
        slices.setdefault(item.parameter, []).append(item)
    for path, items in slices.items():
        parameter = block.get_parameter(path)
        dim = items[0].dim
        stays = _stays(parameter.shape[dim], items, kind.num_units, units).to(parameter.device)
        data = parameter.data.index_select(dim, stays)
        smaller = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
        module, _, name = path.rpartition(".")
        setattr(block.get_submodule(module), name, smaller)


def _stays(
    length: int, items: Sequence[UnitSlice], num_units: int, units: Sequence[int]
) -> torch.Tensor:
    """List the indices of a dimension to keep: those of kept units, and those that no unit owns."""
    stays = torch.ones(length, dtype=torch.bool)
    for item in items:
        stays[item.offset : item.offset + num_units * item.width] = False
        stays[unit_indices(item, units)] = True
    return stays.nonzero().flatten()


def _rebuild_block(model: PreTrainedModel, index: int) -> None:
    """Rebuild a block from its config around its existing tensors."""
    path = family_of(model.config).block_path(index)
    old: Any = model.get_submodule(path)
    with torch.device("meta"):
        new = type(old)(model.config, index)
    new.load_state_dict(old.state_dict(), assign=True)
    new.train(old.training)
    for parameter, before in zip(new.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
    # In a model that accelerate spread over devices, hooks move inputs to the device of a module.
    for name, module in old.named_modules():
        if hasattr(module, "_hf_hook"):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(new.get_submodule(name), module._hf_hook)
    model.set_submodule(path, new)
