"""Gather the Gram matrices of layers' inputs, by which GPTQ rounds weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from qpruner.data.calibration import Samples, at_tokens
from qpruner.data.losses import hooked
from qpruner.models.families import family_of
from qpruner.models.layout import group_linears
from qpruner.plans.plan import Layout
from qpruner.pruning.compensation import BlockStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Grams = dict[tuple[str, ...], torch.Tensor]
"""Paths of the layers that read an input -> float32 ``inputs^T inputs / tokens`` ``(columns, columns)``."""


def gather(model: PreTrainedModel, grouping: str, samples: Samples) -> Iterator[Grams]:
    """Yield the Gram matrices of one block after the other; memory holds those of one block."""
    paths = [path for of_group in group_linears(model.config, grouping).values() for path in of_group]
    stream = BlockStream(model, samples)
    for index in range(model.config.num_hidden_layers):
        block = f"{family_of(model.config).block_path(index)}."
        yield _of_block(model, stream, index, [path for path in paths if path.startswith(block)])


def gram_bytes(layout: Layout, config: Any) -> list[int]:
    """Count the bytes of the Gram matrices of each block of a model."""
    columns = {linear.name: linear.columns for group in layout.groups for linear in group.linears}
    sizes: dict[str, int] = {}
    for name, paths in group_linears(config, "projection").items():  # the layers of one share their input
        block = ".".join(name.split(".")[:2])
        sizes[block] = sizes.get(block, 0) + 4 * columns[paths[0]] ** 2
    return list(sizes.values())


@torch.no_grad()
def _of_block(model: PreTrainedModel, stream: BlockStream, index: int, paths: list[str]) -> Grams:
    """Run a block once and sum the products of its layers' inputs; layers that share an input share the matrix."""
    inputs: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    first: dict[str, str] = {}
    count = 0

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            inputs[path] = args[0]

        return hook

    def on_batch(tokens: torch.Tensor) -> None:
        nonlocal count
        count += int(tokens.sum())
        for path, each in inputs.items():
            first.setdefault(path, next(other for other, same in inputs.items() if same is each))
            if first[path] == path:
                rows = at_tokens(each, tokens).float()
                sums[path] = sums[path].addmm_(rows.T, rows) if path in sums else rows.T @ rows
        inputs.clear()

    with hooked(model.get_submodule(path).register_forward_pre_hook(hook_for(path)) for path in paths):
        stream.advance(index, on_batch)
    shared = {owner: tuple(path for path in first if first[path] == owner) for owner in sums}
    return {shared[owner]: gram / count for owner, gram in sums.items()}
