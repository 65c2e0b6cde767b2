"""The training loop: a resumed training gives the same result as an uninterrupted one."""

import copy
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_tensors import distance, token_rows
from mixed_models import bank_source, groups_of
from transformers import TrainerCallback

from qpruner.config.schema import LoraConfig, TrainingConfig
from qpruner.data.encoding import EncodedRows, load_encoded, save_encoded
from qpruner.errors import TrainingDiverged
from qpruner.quantization.assembly import plan_model
from qpruner.training.finetune import Listener, Schedule, Share, _Batches, finetune, step_losses

Rows = list[dict[str, list[int]]]
Fresh = Callable[..., Any]
"""Takes dtype and dropout."""
NORM = "base_model.model.model.norm"
SETTINGS = TrainingConfig(learning_rate=1e-2, batch_size=4, micro_batch_size=2)


def losses(
    model: Any,
    rows: Rows,
    output: Path,
    start: Path | None = None,
    save_seconds: float = 30.0,
    **changes: Any,
) -> list[float]:
    """Train for six steps, and keep the first checkpoint in `output` / `first`."""
    seen: list[float] = []

    def on_save(checkpoint: Path) -> None:
        if not (output / "first").exists():
            shutil.copytree(checkpoint, output / "first")

    listener = Listener(on_step=lambda step, total, loss: seen.append(loss), on_save=on_save)
    settings = SETTINGS.model_copy(update=changes)
    schedule = Schedule(6, rungs=(3, 6), save_seconds=save_seconds)
    tune(model, rows, output, schedule, settings, start=start, listener=listener)
    return seen


def tune(
    model: Any,
    rows: Any,
    output: Path,
    schedule: Schedule,
    settings: TrainingConfig = SETTINGS,
    **others: Any,
) -> None:
    finetune(model, rows, settings, schedule, output, seed=5, pad_id=1, **others)


@pytest.mark.parametrize(("save_seconds", "step"), [(30.0, 3), (0.0, 1)], ids=["rung", "time"])
def test_a_resumed_training_repeats_the_uninterrupted_run(
    save_seconds: float, step: int, fresh: Fresh, rows: Rows, tmp_path: Path
) -> None:
    whole = losses(fresh(dropout=0.1), rows, tmp_path / "whole", save_seconds=save_seconds)
    assert len(whole) == 6
    first = tmp_path / "whole" / "first"
    assert step_losses(first) == whole[:step]
    assert losses(fresh(dropout=0.1), rows, tmp_path / "resumed", first) == whole[step:]
    states = []
    for name in ("whole", "resumed"):
        file = tmp_path / name / "checkpoint-6" / "optimizer.pt"
        states.append(torch.load(file, weights_only=True)["state"])
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_rungs_have_full_checkpoints_and_only_adapters_change(
    fresh: Fresh, rows: Rows, tmp_path: Path
) -> None:
    steps: list[int] = []

    def on_rung(step: int, checkpoint: Path, loss: float) -> None:
        assert (checkpoint / "adapter_model.safetensors").is_file()
        steps.append(step)

    model = fresh()
    before = copy.deepcopy(model.state_dict())
    listener = Listener(on_rung=on_rung)
    tune(model, rows, tmp_path, Schedule(steps=4, rungs=(1, 2, 4)), listener=listener)
    assert steps == [1, 2, 4]
    after = model.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed
    assert all("lora_" in name for name in changed)


def test_averages_in_8_bits_learn_alike_and_resume(
    tiny_model: Path, rows: Rows, tmp_path: Path
) -> None:
    # bitsandbytes keeps the averages of fewer than 4096 values in 32 bits.
    bank = bank_source(tiny_model, tmp_path / "bank", LoraConfig(rank=64, alpha=64))
    plan = dict.fromkeys(groups_of(bank), "nf4")

    def trained(folder: str, **others: Any) -> list[float]:
        return losses(plan_model(bank, plan, seed=5), rows, tmp_path / folder, **others)

    plain = trained("plain")
    whole = trained("whole", optimizer="adamw_8bit")
    assert whole[0] == plain[0]
    assert whole != plain
    assert whole == pytest.approx(plain, rel=0.02)
    first = tmp_path / "whole" / "first"
    state = torch.load(first / "optimizer.pt", weights_only=True)["state"]
    kept = [averages["__bnb_optimizer_quant_state__"]["state1"] for averages in state.values()]
    assert torch.uint8 in {values.dtype for values in kept}
    assert trained("resumed", start=first, optimizer="adamw_8bit") == whole[3:]


def test_gradient_checkpointing_changes_no_loss(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    plain = losses(fresh(), rows, tmp_path / "plain")
    found = losses(fresh(), rows, tmp_path / "recomputed", gradient_checkpointing=True)
    assert found == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(("num_rows", "processes"), [(1, 3), (24, 1), (70, 3)])
def test_processes_share_the_batches_of_a_random_order(
    num_rows: int, processes: int, epoch: int
) -> None:
    """In each step, the processes together take the next twelve rows of the epoch's order, each row
    once.

    In each turn of a batch, all rows of all processes are at least as long as any row of the next
    turn.
    """
    settings = TrainingConfig(batch_size=12, micro_batch_size=2)
    lengths = np.random.default_rng(1).lognormal(3.5, 0.8, num_rows).clip(4, 200).astype(int)
    turns_of_processes = []
    for rank in range(processes):
        batches = _Batches(lengths.tolist(), settings, 5, Share(rank, processes))
        batches.epoch = epoch
        turns_of_processes.append(list(batches))
        assert len(batches) == len(turns_of_processes[-1]) == -(-num_rows // 2 // processes)
    # Rows that all processes take in each turn, but for the blank row.
    turns = [
        [row for batch in turn for row in batch if row != num_rows]
        for turn in zip(*turns_of_processes, strict=True)
    ]
    order = np.random.default_rng([5, epoch]).permutation(num_rows).tolist()
    of_step = 6 // processes
    for step, begin in enumerate(range(0, num_rows, 12)):
        of_batch = turns[step * of_step : (step + 1) * of_step]
        assert sorted(itertools.chain(*of_batch)) == sorted(order[begin : begin + 12])
        for longer, shorter in itertools.pairwise(of_batch):
            assert lengths[longer].min() >= lengths[shorter].max()


class Gradients(TrainerCallback):
    """Keeps the gradient of each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(gradient_of(kwargs["model"]))


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_gradient_is_that_of_the_whole_batch(
    micro_batch_size: int, fresh: Fresh, tmp_path: Path
) -> None:
    """It is the mean over all labelled tokens of the optimizer batch, in float32, for any size of
    micro-batch."""
    rows = []
    peft_model = fresh("float32")
    num_labelled = 0
    for length in (6, 60, 8, 33, 7, 12, 51, 9):
        ids = torch.tensor(token_rows(1, length, seed=length))
        labels = ids.clone()
        labels[:, :3] = -100
        rows.append({"input_ids": ids[0].tolist(), "labels": labels[0].tolist()})
        logits = peft_model(input_ids=ids).logits[0, 2:-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 3:], reduction="sum").backward()
        num_labelled += length - 3
    expected = gradient_of(peft_model) / num_labelled
    peft_model.zero_grad()
    seen = Gradients()
    settings = TrainingConfig(batch_size=8, micro_batch_size=micro_batch_size, max_grad_norm=1e9)
    tune(peft_model, rows, tmp_path, Schedule(steps=1), settings, callbacks=[seen])
    (gradient,) = seen.steps
    assert distance(gradient, expected) < 1e-5


def test_only_the_rows_of_a_step_are_read(
    fresh: Fresh, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoded(rows, tmp_path / "rows")
    read: list[int] = []
    get = EncodedRows.__getitem__

    def noted(self: EncodedRows, index: int) -> Any:
        read.append(index)
        return get(self, index)

    monkeypatch.setattr(EncodedRows, "__getitem__", noted)
    tune(fresh(), load_encoded(tmp_path / "rows"), tmp_path, Schedule(steps=2))
    assert len(read) == len(set(read)) == 2 * SETTINGS.batch_size < len(rows)


def test_no_two_epochs_of_any_seeds_share_an_order() -> None:
    """Training seeds that shared orders would not be independent."""
    settings = TrainingConfig(batch_size=2, micro_batch_size=2)
    orders = set()
    for seed in range(4):
        batches = _Batches(range(50), settings, seed, Share(0, 1))
        for batches.epoch in range(4):
            orders.add(tuple(itertools.chain(*batches)))
    assert len(orders) == 16


def test_every_epoch_has_its_own_order(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    model = fresh()
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    one_each = SETTINGS.model_copy(update={"micro_batch_size": 1})
    tune(model, rows[:8], tmp_path, Schedule(steps=4), one_each)
    first = seen[:8]
    second = seen[8:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_loss_far_above_the_first_stops_the_run(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    """The model has learnt its four rows, then the learning rate is far too high. Its logits are
    ten times as large as a fresh model's, so that a wrong guess has a high loss."""
    peft_model = fresh("float32")
    torch.nn.init.constant_(peft_model.get_submodule(NORM).weight, 10.0)
    seen = losses(peft_model, rows[:4], tmp_path / "well", learning_rate=0.02)
    assert seen[-1] < 6.0
    with pytest.raises(TrainingDiverged, match=r"at step [2-6], far above 6\.238"):
        losses(peft_model, rows[:4], tmp_path / "ill", learning_rate=10.0)


def test_a_diverging_run_stops_and_names_the_step(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    model = fresh()
    torch.nn.init.constant_(model.get_submodule(NORM).weight, float("nan"))
    with pytest.raises(TrainingDiverged, match="at step 1"):
        losses(model, rows, tmp_path)
