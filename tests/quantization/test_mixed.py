"""4, 8 and 16 bits in one model: real bitsandbytes layers, read back as they were written, at the promised size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from mixed_models import DTYPE, GROUP, LORA, fill_bank, logits_of, mixed_model, mixed_plan, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from qpruner.errors import UserError
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.plans.plan import LinearShape, check_cpu_widths
from qpruner.quantization.assembly import assemble, attach_adapters, measured_bytes
from qpruner.quantization.mixed import pack, unpack

MIXED = (4, 8, 16, 8, 4)
LAYERS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: torch.nn.Linear}

FRESH_PROCESS = """
import sys
import torch
import qpruner.hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "bitsandbytes" in type(model.get_submodule("model.layers.0.self_attn.q_proj").base_layer).__module__
with torch.no_grad():
    logits = model(input_ids=load_file(sys.argv[2])["input_ids"], use_cache=False).logits
save_file({"logits": logits}, sys.argv[3])
"""


@pytest.fixture(scope="module", params=[False, True], ids=["plain-scales", "double-quant"])
def double_quant(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def bank(tiny_model: Path, double_quant: bool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("bank")
    return folder, fill_bank(tiny_model, folder, double_quant)


@pytest.mark.parametrize("pattern", [(8,), MIXED], ids=str)
def test_a_saved_model_loads_bit_for_bit(
    tiny_model: Path, bank: tuple[Path, list[str]], double_quant: bool, pattern: tuple[int, ...], tmp_path: Path
) -> None:
    folder, names = bank
    plan = mixed_plan(names, pattern)
    model = mixed_model(tiny_model, folder, plan, double_quant)
    assert type(model.lm_head) is torch.nn.Linear
    paths = group_linears(model.config, GROUP)
    for path, bits in {path: plan[name] for name in names for path in paths[name]}.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, LAYERS[bits])
        assert layer.weight.dtype == {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[bits]
        if bits == 4:
            assert layer.weight.quant_state.quant_type == "nf4"
            assert layer.weight.quant_state.nested == double_quant
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits_of(loaded), logits_of(model))
    # And once more: what was loaded can be saved.
    loaded.save_pretrained(tmp_path / "again")
    written, again = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == again.keys()
    assert all(torch.equal(written[name], again[name]) for name in written)
    tensors = (part for name, part in written.items() if ".quant_state." not in name and "weight_format" not in name)
    assert sum(tensor.nbytes for tensor in tensors) == measured_bytes(model), "what the budget counts"
    config = json.loads((tmp_path / "config.json").read_text()).get("quantization_config", {})
    assert (config["quant_method"], config["double_quant"]) == ("qpruner", double_quant)
    assert config["bits"] == {path: plan[name] for name in names for path in paths[name] if plan[name] != 16}


@pytest.mark.parametrize("pattern", [(8,), (4, 8, 16, 8, 4)], ids=str)
def test_the_model_computes_what_its_packed_weights_say(
    tiny_model: Path, bank: tuple[Path, list[str]], double_quant: bool, pattern: tuple[int, ...]
) -> None:
    """Against the dense model with every quantized weight replaced by its dequantized self."""
    folder, names = bank
    plan = mixed_plan(names, pattern)
    dense = load_dense(str(tiny_model), DTYPE).eval()
    before = logits_of(dense)
    with torch.no_grad():
        for name, paths in group_linears(dense.config, GROUP).items():
            entry = load_file(folder / f"{plan[name]}bit" / f"{name}.safetensors") if plan[name] != 16 else {}
            for path in paths:
                packed = {key.removeprefix(f"{path}."): value for key, value in entry.items() if key.startswith(path)}
                packed = {key: value for key, value in packed.items() if not key.startswith("lora")}
                if packed:
                    dense.get_submodule(path).weight.copy_(unpack(packed, torch.bfloat16))
    expected, found = logits_of(dense), logits_of(mixed_model(tiny_model, folder, plan, double_quant))
    distance = (found - expected).norm() / expected.norm()
    # bfloat16 rounding, and the 8-bit activations of LLM.int8.
    assert distance < 0.02
    if 4 in pattern:
        assert distance < 0.5 * (found - before).norm() / before.norm()


def peft_of(checkpoint: Path, bank: Path, plan: dict[str, int], double_quant: bool) -> torch.nn.Module:
    model, starts = assemble(checkpoint, bank, GROUP, plan, DTYPE, double_quant)
    peft_model: torch.nn.Module = attach_adapters(model, starts, LORA, GROUP, seed=0)
    return peft_model


def test_a_training_step_moves_the_adapters_alone(
    tiny_model: Path, bank: tuple[Path, list[str]], double_quant: bool
) -> None:
    folder, names = bank
    model = peft_of(tiny_model, folder, mixed_plan(names, MIXED), double_quant).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.isfinite(parameter.grad).all() and parameter.grad.any()
        else:
            assert parameter.grad is None and torch.equal(parameter, before[name])
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("shape", "dtype"), [((96, 77), torch.float32), ((1, 64), torch.bfloat16)], ids=str)
def test_packing_loses_little_at_8_bits_and_more_at_4(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[0, :32] = 0

    def error(bits: int, nested: bool) -> float:
        unpacked = unpack(pack(weight, bits, nested), torch.float32)
        assert unpacked.shape == weight.shape and not unpacked[0, :32].any()
        return float((unpacked - weight.float()).norm() / weight.float().norm())

    assert error(8, False) < 0.012
    assert 0.012 < error(4, False) < 0.15 and error(4, True) < 0.15


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU kernel's limits")
def test_every_width_is_decoded_rightly_or_refused() -> None:
    """Some widths come out of bitsandbytes' CPU kernel as noise; nobody may train on those unawares."""
    for columns in (*range(1, 18), *range(24, 264, 24), 63, 64, 65, 77, 130, 576):
        weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
        try:
            check_cpu_widths([LinearShape("layer", 64, columns)])
        except UserError:
            assert columns % 64, "multiples of 64 are what models are made of"
        else:
            error = (unpack(pack(weight, 4, False), torch.float32) - weight).norm() / weight.norm()
            assert error < 0.15, columns
    with pytest.raises(UserError, match="layer has 80 columns"):
        check_cpu_widths([LinearShape("layer", 64, 80)])


def test_a_final_folder_keeps_the_generation_config(
    tiny_model: Path, bank: tuple[Path, list[str]], double_quant: bool, tmp_path: Path
) -> None:
    """Chat models end a turn with a token that only generation_config.json names."""
    folder, names = bank
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.25).save_pretrained(base)
    kept = mixed_model(base, folder, mixed_plan(names, (8,)), double_quant).generation_config
    assert kept.eos_token_id == [1, 7]
    assert (kept.do_sample, kept.temperature) == (True, 0.25)


def test_a_final_folder_carries_its_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """What a person who got the folder does: one import of ours, and plain transformers in a new process."""
    names = fill_bank(tiny_model, tmp_path / "bank", double_quant=True)
    plan = mixed_plan(names, MIXED)
    peft_model = peft_of(tiny_model, tmp_path / "bank", plan, double_quant=True).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    expected = logits_of(peft_model)
    # As pipeline/finish.py writes it.
    peft_model.save_pretrained(tmp_path / "adapter")
    model = mixed_model(tiny_model, tmp_path / "bank", plan, double_quant=True)
    save_checkpoint(model, load_tokenizer(str(tiny_model)), tmp_path / "final")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy2(tmp_path / "adapter" / file, tmp_path / "final" / file)
    save_file({"input_ids": token_ids()}, tmp_path / "prompt.safetensors")
    paths = [str(tmp_path / name) for name in ("final", "prompt.safetensors", "logits.safetensors")]
    finished = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *paths],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    effect = (expected - logits_of(model)).norm()
    assert effect > 0.1 * expected.norm(), "the adapter must matter for this to say anything"
    # transformers 5.24 rounds adapters on 4- and 16-bit layers to the model's bfloat16; peft keeps them in float32.
    assert (found - expected).norm() < 0.05 * effect
    assert (found - expected).norm() < 0.015 * expected.norm()
