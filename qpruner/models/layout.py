"""Derive a model's groups (layers that share a bit-width) and the bytes of its parts from the config alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qpruner.models import ragged
from qpruner.models.families import family_of
from qpruner.plans.plan import Group, Layout, LinearShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(config: Any) -> PreTrainedModel:
    """Build a model with shapes but no weights, on the meta device of torch."""
    import torch
    from transformers import AutoModelForCausalLM

    ragged.install(family_of(config))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def group_linears(config: Any, grouping: str) -> dict[str, tuple[str, ...]]:
    """Map each group, as `grouping` (`quantize.group`) divides the model, to the paths of its linear layers."""
    return {name: linears for name, linears, _ in _groups(config, grouping)}


def output_modules(config: Any, grouping: str) -> dict[str, tuple[str, ...]]:
    """Map each group to the modules at its end, whose outputs are its output: a block, or q, k and v for `qkv`."""
    return {name: outputs for name, _, outputs in _groups(config, grouping)}


def _groups(config: Any, grouping: str) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    family, count = family_of(config), config.num_hidden_layers
    for index in range(count):
        layer, block = f"layers.{index:0{len(str(count - 1))}d}", family.block_path(index)
        for name, of_group in family.groups(grouping).items():
            linears, outputs = (tuple(f"{block}.{path}".rstrip(".") for path in paths) for paths in of_group)
            yield f"{layer}.{name}".rstrip("."), linears, outputs


def layout_of(config: Any, grouping: str, dtype_bytes: int, double_quant: bool, lora_rank: int) -> Layout:
    """List groups with weight shapes; count bytes of adapters, and of weights in no group (`dtype_bytes` each)."""
    model = skeleton(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    groups = tuple(
        Group(name, tuple(LinearShape(path, *map(int, shapes[f"{path}.weight"])) for path in paths))
        for name, paths in group_linears(config, grouping).items()
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    grouped = sum(item.num_weights for item in groups)
    adapters = sum(lora_rank * (linear.rows + linear.columns) for item in groups for linear in item.linears)
    return Layout(
        groups=groups,
        ungrouped_bytes=(num_parameters - grouped) * dtype_bytes,
        adapter_bytes=adapters * 4,  # float32
        element_bytes=dtype_bytes,
        double_quant=double_quant,
        num_parameters=num_parameters,
    )
