"""Models of several formats have the predicted size, load as they were saved, and keep no
activations."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_models import (
    LORA,
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

from qpruner.config.schema import QuantizeConfig
from qpruner.errors import UserError
from qpruner.models.cpu import has_bfloat16
from qpruner.models.layout import group_linears, layout_of
from qpruner.plans.plan import EMBEDDINGS, PrecisionPlan
from qpruner.quantization.assembly import assemble, measured_bytes
from qpruner.quantization.formats import by_size, format_of

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
    levels = tuple(name for name in by_size(("nf4", "nf4_double", "int8")) if name in pattern)
    bank = bank_source(tiny_model, tmp_path / "bank")
    plan = {EMBEDDINGS: tables} | mixed_plan(groups_of(bank), pattern)
    model = mixed_model(bank, plan)
    paths = {EMBEDDINGS: ("model.embed_tokens",)} | group_linears(model.config, "projection")
    formats = {path: plan[name] for name in plan for path in paths[name]}
    for path, name in formats.items():
        weight = model.get_parameter(f"{path}.weight")
        assert weight.dtype == (torch.bfloat16 if name == "bf16" else torch.uint8)
        assert "nf4" not in name or (weight.quant_state.quant_type, weight.quant_state.nested) == (
            "nf4",
            name == "nf4_double",
        )
    model.save_pretrained(tmp_path / "once")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.bfloat16)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "again")
    written, again = (
        load_file(tmp_path / name / "model.safetensors") for name in ("once", "again")
    )
    torch.testing.assert_close(written, again, rtol=0, atol=0)
    size = sum(tensor.nbytes for name, tensor in written.items() if ".quant_state." not in name)
    quantize = QuantizeConfig(
        group="projection", formats=(*levels, "bf16"), embeddings=(tables,), budget={"gib": 1}
    )
    layout = layout_of(model.config, quantize, 2, LORA.rank, on_gpu=False)
    promised = layout.plan_bytes(PrecisionPlan.from_dict(plan)) - layout.adapter_bytes
    assert size == measured_bytes(model) == promised, "what the budget counts"
    config = json.loads((tmp_path / "once" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "qpruner",
        "formats": {path: name for path, name in formats.items() if name != "bf16"},
    }


def test_weights_are_loaded_in_the_type_that_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    """The base model's files may have another type than `model.dtype`."""
    bank = bank_source(tiny_model, tmp_path / "bank", dtype="float32")
    model = assemble(bank, mixed_plan(groups_of(bank), PATTERN))[0]
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    for each, dtype in ((model, torch.float32), (loaded, torch.bfloat16)):
        assert {weight.dtype for weight in each.parameters()} == {dtype, torch.uint8}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model.layers.0.mlp.down_proj": "q9_9"},
            r"down_proj has the format q9_9, which this version .* not know",
        ),
        (
            {"model.embed_tokens": "nf4"},
            r"embed_tokens has the format nf4, but single rows .* cannot be unpacked",
        ),
    ],
    ids=["unknown", "no rows"],
)
def test_a_format_that_cannot_be_loaded_is_named(
    tiny_model: Path, changed: dict[str, str], message: str, tmp_path: Path
) -> None:
    bank = bank_source(tiny_model, tmp_path / "bank")
    mixed_model(bank, mixed_plan(groups_of(bank), PATTERN)).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["formats"] |= changed
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU kernel's limits")
def test_every_width_is_decoded_correctly_or_refused(tmp_path: Path) -> None:
    """The CPU kernel of bitsandbytes decodes some widths to noise; training on these must be
    impossible."""
    nf4 = format_of("nf4")
    for columns in (*range(1, 18), *range(24, 264, 24), 63, 64, 65, 77, 130, 576):
        weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
        if nf4.refusal(columns, None):
            assert columns % 64, "multiples of 64, as most models have, must work"
        else:
            error = (
                nf4.unpack(nf4.pack(weight), columns, torch.float32) - weight
            ).norm() / weight.norm()
            assert error < 0.15, columns


def live_inputs(model: Any, checkpointing: bool, kept: list[Any] | None = None) -> int:
    """Count the inputs of linear layers in blocks that still are in memory before the backward
    pass.

    With a list `kept`, the last layer keeps its input there.
    """
    seen: list[StorageWeakRef] = []
    adapted = get_peft_model(
        model, PeftLora(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    if checkpointing:
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in adapted.base_model.model.model.layers:
        for each in (
            layer.self_attn.q_proj,
            layer.self_attn.o_proj,
            layer.mlp.up_proj,
            layer.mlp.down_proj,
        ):
            each.register_forward_pre_hook(
                lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
            )
    if kept is not None:
        each.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    adapted.train()
    loss = adapted(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss
    alive = sum(not each.expired() for each in seen)
    loss.backward()
    assert all(
        each.grad is not None for name, each in adapted.named_parameters() if "lora_B" in name
    )
    return alive


@pytest.mark.parametrize("name", ["nf4", "int8", "bf16"])
def test_gradient_checkpointing_frees_activations(
    tiny_model: Path, name: str, tmp_path: Path
) -> None:
    """Layers that keep their input, as bitsandbytes' 8-bit layers do, would cost a gigabyte with
    Llama-2-7B."""
    bank = bank_source(tiny_model, tmp_path / "bank")
    plan = mixed_plan(groups_of(bank), (name,))
    if has_bfloat16():  # else autograd keeps copies in float32 instead
        assert live_inputs(mixed_model(bank, plan), checkpointing=False) > 0
    assert live_inputs(mixed_model(bank, plan), checkpointing=True, kept=[]) == 1, (
        "an input that a layer keeps is seen"
    )
    assert live_inputs(mixed_model(bank, plan), checkpointing=True) == 0


def test_a_final_folder_loads_with_adapter_and_end_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """Load the folder as a user would: `import qpruner.hf`, then plain transformers, in a new
    process."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    # The end token of a chat model's turn is only in generation_config.json.
    GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.25).save_pretrained(base)
    final = final_model(base, tmp_path)
    kept = GenerationConfig.from_pretrained(final)
    assert (kept.eos_token_id, kept.do_sample, kept.temperature) == ([1, 7], True, 0.25)
    bank = bank_source(base, tmp_path / "bank")
    model = mixed_model(bank, mixed_plan(groups_of(bank), PATTERN) | {EMBEDDINGS: "int8"})
    without = logits_of(model)
    expected = logits_of(PeftModel.from_pretrained(model, str(final)))
    written = run_python(
        FRESH_PROCESS, str(final), json.dumps(token_ids().tolist()), folder=tmp_path
    )
    found, effect = torch.tensor(json.loads(written)), (expected - without).norm()
    assert effect > 0.1 * expected.norm(), "the test needs an adapter with an effect"
    # transformers 5.24 rounds adapters on 4- and 16-bit layers to the model's bfloat16; peft keeps
    # them in float32.
    assert (found - expected).norm() < 0.05 * effect
