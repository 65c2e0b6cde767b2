"""4- and 8-bit layers in every family. Without them a run would fail when it fills the quantization bank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import pytest
import torch
from mixed_models import GROUP, fill_bank, mixed_plan
from safetensors.torch import load_file
from tiny_families import FAMILY_NAMES, MIXTURES, family_model, kept_of, logits_of, prompt, with_output_biases
from transformers import AutoModelForCausalLM

from qpruner.config.schema import LoraConfig
from qpruner.errors import UserError
from qpruner.models.layout import group_linears, layout_of
from qpruner.pipeline.preflight import check_quantizable
from qpruner.plans.plan import PrecisionPlan
from qpruner.pruning.surgery import cut
from qpruner.quantization.assembly import assemble, attach_adapters, measured_bytes
from qpruner.quantization.bank import entry_file
from qpruner.quantization.mixed import layer_tensors, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPE, LORA = "float32", LoraConfig(rank=12, alpha=24)
LAYERS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: torch.nn.Linear}
PATTERN = (4, 8, 16, 8, 4)
"""Five bit-widths over four projections per block, so that each projection gets other bit-widths in each block."""
OUTPUT_BIASES = ", output biases"
NAMES = ("llama", "gpt_neox", "opt", "phi3", f"llama{OUTPUT_BIASES}")
"""Separate and fused projections, biases, norms; the linear layers of other families are like these."""


@dataclass(frozen=True)
class Quantized:
    """A cut model, its folder with checkpoint and bank, and the same model with packed layers."""

    dense: PreTrainedModel
    unpacked: PreTrainedModel  # packed weights replaced by their decoded values
    model: PreTrainedModel  # assembled from the folder
    plan: dict[str, int]
    folder: Path


@pytest.fixture(scope="module", params=NAMES)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Cut a model, save it, pack it group by group into a bank, and assemble it again."""
    folder = tmp_path_factory.mktemp("family")
    name = str(request.param).removesuffix(OUTPUT_BIASES)
    dense = cut(family_model(name) if name == request.param else with_output_biases(name), kept_of(name))
    dense.save_pretrained(folder / "model")
    plan = mixed_plan(fill_bank(folder / "model", folder / "bank", False, LORA, DTYPE), PATTERN)
    unpacked: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for group, paths in group_linears(dense.config, GROUP).items():
        for path in paths if plan[group] != 16 else ():
            tensors = layer_tensors(load_file(entry_file(folder / "bank", group, plan[group])), path)
            packed = {key: value for key, value in tensors.items() if not key.startswith("lora_")}
            unpacked.get_submodule(path).weight.data = unpack(packed, torch.float32)
    return Quantized(dense, unpacked.eval(), put_together(folder, plan)[0], plan, folder)


def put_together(folder: Path, plan: dict[str, int]) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    model, starts = assemble(folder / "model", folder / "bank", GROUP, plan, DTYPE, double_quant=False)
    return model.eval(), starts


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_each_layer_is_of_its_plan(quantized: Quantized) -> None:
    groups = group_linears(quantized.model.config, GROUP)
    assert set(quantized.plan.values()) == {4, 8, 16}
    packed = {path for path, module in quantized.model.named_modules() if isinstance(module, (LAYERS[4], LAYERS[8]))}
    assert packed == {path for name, paths in groups.items() for path in paths if quantized.plan[name] != 16}
    for name, paths in groups.items():
        for path in paths:
            layer, dense = quantized.model.get_submodule(path), quantized.dense.get_submodule(path)
            assert isinstance(layer, LAYERS[quantized.plan[name]])
            assert (layer.out_features, layer.in_features) == tuple(dense.weight.shape)


def test_what_is_not_quantized_survives(quantized: Quantized) -> None:
    """A bias, norm or embedding left at its initial value would cost accuracy without an error."""
    groups = group_linears(quantized.model.config, GROUP)
    packed = {f"{path}.weight" for name, paths in groups.items() for path in paths if quantized.plan[name] != 16}
    found = dict(quantized.model.named_parameters())
    expected = {name: parameter for name, parameter in quantized.dense.named_parameters() if name not in packed}
    assert set(found) - packed == set(expected)
    for name, parameter in expected.items():
        assert parameter.abs().max() > 0
        assert torch.equal(found[name], parameter), name


def test_the_logits_are_those_of_the_packed_weights(quantized: Quantized) -> None:
    found, dense = logits_of(quantized.model), logits_of(quantized.dense)
    expected = logits_of(quantized.unpacked)
    # The activations of LLM.int8 are rounded to 8 bits.
    assert distance(found, expected) < 0.05
    assert 0.02 < distance(found, dense) < 0.5


def test_the_model_weighs_what_the_plan_says(quantized: Quantized) -> None:
    layout = layout_of(quantized.dense.config, GROUP, 4, double_quant=False, lora_rank=LORA.rank)
    promised = layout.plan_bytes(PrecisionPlan.from_dict(quantized.plan)) - layout.adapter_bytes
    assert measured_bytes(quantized.model) == promised


def test_a_saved_model_loads_bit_for_bit(quantized: Quantized, tmp_path: Path) -> None:
    quantized.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(quantized.model))


def test_adapters_start_from_the_quantization_error(quantized: Quantized) -> None:
    grouped = [path for paths in group_linears(quantized.model.config, GROUP).values() for path in paths]
    adapted = attach_adapters(*put_together(quantized.folder, quantized.plan), LORA, GROUP, seed=0)
    found = {key.partition(".lora_A")[0] for key, _ in adapted.named_parameters() if ".lora_A." in key}
    assert found == {f"base_model.model.{path}" for path in grouped}
    dense = logits_of(quantized.dense)
    assert distance(logits_of(adapted), dense) < 0.9 * distance(logits_of(quantized.model), dense)
    losses = []
    for _ in range(2):
        loss = adapted(input_ids=prompt(), labels=prompt(), use_cache=False).loss
        loss.backward()
        torch.optim.SGD((each for each in adapted.parameters() if each.requires_grad), lr=0.5).step()
        losses.append(float(loss.detach()))
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
