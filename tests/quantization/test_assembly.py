"""The model of a plan: its initial adapters, damaged shards, several GPUs."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_tensors import distance, token_rows
from mixed_models import (
    DTYPE,
    GROUP,
    LEVELS,
    PATTERN,
    bank_source,
    groups_of,
    mixed_plan,
    token_ids,
)

from qpruner.errors import CorruptFile
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.plans.plan import EMBEDDINGS
from qpruner.quantization.assembly import plan_model
from qpruner.quantization.bank import BankSource, read_plan


@pytest.fixture(scope="module")
def bank(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> BankSource:
    return bank_source(tiny_model, tmp_path_factory.mktemp("bank"))


def train_a_little(model: torch.nn.Module) -> None:
    ids = torch.tensor(token_rows(2, 9)).to(next(model.parameters()).device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()


def test_every_grouped_layer_gets_its_initial_adapter(bank: BankSource) -> None:
    """Those of packed layers are read from the bank; those of others are drawn by the seed, and
    start at zero."""
    plan = mixed_plan(groups_of(bank), PATTERN)
    stored = read_plan(bank, plan)
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(11 + seed)
        model = plan_model(bank, plan, seed)
        for name, paths in group_linears(model.config, GROUP).items():
            for path in paths:
                layer = model.base_model.model.get_submodule(path)
                lora_a = layer.lora_A["default"].weight
                lora_b = layer.lora_B["default"].weight
                assert lora_a.dtype == lora_b.dtype == torch.float32
                if plan[name] == "bf16":
                    assert lora_a.any()
                    assert not lora_b.any()
                    drawn.append(lora_a)
                else:
                    assert torch.equal(lora_a, stored[f"{path}.lora_A"])
                    assert torch.equal(lora_b, stored[f"{path}.lora_B"])
    assert not torch.equal(drawn[0], drawn[len(drawn) // 2])


def test_a_broken_checkpoint_shard_is_named(
    tiny_model: Path, bank: BankSource, tmp_path: Path
) -> None:
    load_dense(str(tiny_model), DTYPE).save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, 100)
    plan = dict.fromkeys(groups_of(bank), "bf16")
    with pytest.raises(CorruptFile, match=shard.name):
        plan_model(replace(bank, checkpoint=tmp_path), plan, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs to spread a model over")
def test_a_trial_over_several_gpus_matches_a_single_gpu(
    bank: BankSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = groups_of(bank)
    several_formats = mixed_plan(names, ("int8", "bf16", "nf4")) | {EMBEDDINGS: "int8"}
    logits = []
    for number in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=number: number)
        for plan in (mixed_plan(names, LEVELS), several_formats):
            model = plan_model(bank, plan, seed=0)
            assert len({parameter.device for parameter in model.parameters()}) == number
            train_a_little(model)
        ids = token_ids().to(next(model.parameters()).device)
        logits.append(model.eval()(input_ids=ids, use_cache=False).logits.cpu())
    assert distance(*logits) < 0.01
