"""Packed layers, embeddings and heads in every family.

Without them a run would fail when it fills the bank.
"""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from mixed_models import GROUP, bank_source, groups_of, mixed_plan
from tiny_families import FAMILY_NAMES, family_model, kept_of, logits_of, prompt
from transformers import AutoModelForCausalLM

from qpruner.config.schema import LoraConfig, QuantizeConfig
from qpruner.models.layout import group_linears, layout_of, table_paths
from qpruner.plans.plan import EMBEDDINGS, HEAD, PrecisionPlan
from qpruner.pruning.surgery import cut
from qpruner.quantization.assembly import assemble, attach_adapters, measured_bytes, plan_model
from qpruner.quantization.bank import BankSource, read_plan
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.formats.layers import PackedEmbedding, PackedLinear
from qpruner.quantization.mixed import layer_tensors

DTYPE, LORA = "float32", LoraConfig(rank=12, alpha=24)
LAYERS = {"nf4": bnb.nn.Linear4bit, "int8": PackedLinear, "bf16": torch.nn.Linear}
PATTERN = ("nf4", "int8", "bf16", "int8", "nf4")
"""Five formats over four projections per block, so that each projection gets other formats in each
block."""
NAMES = ("llama", "gpt_neox", "opt", "phi3", "llama, biases")
"""Separate and fused projections, biases, norms; the linear layers of other families are like
these."""


def with_unpacked(
    bank: BankSource, plan: dict[str, str], formats: dict[str, str]
) -> torch.nn.Module:
    model, tensors = (
        AutoModelForCausalLM.from_pretrained(bank.checkpoint, dtype=torch.float32),
        read_plan(bank, plan),
    )
    for path, level in formats.items():
        parts = {
            key: each
            for key, each in layer_tensors(tensors, path).items()
            if not key.startswith("lora_")
        }
        weight = model.get_submodule(path).weight
        weight.data = format_of(level).unpack(parts, weight.shape[1], torch.float32)
    return model


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_family_has_the_layers_of_its_plan(name: str, tmp_path: Path) -> None:
    """A bias, norm or embedding left at its initial value would cost accuracy without an error."""
    dense = cut(family_model(name), kept_of(name))
    dense.save_pretrained(tmp_path / "model")
    bank = bank_source(tmp_path / "model", tmp_path / "bank", LORA, DTYPE)
    tables = table_paths(dense.config)
    plan = (
        {EMBEDDINGS: "int8"} | mixed_plan(groups_of(bank), PATTERN) | dict.fromkeys(tables, "int8")
    )
    model, starts = assemble(bank, plan)
    model.eval()
    groups = group_linears(dense.config, GROUP)
    linears = {path: plan[group] for group, paths in groups.items() for path in paths}
    assert all(
        isinstance(model.get_submodule(path), LAYERS[level]) for path, level in linears.items()
    )
    formats = {path: level for path, level in linears.items() if level != DENSE} | dict.fromkeys(
        tables.values(), "int8"
    )
    unpacked = with_unpacked(bank, plan, formats)
    packed = {f"{path}.weight" for path in formats}
    others = {key: each for key, each in dense.named_parameters() if key not in packed}
    assert dict(model.named_parameters()).keys() == others.keys() | packed
    assert all(
        each.abs().max() > 0 and torch.equal(model.get_parameter(key), each)
        for key, each in others.items()
    )
    found, whole = logits_of(model), logits_of(dense)
    assert distance(found, logits_of(unpacked)) < 1e-5
    assert 0.02 < distance(found, whole) < 0.5
    quantize = QuantizeConfig(
        group=GROUP, formats=tuple(LAYERS), embeddings=("int8",), budget={"gib": 1}
    )
    layout = layout_of(dense.config, quantize, 4, LORA.rank, on_gpu=False)
    assert (
        measured_bytes(model)
        == layout.plan_bytes(PrecisionPlan.from_dict(plan)) - layout.adapter_bytes
    )
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits_of(loaded), found)
    # Adapters start from the quantization error, and a step of training lowers the loss.
    adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
    with_adapter = {
        key.partition(".lora_A")[0] for key, _ in adapted.named_parameters() if ".lora_A." in key
    }
    assert with_adapter == {
        f"base_model.model.{path}" for paths in groups.values() for path in paths
    }
    assert distance(logits_of(adapted), whole) < 0.9 * distance(found, whole)
    losses = []
    for _ in range(2):
        losses.append(adapted(input_ids=prompt(), labels=prompt(), use_cache=False).loss)
        losses[-1].backward()
        torch.optim.SGD(
            (each for each in adapted.parameters() if each.requires_grad), lr=0.5
        ).step()
    assert losses[1] < losses[0] - 1e-3


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", [*FAMILY_NAMES, "opt-350m"])
def test_embeddings_and_head_are_packed(name: str, tied: bool, tmp_path: Path) -> None:
    dense = family_model(name, tie_word_embeddings=tied)
    dense.save_pretrained(tmp_path / "model")
    tables = table_paths(dense.config)
    assert dense.get_submodule(tables[EMBEDDINGS]) is dense.get_input_embeddings()
    assert (HEAD in tables) is not tied
    lora = LORA.model_copy(update={"init": "plain"})
    bank = bank_source(tmp_path / "model", tmp_path / "bank", lora, DTYPE)
    whole = dict.fromkeys(groups_of(bank), DENSE)
    plan = whole | dict.fromkeys(tables, "int8")
    expected = logits_of(with_unpacked(bank, plan, dict.fromkeys(tables.values(), "int8")))
    assert torch.equal(logits_of(plan_model(bank, whole, seed=0).eval()), logits_of(dense))
    model = assemble(bank, plan)[0].eval()
    model.save_pretrained(tmp_path / "saved")
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        head, table = each.get_output_embeddings(), each.get_input_embeddings()
        assert isinstance(head, PackedLinear) and isinstance(table, PackedEmbedding)
        assert (head.weight is table.weight) is tied
        assert distance(logits_of(each), expected) < 1e-5
