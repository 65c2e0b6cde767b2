"""Models with 4, 8 and 16 bits have real bitsandbytes layers, the predicted size, and load as they were saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mixed_models import LORA, fill_bank, final_model, logits_of, mixed_model, mixed_plan, token_ids
from peft import PeftModel
from plain_transformers import run_python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from qpruner.errors import UserError
from qpruner.models.layout import group_linears, layout_of
from qpruner.plans.plan import LinearShape, PrecisionPlan, check_cpu_widths
from qpruner.quantization.assembly import measured_bytes
from qpruner.quantization.mixed import pack, unpack

FRESH_PROCESS = """
import json, sys, torch
import qpruner.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "bitsandbytes" in type(model.get_submodule("model.layers.0.self_attn.q_proj").base_layer).__module__
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2])), use_cache=False).logits.tolist()))
"""


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain-scales", "double-quant"])
@pytest.mark.parametrize("pattern", [(8,), (4, 8, 16, 8, 4)], ids=str)
def test_a_saved_model_loads_bit_for_bit(
    tiny_model: Path, double_quant: bool, pattern: tuple[int, ...], tmp_path: Path
) -> None:
    names = fill_bank(tiny_model, tmp_path / "bank", double_quant)
    plan = mixed_plan(names, pattern)
    model = mixed_model(tiny_model, tmp_path / "bank", plan, double_quant)
    paths = group_linears(model.config, "projection")
    bits_of = {path: plan[name] for name in names for path in paths[name]}
    for path, bits in bits_of.items():
        weight = model.get_submodule(path).weight
        assert weight.dtype == {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[bits]
        assert bits != 4 or (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", double_quant)
    model.save_pretrained(tmp_path / "once")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.bfloat16)
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")
    written, again = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "again"))
    torch.testing.assert_close(written, again, rtol=0, atol=0)
    tensors = (part for name, part in written.items() if ".quant_state." not in name and "weight_format" not in name)
    layout = layout_of(model.config, "projection", 2, double_quant, LORA.rank)
    promised = layout.plan_bytes(PrecisionPlan.from_dict(plan)) - layout.adapter_bytes
    assert sum(tensor.nbytes for tensor in tensors) == measured_bytes(model) == promised, "what the budget counts"
    config = json.loads((tmp_path / "once" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["double_quant"]) == ("qpruner", double_quant)
    assert config["bits"] == {path: bits for path, bits in bits_of.items() if bits != 16}


@pytest.mark.parametrize(("shape", "dtype"), [((96, 77), torch.float32), ((1, 64), torch.bfloat16)], ids=str)
def test_packing_has_a_small_error_at_8_bits_larger_at_4(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[0, :32] = 0

    def error(bits: int, nested: bool) -> float:
        unpacked = unpack(pack(weight, bits, nested), torch.float32)
        assert unpacked.shape == weight.shape and not unpacked[0, :32].any()
        return float((unpacked - weight.float()).norm() / weight.float().norm())

    assert error(8, False) < 0.012
    assert 0.012 < error(4, False) < 0.15 and error(4, True) < 0.15


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU kernel's limits")
def test_every_width_is_decoded_correctly_or_refused() -> None:
    """The CPU kernel of bitsandbytes decodes some widths to noise; training on these must be impossible."""
    for columns in (*range(1, 18), *range(24, 264, 24), 63, 64, 65, 77, 130, 576):
        weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
        try:
            check_cpu_widths([LinearShape("layer", 64, columns)])
        except UserError:
            assert columns % 64, "multiples of 64, as most models have, must work"
        else:
            error = (unpack(pack(weight, 4, False), torch.float32) - weight).norm() / weight.norm()
            assert error < 0.15, columns
    with pytest.raises(UserError, match="layer has 80 columns"):
        check_cpu_widths([LinearShape("layer", 64, 80)])


def test_a_final_folder_loads_with_adapter_and_end_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """Load the folder as a user would: `import qpruner.hf`, then plain transformers, in a new process."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    # The end token of a chat model's turn is only in generation_config.json.
    GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.25).save_pretrained(base)
    final = final_model(base, tmp_path)
    kept = GenerationConfig.from_pretrained(final)
    assert (kept.eos_token_id, kept.do_sample, kept.temperature) == ([1, 7], True, 0.25)
    names = list(group_linears(AutoModelForCausalLM.from_pretrained(base).config, "projection"))
    model = mixed_model(base, tmp_path / "bank", mixed_plan(names, (4, 8, 16)), double_quant=False)
    without = logits_of(model)
    expected = logits_of(PeftModel.from_pretrained(model, str(final)))
    written = run_python(FRESH_PROCESS, str(final), json.dumps(token_ids().tolist()), folder=tmp_path)
    found, effect = torch.tensor(json.loads(written)), (expected - without).norm()
    assert effect > 0.1 * expected.norm(), "the test needs an adapter with an effect"
    # transformers 5.24 rounds adapters on 4- and 16-bit layers to the model's bfloat16; peft keeps them in float32.
    assert (found - expected).norm() < 0.05 * effect
