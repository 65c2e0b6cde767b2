"""Gather the Gram matrices of layers' and the head's inputs, by which GPTQ rounds weights."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from qpruner.data.calibration import Samples, at_tokens
from qpruner.data.losses import hooked
from qpruner.data.stream import BlockStream
from qpruner.models.families import block_paths
from qpruner.models.layout import group_linears, logits_path
from qpruner.plans.plan import HEAD, Layout
from qpruner.pruning.compensation import GramSums

LOOKUPS = 0.3
"""Share of the mean diagonal of the Gram matrix that is added to the diagonal for a tied head.

It weighs errors in rows that are looked up as embeddings. With 0, 0.1, 0.3, 1 and 3, GPTQ in q4_0
raised the loss of SmolLM2-135M by 0.041, 0.038, 0.034, 0.036 and 0.044; nearest rounding by 0.077
(2026-12-01, 100 rows, only the embeddings packed).
"""
Grams = dict[tuple[str, ...], torch.Tensor]
"""Paths of the layers that read an input -> float32 ``inputs^T inputs / tokens`` ``(columns,
columns)``."""


def gather(model: PreTrainedModel, samples: Samples) -> Iterator[Grams]:
    """Yield the Gram matrices of one block after the other, then those of the head.

    Memory holds the matrices of one block at a time.
    """
    groups = group_linears(model.config, "projection").values()
    stream = BlockStream(model, samples)
    for index, block in enumerate(block_paths(model.config)):
        in_block = [paths for paths in groups if paths[0].startswith(f"{block}.")]
        yield _of_block(model, stream, index, in_block)
    yield {(logits_path(model.config),): _of_head(model, stream)}


def gram_bytes(layout: Layout, config: Any) -> list[int]:
    """Count the bytes of the Gram matrices of each block of a model, then of the head's."""
    columns = {linear.name: linear.columns for group in layout.groups for linear in group.linears}
    sizes: Counter[str] = Counter()
    for name, paths in group_linears(config, "projection").items():
        layers, number, *_ = name.split(".")
        # The layers of a projection share their inputs.
        sizes[f"{layers}.{number}"] += 4 * columns[paths[0]] ** 2
    sizes[HEAD] = 4 * columns[logits_path(config)] ** 2
    return list(sizes.values())


@torch.no_grad()
def _of_block(
    model: PreTrainedModel, stream: BlockStream, index: int, groups: list[tuple[str, ...]]
) -> Grams:
    """Run a block once, and average ``inputs^T inputs`` of each projection over tokens.

    The layers of a projection share their inputs.
    """
    inputs: dict[tuple[str, ...], torch.Tensor] = {}
    sums = {paths: GramSums() for paths in groups}
    count = 0

    def hook_for(paths: tuple[str, ...]) -> Callable[..., None]:
        return lambda module, args: inputs.update({paths: args[0]})

    def on_batch(tokens: torch.Tensor) -> None:
        nonlocal count
        count += int(tokens.sum())
        for paths, states in inputs.items():
            sums[paths].add(at_tokens(states, tokens))
        inputs.clear()

    layers = {paths: model.get_submodule(paths[0]) for paths in groups}
    with hooked(
        layer.register_forward_pre_hook(hook_for(paths)) for paths, layer in layers.items()
    ):
        stream.advance(index, on_batch)
    return {paths: grams[0] / count for paths, grams in sums.items()}


def _of_head(model: PreTrainedModel, stream: BlockStream) -> torch.Tensor:
    sums = torch.zeros((), device=model.device)
    count = 0
    for inputs in stream.head_inputs():
        rows = inputs.float()
        count += len(inputs)
        sums = rows.T @ rows + sums.to(rows.device)
    if model.config.tie_word_embeddings:
        sums.diagonal().add_(LOOKUPS * sums.diagonal().mean())
    return sums / count
