"""Scales of packed layers are trained as the unpacked weights' derivatives say."""

from pathlib import Path

import pytest
import torch
from made_tensors import normal
from safetensors.torch import save_file

from qpruner.errors import CorruptFile
from qpruner.quantization import scales
from qpruner.quantization.formats import ScaledFormat, formats, layers
from qpruner.quantization.formats.layers import PackedEmbedding, PackedLinear
from qpruner.quantization.mixed import packed_layer

ROWS, COLUMNS = 24, 128
NAMES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "w2", "w3_g32", "w4", "w8"]


class Tied(torch.nn.Module):
    """Look rows up, and multiply by the same packed weight, as a model with a tied head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        packing = formats()[name]
        tensors = packing.pack(normal(ROWS, COLUMNS, seed=5) * 0.1)
        table = torch.nn.Embedding(ROWS, COLUMNS)
        linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        self.table = packed_layer(table, packing, tensors, torch.float32)
        self.head = packed_layer(linear, packing, tensors, torch.float32)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


def in_units(packing: ScaledFormat, packed: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """Compute the weight ``(rows, columns)`` from changes with autograd, unrounded."""
    stored = packing.read_scales(packed, COLUMNS).float()
    minimum = torch.zeros_like(stored[..., :1])
    moved = torch.zeros_like(minimum)
    if packing.num_scales == 2:
        minimum = stored[..., 1:]
        moved = stored[..., :1] * changes[..., 1:]
    weight = packing.unpack({"weight": packed}, COLUMNS, torch.float32)
    grouped = weight.view(ROWS, -1, packing.group_size)
    return ((grouped - minimum) * (1 + changes[..., :1]) + minimum + moved).flatten(1)


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_autograd(
    name: str, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the looked up rows and of the head together, at scales away from the start."""
    if pieces:
        monkeypatch.setitem(layers.PIECE, "cpu", 5 * COLUMNS)
    model = Tied(name)
    scales.make_trainable(model)
    [(path, sharing)] = scales.scaled_layers(model)
    assert path == "table"
    assert sharing == [model.table, model.head]
    assert isinstance(model.table, PackedEmbedding)
    changes = model.table.scale_changes
    assert changes is not None
    with torch.no_grad():
        changes.copy_(0.25 * torch.sign(normal(*changes.shape, seed=8)))  # exact factors

    ids = torch.tensor([3, 7, 7, 20, 0])
    outputs = model(ids)
    upstream = normal(*outputs.shape, seed=9)
    [gradient] = torch.autograd.grad(outputs, changes, upstream)

    packing = model.table.format
    assert isinstance(packing, ScaledFormat)
    free = changes.detach().clone().requires_grad_()
    weight = in_units(packing, model.table.weight, free)
    expected = torch.tanh(weight[ids]) @ weight.T
    [expected_gradient] = torch.autograd.grad(expected, free, upstream)
    assert float((outputs - expected).norm() / expected.norm()) < 5e-3, "scales are rounded"
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    assert error < 1e-2, "and so are gradients"


@pytest.mark.parametrize("name", NAMES)
def test_folded_scales_compute_the_same_bits(name: str, tmp_path: Path) -> None:
    model = Tied(name)
    before = model.table.weight.data
    copied = before.clone()
    scales.make_trainable(model)
    changes = model.get_parameter("table.scale_changes")
    with torch.no_grad():
        changes.copy_(normal(*changes.shape, seed=4) * 0.1)
    ids = torch.arange(ROWS)
    outputs = model(ids)
    save_file(scales.changes_of(model), tmp_path / "changes")
    scales.fold(model)
    assert model.get_submodule("head").weight is model.table.weight
    assert not list(filter(lambda weight: weight.requires_grad, model.parameters()))
    assert torch.equal(model(ids), outputs)
    assert torch.equal(before, copied), "the tensor that was given"

    loaded = Tied(name)
    scales.make_trainable(loaded)
    scales.load_changes(loaded, tmp_path / "changes")
    assert torch.equal(loaded(ids), outputs)


def test_a_scale_keeps_its_sign() -> None:
    model = Tied("q4_0")
    scales.make_trainable(model)
    changes = model.get_parameter("table.scale_changes")
    with torch.no_grad():
        changes.fill_(-3.0)
    table = model.table
    assert isinstance(table, PackedEmbedding)
    weight = table.unpacked(slice(None), torch.float32)
    scales.make_trainable(model)
    start = table.unpacked(slice(None), torch.float32)
    assert torch.equal(weight.sign(), start.sign())


def test_a_layer_of_another_format_stays_frozen() -> None:
    packing = formats()["int8"]
    linear = torch.nn.Linear(COLUMNS, ROWS)
    layer = packed_layer(linear, packing, packing.pack(linear.weight.detach()), torch.float32)
    model = torch.nn.ModuleList([layer])
    scales.make_trainable(model)
    assert isinstance(layer, PackedLinear)
    assert layer.scale_changes is None


@pytest.mark.parametrize("damage", ["missing", "cut short", "of another plan"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    model = Tied("q4_0")
    scales.make_trainable(model)
    file = tmp_path / "changes"
    if damage == "cut short":
        save_file(scales.changes_of(model), file)
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "of another plan":
        save_file({"other": torch.zeros(3)}, file)
    with pytest.raises(CorruptFile) as caught:
        scales.load_changes(model, file)
    assert caught.value.path == file
