"""Packed layers compute what unpacked layers with the same weights compute, and keep no
activations."""

import copy
import pickle
from typing import Any

import pytest
import torch
from made_tensors import distance, normal
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qpruner.quantization.formats import formats, layers
from qpruner.quantization.formats.layers import PackedLinear
from qpruner.quantization.mixed import packed_layer

Linears = tuple[PackedLinear, torch.nn.Linear]
ROWS = 70
COLUMNS = 256
GENERIC = [
    name
    for name, packing in formats().items()
    if packing.is_packed and packing.holds_embeddings and not packing.missing()
]


@pytest.fixture(params=["one piece", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pieces":
        monkeypatch.setitem(layers.PIECE, "cpu", 16 * COLUMNS)


def weight_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(ROWS, COLUMNS).to(dtype)


def both(name: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> Linears:
    linear = torch.nn.Linear(COLUMNS, ROWS, bias, dtype=dtype).requires_grad_(False)
    tensors = formats()[name].pack(weight_of(dtype))
    packed = packed_layer(linear, formats()[name], tensors, dtype)
    linear.weight.data = formats()[name].unpack(tensors, COLUMNS, dtype)
    assert isinstance(packed, PackedLinear)
    return packed, linear


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(2, 33, COLUMNS, seed=1).to(dtype).requires_grad_()


def step(layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's outputs, and the gradients of its inputs for random ones of its outputs."""
    outputs = layer(x)
    gradients = normal(*outputs.shape, seed=2).to(outputs.dtype)
    return outputs, torch.autograd.grad(outputs, x, gradients)[0]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", GENERIC)
def test_a_packed_layer_equals_the_unpacked_one(name: str, bias: bool, pieces: None) -> None:
    packed, dense = both(name, bias=bias)
    torch.testing.assert_close(step(packed, inputs()), step(dense, inputs()), rtol=1e-5, atol=1e-4)
    assert packed.weight.dtype == torch.uint8
    assert packed.weight.nbytes < weight_of().nbytes / 3


@pytest.mark.parametrize("widened", [False, True], ids=["as it is", "widened"])
def test_bfloat16_is_as_exact_as_in_the_unpacked_layer(
    widened: bool, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `qpruner.models.cpu` computes in float32."""
    monkeypatch.setattr(layers, "widens_bfloat16", widened)
    packed, dense = both("int8", torch.bfloat16)
    x = inputs(torch.bfloat16)
    for result, exact in zip(step(packed, x), step(dense.float(), x.float()), strict=True):
        assert result.dtype == torch.bfloat16
        assert distance(result, exact) < 4e-3


def test_autocast_chooses_the_type_of_the_product() -> None:
    packed, _ = both("int8")
    with torch.autocast("cpu", torch.bfloat16):
        outputs, gradients = step(packed, inputs())
    assert outputs.dtype == torch.bfloat16
    assert gradients.dtype == torch.float32
    assert distance(packed(inputs()), outputs) < 0.01


@pytest.mark.parametrize("scale", [None, 7.7], ids=["plain", "scaled as in Gemma"])
@pytest.mark.parametrize("name", GENERIC)
def test_a_packed_embedding_looks_up_unpacked_rows(name: str, scale: float | None) -> None:
    plain = torch.nn.Embedding(ROWS, COLUMNS, padding_idx=0)
    embedding = Gemma3TextScaledWordEmbedding(ROWS, COLUMNS, 0, scale) if scale else plain
    embedding = embedding.bfloat16()
    tensors = formats()[name].pack(weight_of())
    packed = packed_layer(embedding, formats()[name], tensors, torch.bfloat16)
    embedding.weight.data = formats()[name].unpack(tensors, COLUMNS, torch.bfloat16)
    ids = torch.tensor([[0, 3, 3], [ROWS - 1, 1, 0]])
    assert torch.equal(packed(ids), embedding(ids))


def copied_by_state(model: torch.nn.Module) -> torch.nn.Module:
    empty = copy.deepcopy(model)
    empty[0].weight.data.zero_()
    empty.load_state_dict(model.state_dict())
    return empty


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copied_by_state],
    ids=["copy", "process", "state"],
)
def test_layers_survive_copies_processes_and_types(copied: Any) -> None:
    packed, _ = both("int8")
    plain = torch.nn.Embedding(ROWS, COLUMNS)
    table = packed_layer(plain, packed.format, {"weight": packed.weight}, torch.bfloat16)
    linear, embedding = copied(torch.nn.ModuleList([packed, table]))
    assert torch.equal(linear(inputs()), packed(inputs()))
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16
    torch.nn.ModuleList([linear, embedding]).to(torch.float32)
    assert linear.weight.dtype == torch.uint8
    assert torch.equal(linear.weight, packed.weight)
    assert embedding(torch.tensor([1])).dtype == torch.float32


@pytest.mark.parametrize("name", GENERIC)
def test_a_layer_keeps_no_input(name: str) -> None:
    """bitsandbytes' 8-bit layers do."""
    packed, _ = both(name)
    x = inputs() * 1.0
    alive = StorageWeakRef(x.untyped_storage())
    out = packed(x)
    del x
    assert alive.expired()
    assert out.requires_grad


@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safely"])
@pytest.mark.parametrize("name", GENERIC)
def test_peft_refuses_to_merge_into_packed_weights(name: str, safe: bool) -> None:
    packed, _ = both(name)
    before = packed.weight.clone()
    model = get_peft_model(torch.nn.Sequential(packed), LoraConfig(target_modules=["0"]))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        model.merge_adapter(safe_merge=safe)  # type: ignore[operator]
    assert torch.equal(packed.weight, before)
