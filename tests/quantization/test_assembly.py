"""Assembling plans one after another gives the same models as assembling each in a fresh process."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixed_models import DTYPE, GROUP, LORA, bank_source, groups_of, logits_of, mixed_plan, token_ids
from transformers import AutoConfig, PreTrainedModel

from qpruner.errors import CorruptFile
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.plans.plan import EMBEDDINGS
from qpruner.quantization import assembly
from qpruner.quantization.assembly import PlanAssembler, assemble, attach_adapters
from qpruner.quantization.bank import BankSource, read_plan

Banked = tuple[BankSource, list[str]]
Plan = dict[str, str]
PATTERNS = [("nf4",), ("bf16",), ("nf4", "int8", "bf16", "nf4_double"), ("int8",), ("bf16", "nf4", "int8")]
TABLES = [{}, {EMBEDDINGS: "int8"}, {EMBEDDINGS: "int8"}, {EMBEDDINGS: "bf16"}, {EMBEDDINGS: "int8"}]


@pytest.fixture(scope="module")
def banked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Banked:
    bank = bank_source(tiny_model, tmp_path_factory.mktemp("bank"))
    return bank, groups_of(bank)


def assembler_of(banked: Banked) -> PlanAssembler:
    return PlanAssembler(banked[0])


def fresh_model(banked: Banked, plan: Plan, seed: int) -> torch.nn.Module:
    model, starts = assemble(banked[0], plan)
    peft_model: torch.nn.Module = attach_adapters(model, starts, LORA, GROUP, seed)
    return peft_model


def train_a_little(model: torch.nn.Module) -> None:
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one if isinstance(one[name], torch.Tensor))
    assert torch.equal(logits_of(found.eval()), logits_of(expected.eval()))


def test_the_next_plan_gives_the_model_of_a_fresh_process(tiny_model: Path, banked: Banked) -> None:
    """Before and after training, even if the previous model was trained and its adapters were disabled."""
    assembler = assembler_of(banked)
    for pattern, tables in zip(PATTERNS, TABLES, strict=True):
        plan = mixed_plan(banked[1], pattern) | tables
        expected = fresh_model(banked, plan, seed=3)
        state = torch.get_rng_state()
        found = assembler.model(plan, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(found, expected)
        for each in (expected, found):
            train_a_little(each)
        assert_same(found, expected)
        found.disable_adapter_layers()


def test_only_groups_of_other_formats_are_replaced(tiny_model: Path, banked: Banked) -> None:
    assembler, names = assembler_of(banked), banked[1]
    plan = mixed_plan(names, ("nf4", "int8"))
    before = dict(assembler.model(plan, seed=0).named_parameters())
    after = dict(assembler.model({**plan, names[2]: "int8"}, seed=0).named_parameters())
    changed = {name for name, weight in after.items() if "lora_" not in name and weight is not before[name]}
    paths = group_linears(AutoConfig.from_pretrained(tiny_model), GROUP)[names[2]]
    assert changed == {f"base_model.model.{path}.base_layer.weight" for path in paths}


def test_every_grouped_layer_gets_its_initial_adapter(tiny_model: Path, banked: Banked) -> None:
    plan = mixed_plan(banked[1], ("nf4", "int8", "bf16"))
    plain, read = [], read_plan(banked[0], plan)
    for seed in (0, 1):
        torch.manual_seed(11 + seed)
        model = fresh_model(banked, plan, seed)
        for name, paths in group_linears(model.config, GROUP).items():
            for path in paths:
                layer = model.base_model.model.get_submodule(path)
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                assert a.dtype == b.dtype == torch.float32
                if plan[name] == "bf16":
                    assert a.abs().max() > 0 and not b.any(), "the adapter of an unpacked layer starts at zero"
                    plain.append(a)
                else:
                    assert torch.equal(a, read[f"{path}.lora_A"]) and torch.equal(b, read[f"{path}.lora_B"])
    assert not torch.equal(plain[0], plain[len(plain) // 2]), "the seed changes the random adapters"


def test_a_broken_checkpoint_shard_is_named(tiny_model: Path, banked: Banked, tmp_path: Path) -> None:
    load_dense(str(tiny_model), DTYPE).save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, 100)
    with pytest.raises(CorruptFile, match=shard.name):
        fresh_model((replace(banked[0], checkpoint=tmp_path), []), mixed_plan(banked[1], ("bf16",)), seed=0)


def spread_over_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """Simulate a model over several GPUs on the CPU, with accelerate's hooks at every module."""
    from accelerate import dispatch_model

    places = dict.fromkeys([*(f"model.{name}" for name, _ in model.model.named_children()), "lm_head"], "cpu")
    spread: PreTrainedModel = dispatch_model(model, places, force_hooks=True)
    return spread


def test_groups_are_replaced_in_a_model_over_several_gpus(
    tiny_model: Path, banked: Banked, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = mixed_plan(banked[1], ("nf4", "bf16", "int8")) | {EMBEDDINGS: "int8"}
    expected = assembler_of(banked).model(plan, seed=0)
    monkeypatch.setattr(assembly, "_placed", spread_over_hooks)
    assembler = assembler_of(banked)
    first = assembler.model(mixed_plan(banked[1], ("int8", "nf4")), seed=0)
    assert any(hasattr(module, "_hf_hook") for module in first.modules())
    train_a_little(first)
    found = assembler.model(plan, seed=0)
    assert all(
        hasattr(found.get_base_model().get_submodule(path), "_hf_hook") for path in ("model.embed_tokens", "lm_head")
    )
    for model in (expected, found):
        train_a_little(model)
    assert torch.equal(logits_of(found.eval()), logits_of(expected.eval()))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs to spread a model over")
def test_a_trial_over_several_gpus_matches_a_single_gpu(
    tiny_model: Path, banked: Banked, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = banked[1]
    logits = []
    for number in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=number: number)
        assembler = assembler_of(banked)
        for plan in (
            mixed_plan(names, ("nf4", "int8")),
            mixed_plan(names, ("int8", "bf16", "nf4")) | {EMBEDDINGS: "int8"},
        ):
            model = assembler.model(plan, seed=0)
            assert len({parameter.device for parameter in model.parameters()}) == number
            train_a_little(model)
        ids = token_ids().to(next(model.parameters()).device)
        logits.append(model.eval()(input_ids=ids, use_cache=False).logits.float().cpu())
    assert (logits[0] - logits[1]).norm() < 0.01 * logits[1].norm()
