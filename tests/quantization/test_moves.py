"""Packed layers stay intact when their model is moved: peft, accelerate and transformers move whole
models."""

from pathlib import Path

import pytest
import torch
from made_tensors import distance, same
from mixed_models import (
    PATTERN,
    bank_source,
    final_model,
    groups_of,
    logits_of,
    mixed_model,
    mixed_plan,
    token_ids,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qpruner.plans.plan import EMBEDDINGS

Model = torch.nn.Module
FILE = "model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Model:
    bank = bank_source(tiny_model, tmp_path / "bank")
    return mixed_model(bank, mixed_plan(groups_of(bank), PATTERN) | {EMBEDDINGS: "int8"})


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    moved = tensor.clone()
    if not tensor.is_floating_point():
        tensor.zero_()
    return moved


def test_codes_move_with_their_model(model: Model, tmp_path: Path) -> None:
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "before")  # type: ignore[operator]
    with torch.no_grad():
        model._apply(elsewhere)
    assert torch.equal(logits_of(model), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "after")  # type: ignore[operator]
    assert same(*(load_file(tmp_path / name / FILE) for name in ("before", "after")))


def test_changing_the_dtype_keeps_codes_and_scales(model: Model) -> None:
    def codes() -> dict[str, torch.Tensor]:
        weights = model.named_parameters()
        return {name: weight.clone() for name, weight in weights if not weight.is_floating_point()}

    expected = logits_of(model)
    before = codes()
    torch.nn.Sequential(model).to(torch.float32)
    assert same(codes(), before)
    logits = logits_of(model)
    assert logits.dtype == torch.float32
    assert distance(logits, expected) < 0.02, "bfloat16 rounds activations to 8 bits of mantissa"


@pytest.mark.gpu
def test_a_model_can_leave_the_gpu_and_return(model: Model) -> None:
    parent = torch.nn.Sequential(model.to("cuda"))
    expected = model(input_ids=token_ids().cuda(), use_cache=False).logits
    parent.to("cpu")
    assert logits_of(model).device.type == "cpu"
    parent.to("cuda")
    assert torch.equal(model(input_ids=token_ids().cuda(), use_cache=False).logits, expected)


@pytest.mark.gpu
def test_a_final_model_predicts_the_same_on_the_gpu(tiny_model: Path, tmp_path: Path) -> None:
    """With `.to("cuda")`, as in the docs and the model card, and with `device_map="auto"`."""
    final = final_model(tiny_model, tmp_path)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(final))
    moved = AutoModelForCausalLM.from_pretrained(final).to("cuda")
    for model in (moved, AutoModelForCausalLM.from_pretrained(final, device_map="auto")):
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        logits = model(input_ids=token_ids().cuda(), use_cache=False).logits
        assert distance(logits.cpu(), expected) < 0.1
