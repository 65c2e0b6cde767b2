"""Derive a model's groups (layers that share a format) and the bytes of its parts.

Only the config is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import QuantizeConfig
from qpruner.models import ragged
from qpruner.models.families import block_paths, family_of
from qpruner.plans.plan import EMBEDDINGS, HEAD, UNPRUNED, Group, Layout, LinearShape
from qpruner.quantization.formats import Method, format_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_GPU = (99, 0)
"""A compute capability that every format takes; `preflight.check_gpu` looks at the real one."""


def skeleton(config: Any) -> PreTrainedModel:
    """Build a model with shapes but no weights, on the meta device of torch."""
    import torch
    from transformers import AutoModelForCausalLM

    ragged.install(family_of(config))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def group_linears(config: Any, grouping: str) -> dict[str, tuple[str, ...]]:
    """Map each group of a model to the paths of its linear layers.

    `grouping` is `quantize.group`.
    """
    return {name: linears for name, linears, _ in _groups(config, grouping)}


def table_paths(config: Any) -> dict[str, str]:
    """Map `embeddings` and `head` to their paths; a head that is tied to embeddings is left out."""
    family = family_of(config)
    tables = {EMBEDDINGS: family.embeddings}
    return tables if config.tie_word_embeddings else tables | {HEAD: family.head}


def logits_path(config: Any) -> str:
    """Return the path of the weight that computes the logits.

    It is that of the head, or of the embeddings if the head is tied to them.
    """
    return list(table_paths(config).values())[-1]


def group_paths(config: Any, grouping: str) -> dict[str, tuple[str, ...]]:
    """Map each group, embeddings and head included, to the paths of its layers."""
    return group_linears(config, grouping) | {
        name: (path,) for name, path in table_paths(config).items()
    }


def output_modules(config: Any, grouping: str) -> dict[str, tuple[str, ...]]:
    """Map each group to the modules at its end, whose outputs are its output.

    They are a block for a whole block, for example, or q, k and v for `qkv`.
    """
    return {name: outputs for name, _, outputs in _groups(config, grouping)}


def _groups(config: Any, grouping: str) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Yield the name of each group, its linear layers and the modules at its end."""
    family = family_of(config)
    num_digits = len(str(config.num_hidden_layers - 1))
    for index, block in enumerate(block_paths(config)):
        layer = f"layers.{index:0{num_digits}d}"
        for name, (linears, outputs) in family.groups(grouping).items():
            yield _joined(layer, (name,))[0], _joined(block, linears), _joined(block, outputs)


def _joined(prefix: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Put a prefix before paths; an empty path is the prefix itself."""
    return tuple(f"{prefix}.{path}" if path else prefix for path in paths)


def layout_of(
    config: Any,
    quantize: QuantizeConfig,
    element_bytes: int,
    lora_rank: int,
    on_gpu: bool,
    cut: str = UNPRUNED,
    method: Method = "adapter",
) -> Layout:
    """List groups with the formats that each takes, and count the bytes of all other parts.

    A group is offered the formats that all its layers take. If there is none, as in a model that is
    only pruned, it is offered all.
    """
    model = skeleton(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    blocks = group_linears(config, quantize.group)
    tables = {name: (path,) for name, path in table_paths(config).items()}
    ordered = {EMBEDDINGS: tables[EMBEDDINGS], **blocks, **tables}  # the head comes last

    groups = []
    num_adapter_weights = 0
    for name, paths in ordered.items():
        linears = tuple(LinearShape(path, *shapes[f"{path}.weight"]) for path in paths)
        levels = quantize.levels
        if name in tables:
            levels = quantize.embedding_levels
        else:
            num_adapter_weights += sum(lora_rank * (item.rows + item.columns) for item in linears)
        offered = tuple(level for level in levels if not refusals(level, linears, on_gpu))
        groups.append(Group(name, linears, offered or levels))

    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_grouped = sum(group.num_weights for group in groups)
    return Layout(
        groups=tuple(groups),
        ungrouped_bytes=(num_parameters - num_grouped) * element_bytes,
        adapter_bytes=num_adapter_weights * element_bytes,
        element_bytes=element_bytes,
        num_parameters=num_parameters,
        multiply_adds=multiply_adds(model),
        cut=cut,
        method=method,
    )


def multiply_adds(model: PreTrainedModel) -> int:
    """Count the multiply-adds per token: one for each weight of the blocks and of the head."""
    head: Any = model.get_output_embeddings()
    blocks: Any = model.get_submodule(family_of(model.config).blocks)
    matrices = [parameter for parameter in blocks.parameters() if parameter.ndim > 1]
    return sum(int(matrix.numel()) for matrix in (head.weight, *matrices))


def refusals(level: str, linears: Iterable[LinearShape], on_gpu: bool) -> list[str]:
    """List the layers that a format cannot hold, each with the reason."""
    level_format = format_of(level)
    refused = []
    for linear in linears:
        reason = level_format.refusal(linear.columns, NEW_GPU if on_gpu else None)
        if reason:
            refused.append(f"{linear.name}: {reason}")
    return refused
