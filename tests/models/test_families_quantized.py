"""Packed layers, embeddings and heads in every family.

Without them a run would fail when it fills the bank.
"""

from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from made_tensors import distance, same
from mixed_models import GROUP, bank_source, groups_of, mixed_model, mixed_plan
from tiny_families import FAMILY_NAMES, family_model, kept_of, logits_of, prompt
from transformers import AutoModelForCausalLM, PreTrainedModel

from qpruner.config.schema import LoraConfig, QuantizeConfig
from qpruner.models.layout import group_linears, layout_of, table_paths
from qpruner.plans.plan import EMBEDDINGS, HEAD, PrecisionPlan
from qpruner.pruning.surgery import cut
from qpruner.quantization.assembly import assemble, attach_adapters, measured_bytes, plan_model
from qpruner.quantization.bank import BankSource, read_plan
from qpruner.quantization.formats import DENSE, format_of
from qpruner.quantization.formats.layers import PackedEmbedding, PackedLinear
from qpruner.quantization.mixed import layer_tensors

DTYPE = "float32"
LORA = LoraConfig(rank=12, alpha=24)
LAYERS = {"nf4": bnb.nn.Linear4bit, "int8": (PackedLinear, PackedEmbedding)}
PATTERN = ("nf4", "int8", "bf16", "int8", "nf4")
"""Five formats over four projections per block, so that each projection gets other formats in each
block."""
NAMES = ("llama", "gpt_neox", "opt", "phi3", "llama, biases")
"""Separate and fused projections, biases, norms; the linear layers of other families are like
these."""


def with_unpacked(
    bank: BankSource, plan: dict[str, str], formats: dict[str, str]
) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(bank.checkpoint, dtype=torch.float32)
    tensors = read_plan(bank, plan)
    for path, level in formats.items():
        parts = layer_tensors(tensors, path)
        for side in "AB":
            parts.pop(f"lora_{side}", None)
        weight = model.get_submodule(path).weight
        weight.data = format_of(level).unpack(parts, weight.shape[1], torch.float32)
    return model


@dataclass(frozen=True)
class Planned:
    """A cut model, its bank and a plan for it."""

    dense: PreTrainedModel
    bank: BankSource
    plan: dict[str, str]

    def formats(self) -> dict[str, str]:
        """Return path -> format of every packed layer."""
        groups = group_linears(self.dense.config, GROUP)
        levels = {path: self.plan[group] for group, paths in groups.items() for path in paths}
        levels |= dict.fromkeys(table_paths(self.dense.config).values(), "int8")
        return {path: level for path, level in levels.items() if level != DENSE}


@pytest.fixture(scope="module", params=NAMES)
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("planned")
    dense = cut(family_model(request.param), kept_of(request.param))
    dense.save_pretrained(folder / "model")
    bank = bank_source(folder / "model", folder / "bank", LORA, DTYPE)
    plan = {EMBEDDINGS: "int8"} | mixed_plan(groups_of(bank), PATTERN)
    return Planned(dense, bank, plan | dict.fromkeys(table_paths(dense.config), "int8"))


def test_a_cut_family_has_the_layers_of_its_plan(planned: Planned, tmp_path: Path) -> None:
    """A bias, norm or embedding left at its initial value would cost accuracy without an error."""
    model = mixed_model(planned.bank, planned.plan)
    formats = planned.formats()
    for path, level in formats.items():
        assert isinstance(model.get_submodule(path), LAYERS[level])
    others = dict(planned.dense.named_parameters())
    for path in formats:
        others.pop(f"{path}.weight", None)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == others.keys() | {f"{path}.weight" for path in formats}
    assert same({key: parameters[key] for key in others}, others)
    assert all(weight.any() for weight in others.values())
    logits = logits_of(model)
    assert distance(logits, logits_of(with_unpacked(planned.bank, planned.plan, formats))) < 1e-5
    assert 0.02 < distance(logits, logits_of(planned.dense)) < 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits)


def test_a_packed_family_has_the_bytes_of_its_plan(planned: Planned) -> None:
    quantize = QuantizeConfig(
        group=GROUP, formats=("nf4", "int8", "bf16"), embeddings=("int8",), budget={"gib": 1}
    )
    layout = layout_of(planned.dense.config, quantize, 4, LORA.rank, on_gpu=False)
    promised = layout.plan_bytes(PrecisionPlan.from_dict(planned.plan))
    packed = mixed_model(planned.bank, planned.plan)
    assert measured_bytes(packed) == promised - layout.adapter_bytes


def test_adapters_start_from_the_error_and_learn(planned: Planned) -> None:
    whole = logits_of(planned.dense)
    model, starts = assemble(planned.bank, planned.plan)
    without = distance(logits_of(model.eval()), whole)
    adapted = attach_adapters(model, starts, LORA, GROUP, seed=0)
    groups = group_linears(planned.dense.config, GROUP)
    linears = [f"base_model.model.{path}.lora_A" for paths in groups.values() for path in paths]
    keys = [key for key, _ in adapted.named_parameters() if ".lora_A." in key]
    assert sorted(keys) == sorted(f"{path}.default.weight" for path in linears)
    assert distance(logits_of(adapted), whole) < 0.9 * without
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    losses = []
    for _ in range(2):
        losses.append(adapted(input_ids=prompt(), labels=prompt(), use_cache=False).loss)
        losses[-1].backward()
        torch.optim.SGD(trained, lr=0.5).step()
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
    assert torch.equal(logits_of(plan_model(bank, whole, seed=0).eval()), logits_of(dense))
    plan = whole | dict.fromkeys(tables, "int8")
    expected = logits_of(with_unpacked(bank, plan, dict.fromkeys(tables.values(), "int8")))
    packed = mixed_model(bank, plan)
    packed.save_pretrained(tmp_path / "saved")
    for model in (packed, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        head = model.get_output_embeddings()
        table = model.get_input_embeddings()
        assert isinstance(head, PackedLinear)
        assert isinstance(table, PackedEmbedding)
        assert (head.weight is table.weight) is tied
        assert distance(logits_of(model), expected) < 1e-5
