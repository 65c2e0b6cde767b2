"""8-bit layers stay intact when their model is moved: peft, accelerate and transformers move whole models."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from mixed_models import fill_bank, final_model, logits_of, mixed_model, mixed_plan, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Model = torch.nn.Module


@pytest.fixture(params=[(8,), (4, 8, 16)], ids=["all-8", "mixed"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Model:
    names = fill_bank(tiny_model, tmp_path / "bank", double_quant=False)
    return mixed_model(tiny_model, tmp_path / "bank", mixed_plan(names, request.param), double_quant=False)


def int8_layers(model: Model) -> dict[str, bnb.nn.Linear8bitLt]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert found
    return found


def held(layer: bnb.nn.Linear8bitLt, name: str) -> list[torch.Tensor]:
    """Return the references to a layer's codes (CB) or scales (SCB): in the weight, and in the state after a pass."""
    return [getattr(each, name) for each in (layer.weight, layer.state) if getattr(each, name) is not None]


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """Simulate a move to another device: copy the tensor and clear the original codes."""
    moved = tensor.clone()
    if tensor.dtype == torch.int8:
        tensor.zero_()
    return moved


used_or_not = pytest.mark.parametrize("used", [False, True], ids=["before-the-first-pass", "after-it"])


@used_or_not
def test_codes_move_with_their_model(model: Model, used: bool, tmp_path: Path) -> None:
    """The moved model gives the same logits and saves the same tensors."""
    expected = logits_of(copy.deepcopy(model))
    if used:
        assert torch.equal(logits_of(model), expected)
    before = {name: layer.weight.data_ptr() for name, layer in int8_layers(model).items()}
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        model._apply(elsewhere)
    for name, layer in int8_layers(model).items():
        assert layer.weight.data_ptr() != before[name], "nothing was moved"
        assert {codes.data_ptr() for codes in held(layer, "CB")} == {layer.weight.data_ptr()}
    # bitsandbytes writes its reference back to the weight after each pass, so a second pass is tested too.
    assert torch.equal(logits_of(model), expected) and torch.equal(logits_of(model), expected)
    model.save_pretrained(tmp_path / "after")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert any(name.endswith("SCB") for name in one)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@used_or_not
def test_changing_the_dtype_keeps_codes_and_scales(model: Model, used: bool) -> None:
    expected = logits_of(copy.deepcopy(model))
    if used:
        logits_of(model)
    layers = int8_layers(model)
    before = {name: (layer.weight.data.clone(), held(layer, "SCB")[0].clone()) for name, layer in layers.items()}
    torch.nn.Sequential(model).to(torch.float32)
    for name, layer in layers.items():
        codes, scale = before[name]
        assert layer.weight.dtype == torch.int8
        assert all(torch.equal(each, codes) for each in (layer.weight.data, *held(layer, "CB")))
        assert all(torch.equal(each, scale) for each in held(layer, "SCB"))
    distance = (logits_of(model).float() - expected.float()).norm() / expected.float().norm()
    assert distance < 0.02, "bfloat16 rounds activations to 8 bits of mantissa"


@pytest.mark.gpu
@used_or_not
def test_a_model_can_leave_the_gpu_and_return(model: Model, used: bool) -> None:
    parent = torch.nn.Sequential(model.to("cuda"))
    expected = model(input_ids=token_ids().cuda(), use_cache=False).logits if used else None
    parent.to("cpu")
    assert logits_of(model).device.type == "cpu"
    parent.to("cuda")
    again = model(input_ids=token_ids().cuda(), use_cache=False).logits
    assert expected is None or torch.equal(again, expected)


@pytest.mark.gpu
def test_a_final_model_predicts_the_same_on_the_gpu(tiny_model: Path, tmp_path: Path) -> None:
    """With `.to("cuda")`, as in the docs and the model card, and with `device_map="auto"`."""
    final = final_model(tiny_model, tmp_path)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(final)).float()
    moved = AutoModelForCausalLM.from_pretrained(final).to("cuda")
    for model in (moved, AutoModelForCausalLM.from_pretrained(final, device_map="auto")):
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        logits = model(input_ids=token_ids().cuda(), use_cache=False).logits.float().cpu()
        assert (logits - expected).norm() < 0.1 * expected.norm()
