"""The training loop: a resumed training gives the same result as an uninterrupted one."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from qpruner.config.schema import TrainingConfig
from qpruner.data.encoding import EncodedRows, load_encoded, save_encoded
from qpruner.errors import TrainingDiverged
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
    schedule = Schedule(6, rungs=(3, 6), save_seconds=save_seconds)
    settings = SETTINGS.model_copy(update=changes)

    def on_save(checkpoint: Path) -> None:
        if not (output / "first").exists():
            shutil.copytree(checkpoint, output / "first")

    listener = Listener(on_step=lambda step, total, loss: seen.append(loss), on_save=on_save)
    finetune(
        model, rows, settings, schedule, output, seed=5, pad_id=1, start=start, listener=listener
    )
    return seen


@pytest.mark.parametrize(("save_seconds", "step"), [(30.0, 3), (0.0, 1)], ids=["rung", "time"])
def test_a_resumed_training_repeats_the_uninterrupted_run(
    save_seconds: float, step: int, fresh: Fresh, rows: Rows, tmp_path: Path
) -> None:
    whole = losses(fresh(dropout=0.1), rows, tmp_path / "whole", save_seconds=save_seconds)
    assert len(whole) == 6
    first = tmp_path / "whole" / "first"
    resumed = losses(fresh(dropout=0.1), rows, tmp_path / "resumed", first)
    assert resumed == whole[step:]
    assert step_losses(first) == whole[:step]
    paths = (tmp_path / name / "checkpoint-6" / "optimizer.pt" for name in ("whole", "resumed"))
    one, other = (torch.load(path, weights_only=True)["state"] for path in paths)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_rungs_have_full_checkpoints_and_only_adapters_change(
    fresh: Fresh, rows: Rows, tmp_path: Path
) -> None:
    called: list[tuple[int, bool]] = []

    def on_rung(step: int, checkpoint: Path, loss: float) -> None:
        called.append((step, (checkpoint / "adapter_model.safetensors").is_file()))

    model = fresh()
    schedule = Schedule(steps=4, rungs=(1, 2, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finetune(
        model,
        rows,
        SETTINGS,
        schedule,
        tmp_path,
        seed=0,
        pad_id=1,
        listener=Listener(on_rung=on_rung),
    )
    assert called == [(1, True), (2, True), (4, True)]
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all("lora_" in name for name in changed)


def test_gradient_checkpointing_changes_no_loss(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    plain = losses(fresh(), rows, tmp_path / "plain")
    found = losses(fresh(), rows, tmp_path / "recomputed", gradient_checkpointing=True)
    assert found == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(("num_rows", "processes"), [(1, 3), (24, 1), (70, 3)])
def test_processes_share_the_batches_of_a_random_order(num_rows: int, processes: int) -> None:
    """In each step, the processes together take the next twelve rows of the epoch's order, each row
    once.

    In each turn of a batch, all rows of all processes are at least as long as any row of the next
    turn.
    """
    size = 2
    batch = 12
    settings = TrainingConfig(batch_size=batch, micro_batch_size=size)
    lengths = (
        np.random.default_rng(1).lognormal(3.5, 0.8, num_rows).astype(int).clip(4, 200).tolist()
    )
    every = [_Batches(lengths, settings, 5, Share(rank, processes)) for rank in range(processes)]
    for epoch in (0, 1):
        for batches in every:
            batches.epoch = epoch
        turns = [list(batches) for batches in every]
        assert {len(each) for each in [*turns, *every]} == {-(-num_rows // size // processes)}
        order = np.random.default_rng([5, epoch]).permutation(num_rows).tolist()
        each_step = batch // size // processes
        for step, begin in enumerate(range(0, num_rows, batch)):
            own = [
                row
                for each in turns
                for turn in each[step * each_step : (step + 1) * each_step]
                for row in turn
            ]
            taken = [row for row in own if row != num_rows]  # but for the blank row
            assert sorted(taken) == sorted(order[begin : begin + batch])
            by_turn = list(
                zip(
                    *(each[step * each_step : (step + 1) * each_step] for each in turns),
                    strict=True,
                )
            )
            long = [
                [lengths[row] for own in turn for row in own if row != num_rows] for turn in by_turn
            ]
            assert all(min(longer) >= max(shorter) for longer, shorter in itertools.pairwise(long))


class Gradients(TrainerCallback):
    """Keeps the gradient of each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.steps.append(
            torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        )


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_gradient_is_that_of_the_whole_batch(
    micro_batch_size: int, fresh: Fresh, tmp_path: Path
) -> None:
    """It is the mean over all labelled tokens of the optimizer batch, in float32, for any size of
    micro-batch."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(2, 500, length).tolist() for length in (6, 60, 8, 33, 7, 12, 51, 9)]
    rows = [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ids]
    peft_model = fresh("float32")
    for row in rows:
        logits = peft_model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), reduction="sum"
        ).backward()
    adapters = [each for each in peft_model.parameters() if each.grad is not None]
    expected = torch.cat([each.grad.flatten() for each in adapters]) / sum(
        len(row) - 3 for row in ids
    )
    peft_model.zero_grad()
    seen = Gradients()
    settings = TrainingConfig(batch_size=8, micro_batch_size=micro_batch_size, max_grad_norm=1e9)
    finetune(
        peft_model, rows, settings, Schedule(steps=1), tmp_path, seed=5, pad_id=1, callbacks=[seen]
    )
    (found,) = seen.steps
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)


def test_only_the_rows_of_a_step_are_read(
    fresh: Fresh, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoded(rows, tmp_path / "rows")
    mapped = load_encoded(tmp_path / "rows")
    read = list[int]()
    get = EncodedRows.__getitem__
    monkeypatch.setattr(
        EncodedRows, "__getitem__", lambda self, index: read.append(index) or get(self, index)
    )
    finetune(fresh(), mapped, SETTINGS, Schedule(steps=2), tmp_path, seed=5, pad_id=1)
    assert len(read) == len(set(read)) == 2 * SETTINGS.batch_size < len(rows)


def test_no_two_epochs_of_any_seeds_share_an_order() -> None:
    """Training seeds that shared orders would not be independent."""
    orders = set()
    for seed in range(4):
        batches = _Batches(
            range(50), TrainingConfig(batch_size=2, micro_batch_size=2), seed, Share(0, 1)
        )
        for batches.epoch in range(4):
            orders.add(tuple(row for batch in batches for row in batch))
    assert len(orders) == 16


def test_every_epoch_has_its_own_order(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    model = fresh()
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    one_each = SETTINGS.model_copy(update={"micro_batch_size": 1})
    finetune(model, rows[:8], one_each, Schedule(steps=4), tmp_path, seed=5, pad_id=1)
    first = seen[:8]
    second = seen[8:]
    assert len(second) == 8
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_loss_far_above_the_first_stops_the_run(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    """The model has learnt its four rows, then the learning rate is far too high. Its logits are
    ten times as large as a fresh model's, so that a wrong guess has a high loss."""
    peft_model = fresh("float32")
    with torch.no_grad():
        peft_model.get_submodule(NORM).weight.fill_(10.0)
    seen = losses(peft_model, rows[:4], tmp_path / "well", learning_rate=0.02)
    assert seen[-1] < 6.0
    with pytest.raises(
        TrainingDiverged,
        match=r"the training loss is .* at step [2-6], far above 6\.238, the larger of",
    ):
        losses(peft_model, rows[:4], tmp_path / "ill", learning_rate=10.0)


def test_a_diverging_run_stops_and_names_the_step(fresh: Fresh, rows: Rows, tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        model.get_submodule(NORM).weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="at step 1"):
        losses(model, rows, tmp_path)
