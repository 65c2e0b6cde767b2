"""4- and 8-bit layers in every family. Without them a run would fail when it fills the quantization bank."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from mixed_models import GROUP, fill_bank, mixed_plan
from tiny_families import FAMILY_NAMES, MIXTURES, family_model, kept_of, logits_of, prompt, with_output_biases
from transformers import AutoModelForCausalLM

from qpruner.config.schema import LoraConfig
from qpruner.errors import UserError
from qpruner.models.layout import group_linears, layout_of
from qpruner.pipeline.preflight import check_quantizable
from qpruner.plans.plan import PrecisionPlan
from qpruner.pruning.surgery import cut
from qpruner.quantization.assembly import assemble, attach_adapters, measured_bytes
from qpruner.quantization.bank import read_plan
from qpruner.quantization.mixed import layer_tensors, unpack

DTYPE, LORA = "float32", LoraConfig(rank=12, alpha=24)
LAYERS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: torch.nn.Linear}
PATTERN = (4, 8, 16, 8, 4)
"""Five bit-widths over four projections per block, so that each projection gets other bit-widths in each block."""
OUTPUT_BIASES = ", output biases"
NAMES = ("llama", "gpt_neox", "opt", "phi3", f"llama{OUTPUT_BIASES}")
"""Separate and fused projections, biases, norms; the linear layers of other families are like these."""


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_family_has_the_layers_of_its_plan(name: str, tmp_path: Path) -> None:
    """A bias, norm or embedding left at its initial value would cost accuracy without an error."""
    family = name.removesuffix(OUTPUT_BIASES)
    dense = cut(family_model(family) if name == family else with_output_biases(family), kept_of(family))
    dense.save_pretrained(tmp_path / "model")
    plan = mixed_plan(fill_bank(tmp_path / "model", tmp_path / "bank", False, LORA, DTYPE), PATTERN)
    model, starts = assemble(tmp_path / "model", tmp_path / "bank", GROUP, plan, DTYPE, double_quant=False)
    model.eval()
    packed, tensors = set(), read_plan(tmp_path / "bank", plan)
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    groups = group_linears(dense.config, GROUP)
    for path, bits in ((path, plan[group]) for group, paths in groups.items() for path in paths):
        assert isinstance(model.get_submodule(path), LAYERS[bits])
        if bits != 16:
            packed.add(f"{path}.weight")
            parts = {key: each for key, each in layer_tensors(tensors, path).items() if not key.startswith("lora_")}
            unpacked.get_submodule(path).weight.data = unpack(parts, torch.float32)
    others = {key: each for key, each in dense.named_parameters() if key not in packed}
    assert dict(model.named_parameters()).keys() == others.keys() | packed
    assert all(each.abs().max() > 0 and torch.equal(model.get_parameter(key), each) for key, each in others.items())
    found, whole = logits_of(model), logits_of(dense)
    assert distance(found, logits_of(unpacked)) < 0.05, "LLM.int8 rounds activations to 8 bits"
    assert 0.02 < distance(found, whole) < 0.5
    layout = layout_of(dense.config, GROUP, 4, double_quant=False, lora_rank=LORA.rank)
    assert measured_bytes(model) == layout.plan_bytes(PrecisionPlan.from_dict(plan)) - layout.adapter_bytes
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits_of(loaded), found)
    # Adapters start from the quantization error, and a step of training lowers the loss.
    adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
    with_adapter = {key.partition(".lora_A")[0] for key, _ in adapted.named_parameters() if ".lora_A." in key}
    assert with_adapter == {f"base_model.model.{path}" for paths in groups.values() for path in paths}
    assert distance(logits_of(adapted), whole) < 0.9 * distance(found, whole)
    losses = []
    for _ in range(2):
        losses.append(adapted(input_ids=prompt(), labels=prompt(), use_cache=False).loss)
        losses[-1].backward()
        torch.optim.SGD((each for each in adapted.parameters() if each.requires_grad), lr=0.5).step()
    assert losses[1] < losses[0] - 1e-3


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_stacked_experts_alone_are_refused_by_name(name: str) -> None:
    """The first blocks of Qwen3-MoE may be dense."""
    model = family_model(name, **({"mlp_only_layers": [0]} if name == "qwen3_moe" else {}))
    if name not in MIXTURES:
        check_quantizable(model.config)
        return
    with pytest.raises(UserError, match=rf"the experts of a {name} model .*\(mlp\.experts\.gate_up_proj\)"):
        check_quantizable(model.config)
    assert model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").dim() == 3
