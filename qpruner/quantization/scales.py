"""Train the scales that packed weights store, with codes, zeros and all other weights frozen.

This is PEQA (Kim et al., arXiv 2305.14152) and the second phase of EfficientQAT (Chen et al.,
arXiv 2407.11062), for scales and minima of llama.cpp's blocks too. What is trained is what a file
stores, so the result is one plain model without an adapter. `formats/layers.py` computes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qpruner.errors import CorruptFile
from qpruner.quantization.formats import ScaledFormat
from qpruner.quantization.formats.layers import PackedLayer


def scaled_layers(model: torch.nn.Module) -> Iterator[tuple[str, list[PackedLayer]]]:
    """Yield the layers whose scales can be trained, those with the same weight together.

    A head that is tied to embeddings shares their weight. The path is that of the first layer.
    """
    sharing: dict[int, tuple[str, list[PackedLayer]]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLayer) and isinstance(layer.format, ScaledFormat):
            sharing.setdefault(id(layer.weight), (path, []))[1].append(layer)
    yield from sharing.values()


def make_trainable(model: torch.nn.Module) -> None:
    """Give every layer in a `ScaledFormat` a trainable parameter `scale_changes` of zeros.

    All other parameters are frozen.
    """
    model.requires_grad_(False)
    for _, layers in scaled_layers(model):
        first = layers[0]
        assert isinstance(first.format, ScaledFormat)
        groups = first.columns // first.format.group_size
        shape = (len(first.weight), groups, first.format.num_scales)
        changes = torch.nn.Parameter(torch.zeros(shape, device=first.weight.device))
        for layer in layers:
            layer.scale_changes = changes


def changes_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the `scale_changes` of all layers, on the CPU, by path."""
    state = {}
    for path, layers in scaled_layers(model):
        changes = layers[0].scale_changes
        assert changes is not None, "the scales are trainable"
        state[path] = changes.detach().cpu()
    return state


@torch.no_grad()
def load_changes(model: torch.nn.Module, path: Path) -> None:
    """Set the `scale_changes` of a model whose scales are trainable to those of a file.

    The file has what `changes_of` returned, in safetensors.

    Raises:
        CorruptFile: The file is missing, cut short, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CorruptFile(f"scales {path} cannot be read: {error}", path) from error
    layers = dict(scaled_layers(model))
    if state.keys() != layers.keys():
        raise CorruptFile(f"scales {path} are of another plan", path)
    for name, changes in state.items():
        parameter = layers[name][0].scale_changes
        assert parameter is not None, "the scales are trainable"
        parameter.copy_(changes)


@torch.no_grad()
def fold(model: torch.nn.Module) -> None:
    """Write the trained scales into the packed weights, and freeze them."""
    for _, layers in scaled_layers(model):
        # The parameter is that of all layers with this weight; a mapped file stays as it is.
        layers[0].weight.data = layers[0].packed_rows(slice(None))
        for layer in layers:
            layer.scale_changes = None
