"""Models of several formats have the predicted size, load as they were saved, and keep no
activations."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tensors import distance, normal, same
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
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from plain_transformers import run_python
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, GenerationConfig

from qpruner.errors import UserError
from qpruner.models.cpu import has_bfloat16
from qpruner.models.layout import group_linears
from qpruner.plans.plan import EMBEDDINGS
from qpruner.quantization.assembly import measured_bytes
from qpruner.quantization.formats import format_of

FRESH_PROCESS = """
import json, sys, torch
import qpruner.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
first_layer = model.get_submodule("model.layers.0.self_attn.q_proj").base_layer
assert "bitsandbytes" in type(first_layer).__module__
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2])), use_cache=False).logits.tolist()))
"""


PATTERNS = [("int8",), ("nf4", "nf4_double", "int8", "bf16", "int8")]


@pytest.mark.parametrize("tables", ["bf16", "int8"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=["uniform", "mixed"])
def test_a_saved_model_loads_bit_for_bit(
    tiny_model: Path, pattern: tuple[str, ...], tables: str, tmp_path: Path
) -> None:
    bank = bank_source(tiny_model, tmp_path / "bank")
    plan = {EMBEDDINGS: tables} | mixed_plan(groups_of(bank), pattern)
    model = mixed_model(bank, plan)
    paths = {EMBEDDINGS: ("model.embed_tokens",)} | group_linears(model.config, "projection")
    formats = {path: plan[name] for name in plan for path in paths[name]}
    for path, name in formats.items():
        weight = model.get_parameter(f"{path}.weight")
        assert weight.dtype == (torch.bfloat16 if name == "bf16" else torch.uint8)
        if "nf4" in name:
            assert weight.quant_state.quant_type == "nf4"
            assert weight.quant_state.nested == (name == "nf4_double")
    model.save_pretrained(tmp_path / "once")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.bfloat16)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "once" / "model.safetensors")
    assert same(written, load_file(tmp_path / "again" / "model.safetensors"))
    size = sum(tensor.nbytes for name, tensor in written.items() if ".quant_state." not in name)
    assert size == measured_bytes(model)
    config = json.loads((tmp_path / "once" / "config.json").read_text())["quantization_config"]
    packed = {path: name for path, name in formats.items() if name != "bf16"}
    assert config == {"quant_method": "qpruner", "formats": packed}


def test_weights_are_loaded_in_the_type_that_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    """The base model's files may have another type than `model.dtype`."""
    bank = bank_source(tiny_model, tmp_path / "bank", dtype="float32")
    model = mixed_model(bank, mixed_plan(groups_of(bank), PATTERN))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.uint8}
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16, torch.uint8}


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("model.layers.0.mlp.down_proj", "q9_9", r"down_proj has the format q9_9, .* not know"),
        ("model.embed_tokens", "nf4", r"embed_tokens has the format nf4, .* cannot be unpacked"),
    ],
    ids=["unknown", "no rows"],
)
def test_a_format_that_cannot_be_loaded_is_named(
    tiny_model: Path, path: str, name: str, message: str, tmp_path: Path
) -> None:
    bank = bank_source(tiny_model, tmp_path / "bank")
    mixed_model(bank, mixed_plan(groups_of(bank), PATTERN)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["formats"][path] = name
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU kernel's limits")
@pytest.mark.parametrize("columns", [*range(1, 18), *range(24, 264, 24), 63, 64, 65, 77, 130, 576])
def test_every_width_is_decoded_correctly_or_refused(columns: int) -> None:
    """The CPU kernel of bitsandbytes decodes some widths to noise; training on these must be
    impossible."""
    nf4 = format_of("nf4")
    if nf4.refusal(columns, None):
        assert columns % 64, "multiples of 64, as most models have, must work"
    else:
        weight = normal(16, columns)
        assert distance(nf4.unpack(nf4.pack(weight), columns, torch.float32), weight) < 0.15


def live_inputs(model: Any, checkpointing: bool, kept: list[Any] | None = None) -> int:
    """Count the inputs of linear layers in blocks that still are in memory before the backward
    pass.

    With a list `kept`, the last layer keeps its input there.
    """
    seen: list[StorageWeakRef] = []
    lora = PeftLora(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    if checkpointing:
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in adapted.base_model.model.model.layers:
        attention = block.self_attn
        for layer in (attention.q_proj, attention.o_proj, block.mlp.up_proj, block.mlp.down_proj):
            layer.register_forward_pre_hook(
                lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
            )
    if kept is not None:
        layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    adapted.train()
    loss = adapted(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss
    alive = sum(not storage.expired() for storage in seen)
    loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)
    return alive


@pytest.mark.parametrize("name", ["nf4", "int8", "bf16"])
def test_gradient_checkpointing_frees_activations(
    tiny_model: Path, name: str, tmp_path: Path
) -> None:
    """Layers that keep their input, as bitsandbytes' 8-bit layers do, would cost a gigabyte with
    Llama-2-7B."""
    bank = bank_source(tiny_model, tmp_path / "bank")
    plan = dict.fromkeys(groups_of(bank), name)
    if has_bfloat16():  # else autograd keeps copies in float32 instead
        assert live_inputs(mixed_model(bank, plan), checkpointing=False) > 0
    kept_one = live_inputs(mixed_model(bank, plan), checkpointing=True, kept=[])
    assert kept_one == 1, "an input that a layer keeps is seen"
    assert live_inputs(mixed_model(bank, plan), checkpointing=True) == 0


def test_a_final_folder_loads_with_adapter_and_end_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """Load the folder as a user would: `import qpruner.hf`, then plain transformers, in a new
    process."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    # The end token of a chat model's turn is only in generation_config.json.
    GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.25).save_pretrained(base)
    final = final_model(base, tmp_path)
    bank = bank_source(base, tmp_path / "bank")
    model = mixed_model(bank, mixed_plan(groups_of(bank), PATTERN) | {EMBEDDINGS: "int8"})
    without = logits_of(model)
    expected = logits_of(PeftModel.from_pretrained(model, str(final)))
    kept = GenerationConfig.from_pretrained(final)
    assert kept.eos_token_id == [1, 7]
    assert kept.do_sample
    assert kept.temperature == 0.25
    ids = json.dumps(token_ids().tolist())
    written = run_python(FRESH_PROCESS, str(final), ids, folder=tmp_path)
    error = torch.tensor(json.loads(written)) - expected
    # transformers 5.24 rounds adapters on 4- and 16-bit layers to the model's bfloat16; peft keeps
    # them in float32.
    assert error.norm() < 0.05 * (expected - without).norm()
