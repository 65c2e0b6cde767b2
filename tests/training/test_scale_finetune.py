"""Fine-tunes of scales: what is trained, resumed, saved and scored."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tensors import same
from mixed_models import bank_source, groups_of, logits_of
from safetensors.torch import load_file

from qpruner.config.schema import QuantizeConfig, TrainingConfig
from qpruner.models.layout import layout_of
from qpruner.plans.plan import EMBEDDINGS, PrecisionPlan
from qpruner.quantization.assembly import measured_bytes, plan_model
from qpruner.quantization.bank import BankSource, read_plan
from qpruner.training.checkpoints import (
    TRAINED_WEIGHTS,
    Ownership,
    load_trained,
    publish_trained,
)
from qpruner.training.finetune import Listener, Schedule, finetune

Rows = list[dict[str, list[int]]]
SETTINGS = TrainingConfig(learning_rate=1e-2, batch_size=4, micro_batch_size=2)
FORMATS = ["q4_0", "q8_0", "bf16", "q4_1"]


@pytest.fixture(scope="module")
def bank(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> BankSource:
    plain = bank_source(tiny_model, tmp_path_factory.mktemp("bank"), dtype="bfloat16")
    return replace(plain, method="scales")


def plan_of(bank: BankSource, embeddings: str = "q8_0") -> dict[str, str]:
    groups = groups_of(bank)
    formats = (FORMATS[place % len(FORMATS)] for place in range(len(groups)))
    return {EMBEDDINGS: embeddings} | dict(zip(groups, formats, strict=True))


def trained(
    bank: BankSource, rows: Rows, output: Path, start: Path | None = None, **changes: Any
) -> tuple[Any, list[float]]:
    """Train the plan's scales for six steps; return the model and the losses."""
    model = plan_model(bank, plan_of(bank), seed=5)
    losses: list[float] = []

    def on_save(checkpoint: Path) -> None:
        if not (output / "first").exists():
            shutil.copytree(checkpoint, output / "first")

    finetune(
        model,
        rows,
        SETTINGS.model_copy(update=changes),
        Schedule(6, rungs=(3, 6)),
        output,
        seed=5,
        pad_id=1,
        start=start,
        listener=Listener(on_step=lambda step, total, loss: losses.append(loss), on_save=on_save),
    )
    return model, losses


def test_entries_have_no_adapters(bank: BankSource) -> None:
    names = [name for name in read_plan(bank, plan_of(bank)) if "lora" in name]
    assert names == []


def test_only_scales_change_and_the_loss_falls(
    bank: BankSource, rows: Rows, tmp_path: Path
) -> None:
    before = plan_model(bank, plan_of(bank), seed=5).state_dict()
    model, losses = trained(bank, rows, tmp_path)
    assert min(losses[3:]) < losses[0]
    after = model.state_dict()
    changed = {
        name.rpartition(".")[2] for name in after if not torch.equal(after[name], before[name])
    }
    assert changed == {"scale_changes"}
    moved = [name for name in after if name.endswith("scale_changes") and after[name].any()]
    of_formats = [name for name in plan_of(bank).values() if name != "bf16"]
    assert len(moved) >= len(of_formats)
    assert "model.embed_tokens.scale_changes" in moved


def test_a_resumed_training_repeats_the_uninterrupted_run(
    bank: BankSource, rows: Rows, tmp_path: Path
) -> None:
    model, losses = trained(bank, rows, tmp_path / "whole")
    first = tmp_path / "whole" / "first"
    assert (first / TRAINED_WEIGHTS["scales"]).is_file()
    assert not list(first.glob("model*"))
    resumed, later = trained(bank, rows, tmp_path / "resumed", first)
    assert later == losses[3:]
    assert same(resumed.state_dict(), model.state_dict())


def test_gradient_checkpointing_changes_nothing(
    bank: BankSource, rows: Rows, tmp_path: Path
) -> None:
    _, losses = trained(bank, rows, tmp_path / "plain")
    _, checkpointed = trained(bank, rows, tmp_path / "again", gradient_checkpointing=True)
    assert checkpointed == pytest.approx(losses, rel=1e-4)


def test_what_is_published_loads_to_the_same_bits(
    bank: BankSource, rows: Rows, tmp_path: Path
) -> None:
    model, _ = trained(bank, rows, tmp_path / "work")
    ownership = Ownership(tmp_path / "owner.json")
    ownership.take()
    folder = tmp_path / "trained"
    publish_trained(model, folder, tmp_path / "checkpoints", ownership)
    changes = load_file(folder / TRAINED_WEIGHTS["scales"])
    assert all(tensor.dtype == torch.float32 for tensor in changes.values())
    loaded = plan_model(bank, plan_of(bank), seed=0)
    load_trained(loaded, folder)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits_of(loaded.eval()), logits_of(model.eval()))


def test_bytes_are_those_of_the_plan_without_an_adapter(bank: BankSource) -> None:
    model = plan_model(bank, plan_of(bank), seed=0)
    quantize = QuantizeConfig(
        formats=("q4_0", "q4_1", "q8_0", "bf16"), embeddings=("q8_0",), group=bank.grouping
    )
    layout = layout_of(
        model.config, quantize, 2, bank.lora.rank, on_gpu=False, cut="base", method="scales"
    )
    plan = PrecisionPlan.from_dict(plan_of(bank))
    assert measured_bytes(model) == layout.plan_bytes(plan)
    num_trained = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    of_plan = sum(group.num_scales(plan.as_dict()[group.name]) for group in layout.groups)
    assert num_trained == of_plan
    assert layout.trained_bytes >= 4 * num_trained
    unpacked = layout.dense()
    adapted = replace(layout, method="adapter")
    assert layout.plan_bytes(unpacked) == adapted.plan_bytes(unpacked), "it gets an adapter"
