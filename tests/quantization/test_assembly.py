"""The model of a plan: its initial adapters, damaged shards, several GPUs."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixed_models import DTYPE, GROUP, bank_source, groups_of, mixed_plan, token_ids

from qpruner.errors import CorruptFile
from qpruner.models.layout import group_linears
from qpruner.models.loading import load_dense
from qpruner.plans.plan import EMBEDDINGS
from qpruner.quantization.assembly import plan_model
from qpruner.quantization.bank import BankSource, read_plan

Banked = tuple[BankSource, list[str]]
Plan = dict[str, str]


@pytest.fixture(scope="module")
def banked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Banked:
    bank = bank_source(tiny_model, tmp_path_factory.mktemp("bank"))
    return bank, groups_of(bank)


def train_a_little(model: torch.nn.Module) -> None:
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def test_every_grouped_layer_gets_its_initial_adapter(tiny_model: Path, banked: Banked) -> None:
    plan = mixed_plan(banked[1], ("nf4", "int8", "bf16"))
    plain, read = [], read_plan(banked[0], plan)
    for seed in (0, 1):
        torch.manual_seed(11 + seed)
        model = plan_model(banked[0], plan, seed)
        for name, paths in group_linears(model.config, GROUP).items():
            for path in paths:
                layer = model.base_model.model.get_submodule(path)
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                assert a.dtype == b.dtype == torch.float32
                if plan[name] == "bf16":
                    assert a.abs().max() > 0 and not b.any(), (
                        "the adapter of an unpacked layer starts at zero"
                    )
                    plain.append(a)
                else:
                    assert torch.equal(a, read[f"{path}.lora_A"]) and torch.equal(
                        b, read[f"{path}.lora_B"]
                    )
    assert not torch.equal(plain[0], plain[len(plain) // 2]), "the seed changes the random adapters"


def test_a_broken_checkpoint_shard_is_named(
    tiny_model: Path, banked: Banked, tmp_path: Path
) -> None:
    load_dense(str(tiny_model), DTYPE).save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, 100)
    with pytest.raises(CorruptFile, match=shard.name):
        plan_model(
            replace(banked[0], checkpoint=tmp_path), mixed_plan(banked[1], ("bf16",)), seed=0
        )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs to spread a model over")
def test_a_trial_over_several_gpus_matches_a_single_gpu(
    tiny_model: Path, banked: Banked, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = banked[1]
    logits = []
    for number in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=number: number)
        for plan in (
            mixed_plan(names, ("nf4", "int8")),
            mixed_plan(names, ("int8", "bf16", "nf4")) | {EMBEDDINGS: "int8"},
        ):
            model = plan_model(banked[0], plan, seed=0)
            assert len({parameter.device for parameter in model.parameters()}) == number
            train_a_little(model)
        ids = token_ids().to(next(model.parameters()).device)
        logits.append(model.eval()(input_ids=ids, use_cache=False).logits.float().cpu())
    assert (logits[0] - logits[1]).norm() < 0.01 * logits[1].norm()
