"""From a model config to the groups of its layers and their sizes, with no weights in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpruner.models import ragged
from qpruner.models.families import family_of
from qpruner.plans.plan import Group, Layout, LinearShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_ELEMENT_BYTES = 4


def skeleton(config: Any) -> PreTrainedModel:
    """Build the model on torch's meta device: shapes, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    ragged.install(config.model_type)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def num_layers(config: Any) -> int:
    """Count the blocks."""
    return int(config.num_hidden_layers)


def group_linears(config: Any, group: str) -> dict[str, tuple[str, ...]]:
    """Map each group to the full paths of its linear layers, in model order."""
    family = family_of(config)
    width = len(str(num_layers(config) - 1))
    return {
        ".".join(part for part in (f"layers.{index:0{width}d}", name) if part): tuple(
            f"{family.block_path(index)}.{linear}" for linear in linears
        )
        for index in range(num_layers(config))
        for name, linears in family.groups(group).items()
    }


def layout_of(config: Any, group: str, dtype_bytes: int, double_quant: bool, lora_rank: int) -> Layout:
    """Compute the groups and sizes of a model.

    Args:
        config: transformers config, pruned widths included.
        group: `block`, `sublayer` or `projection`.
        dtype_bytes: Bytes of an unquantized weight.
        double_quant: Whether 4-bit scales are quantized.
        lora_rank: Rank of the adapters on every grouped layer.
    """
    model = skeleton(config)
    modules = dict(model.named_modules())
    groups = tuple(
        Group(name, tuple(_shape(path, modules[path]) for path in paths))
        for name, paths in group_linears(config, group).items()
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    grouped = sum(item.num_weights for item in groups)
    adapters = sum(lora_rank * (linear.rows + linear.columns) for item in groups for linear in item.linears)
    return Layout(
        groups=groups,
        ungrouped_bytes=(num_parameters - grouped) * dtype_bytes,
        adapter_bytes=adapters * ADAPTER_ELEMENT_BYTES,
        element_bytes=dtype_bytes,
        double_quant=double_quant,
        num_parameters=num_parameters,
    )


def _shape(path: str, module: Any) -> LinearShape:
    rows, columns = module.weight.shape
    return LinearShape(path, int(rows), int(columns))


def output_modules(config: Any, group: str) -> dict[str, tuple[str, ...]]:
    """Map each group to the modules whose outputs are its output, in model order."""
    family = family_of(config)
    outputs = [
        tuple(".".join(part for part in (family.block_path(index), path) if part) for path in paths)
        for index in range(num_layers(config))
        for paths in family.group_outputs(group).values()
    ]
    return dict(zip(group_linears(config, group), outputs, strict=True))
