"""Groups are exchanged from plan to plan: the second plan of a process is the model of a fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixed_models import DTYPE, GROUP, LORA, fill_bank, logits_of, mixed_plan, token_ids
from transformers import AutoConfig, PreTrainedModel

from qpruner.models.layout import group_linears
from qpruner.quantization import assembly
from qpruner.quantization.assembly import PlanAssembler, assemble, attach_adapters, measured_bytes

Banked = tuple[Path, list[str], bool]
PATTERNS = [(4,), (8,), (16,), (4, 8, 16, 8, 4), (16, 4, 8)]


@pytest.fixture(scope="module", params=[False, True], ids=["single", "double"])
def banked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Banked:
    folder = tmp_path_factory.mktemp("bank")
    return folder, fill_bank(tiny_model, folder, request.param), request.param


def weights_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if "lora_" not in name}


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def train_a_little(model: torch.nn.Module) -> None:
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("second", PATTERNS, ids=str)
@pytest.mark.parametrize("first", PATTERNS, ids=str)
def test_the_second_plan_is_the_model_of_a_fresh_process(
    tiny_model: Path, banked: Banked, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    folder, names, double = banked
    assembler = PlanAssembler(tiny_model, folder, GROUP, DTYPE, double, LORA)
    before = assembler.model(mixed_plan(names, first), seed=3)
    train_a_little(before)
    before.disable_adapter_layers()
    plan = mixed_plan(names, second)
    model, starts = assemble(tiny_model, folder, GROUP, plan, DTYPE, double)
    fresh = attach_adapters(model, starts, LORA, GROUP, seed=3)
    state = torch.get_rng_state()
    again = assembler.model(plan, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    expected, found = everything(fresh), everything(again)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert measured_bytes(again) == measured_bytes(fresh)
    assert torch.equal(logits_of(again.eval()), logits_of(fresh.eval()))
    for each in (fresh, again):
        train_a_little(each)
    expected, found = everything(fresh), everything(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(each.requires_grad for each in again.parameters()) == sum(
        each.requires_grad for each in fresh.parameters()
    )
    assert torch.equal(logits_of(again.eval()), logits_of(fresh.eval()))


def test_only_the_groups_whose_bits_differ_are_exchanged(tiny_model: Path, banked: Banked) -> None:
    folder, names, double = banked
    assembler = PlanAssembler(tiny_model, folder, GROUP, DTYPE, double, LORA)
    plan = mixed_plan(names, (4, 8))
    before = weights_of(assembler.model(plan, seed=0))
    after = weights_of(assembler.model({**plan, names[2]: 8}, seed=0))
    changed = {name for name, weight in after.items() if weight is not before[name]}
    paths = group_linears(AutoConfig.from_pretrained(tiny_model), GROUP)[names[2]]
    assert changed == {f"base_model.model.{path}.base_layer.weight" for path in paths}


def spread_over_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """As over several GPUs, all of which are the one CPU: accelerate's hooks move what goes into every module."""
    from accelerate import dispatch_model

    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" for index in range(model.config.num_hidden_layers)}
    spread: PreTrainedModel = dispatch_model(model, places, force_hooks=True)
    return spread


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_groups_of_a_spread_model_are_exchanged(
    bits: int, tiny_model: Path, banked: Banked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes the place of a layer with a hook computes and trains as in a model that was put together so."""
    folder, names, double = banked
    plan = {**mixed_plan(names, (4, 8)), names[1]: bits}
    expected = PlanAssembler(tiny_model, folder, GROUP, DTYPE, double, LORA).model(plan, seed=0)
    monkeypatch.setattr(assembly, "_placed", spread_over_hooks)
    assembler = PlanAssembler(tiny_model, folder, GROUP, DTYPE, double, LORA)
    first = assembler.model(mixed_plan(names, (8, 4)), seed=0)
    assert any(hasattr(module, "_hf_hook") for module in first.modules())
    train_a_little(first)
    found = assembler.model(plan, seed=0)
    for model in (expected, found):
        train_a_little(model)
    assert torch.equal(logits_of(found.eval()), logits_of(expected.eval()))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs to spread a model over")
def test_a_trial_over_several_gpus_is_that_of_one(
    tiny_model: Path, banked: Banked, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names, double = banked
    plans = mixed_plan(names, (4, 8)), mixed_plan(names, (8, 16, 4))
    logits = []
    for number in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=number: number)
        assembler = PlanAssembler(tiny_model, folder, GROUP, DTYPE, double, LORA)
        for plan in plans:
            model = assembler.model(plan, seed=0)
            devices = {parameter.device for parameter in model.parameters()}
            assert len(devices) == number
            train_a_little(model)
        ids = token_ids().to(next(model.parameters()).device)
        logits.append(model.eval()(input_ids=ids, use_cache=False).logits.float().cpu())
    assert (logits[0] - logits[1]).norm() < 0.01 * logits[1].norm()
