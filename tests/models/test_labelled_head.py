"""Logits are computed only where a labelled token is predicted; gradients do not change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILY_NAMES, blocks_of, family_model
from transformers import Trainer

from qpruner.config.schema import LoraConfig, TrainingConfig
from qpruner.data.calibration import (
    Samples,
    visit_gradients,
    visit_linear_gradients,
    visit_mask_gradients,
    visit_outputs,
)
from qpruner.data.encoding import collate
from qpruner.data.losses import labelled_only, mean_loss, predicted_labels, token_losses
from qpruner.models.layout import group_linears
from qpruner.quantization.assembly import attach_adapters
from qpruner.training.finetune import Schedule, Share, _arguments, _collate, _Trainer, finetune

PAD, BLANK = 0, {"input_ids": [0], "labels": [-100]}
ARCHETYPES = ("llama", "gpt_neox")
LABELLED = (4, 7, 1, 5)
"""Number of labelled tokens in each row; the rows have 9, 12, 6 and 8 tokens."""


def rows() -> list[dict[str, list[int]]]:
    """Make rows with unlabelled prompts and labelled responses; one row also has labels in the
    middle."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, labelled in zip((9, 12, 6, 8), LABELLED, strict=True):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        made.append(
            {"input_ids": ids, "labels": [-100] * (length - labelled) + ids[length - labelled :]}
        )
    made[3]["labels"] = [-100, *made[3]["input_ids"][1:4], -100, -100, *made[3]["input_ids"][6:]]
    return made


def reference_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of each token ``(batch, seq - 1)`` from logits at every position."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    losses: torch.Tensor = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    return losses


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
    }


def assert_same_gradients(
    model: torch.nn.Module,
    loss: torch.Tensor,
    expected: torch.Tensor,
    relative: float,
    absolute: float,
) -> None:
    found, wanted = gradients(model, loss), gradients(model, expected)
    assert found.keys() == wanted.keys() and found
    for key, gradient in wanted.items():
        assert (
            torch.linalg.norm(found[key] - gradient)
            <= relative * torch.linalg.norm(gradient) + absolute
        ), key


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in FAMILY_NAMES]
    + [("llama", "bfloat16"), ("gpt_neox", "bfloat16")],
)
def test_losses_and_gradients_are_those_of_all_logits(name: str, dtype: str) -> None:
    """In float32 they agree up to rounding; in bfloat16, gradients are summed in another order and
    agree to 2 %."""
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    model = family_model(name).to(getattr(torch, dtype))
    batch = collate(rows(), PAD)
    expected, found = reference_losses(model, batch), token_losses(model, batch)
    assert (found != 0).sum() == sum(LABELLED)
    torch.testing.assert_close(found[:, :-1], expected, rtol=tolerance, atol=tolerance)
    assert_same_gradients(model, found.sum(), expected.sum(), tolerance, 1e-6)


# The positions of opt ignore `position_ids`.
@pytest.mark.parametrize("name", sorted({*FAMILY_NAMES} - {"opt"}))
def test_rows_that_are_joined_do_not_see_each_other(name: str) -> None:
    model, padded, joined = family_model(name).eval(), collate(rows(), PAD), _collate(rows(), PAD)
    expected = reference_losses(model, padded)
    assert joined["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows()))
    with labelled_only(model, joined["labels"]):
        logits = model(
            joined["input_ids"], position_ids=joined["position_ids"], use_cache=False
        ).logits
    found = torch.nn.functional.cross_entropy(
        logits, predicted_labels(joined["labels"]), reduction="sum"
    )
    torch.testing.assert_close(found, expected.sum(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, found, expected.sum(), 1e-5, 1e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_training_has_the_loss_of_rows_that_do_not_see_each_other(
    name: str, tmp_path: Path
) -> None:
    """The adapter is zero, so the first step's loss is the model's; OPT's rows are padded."""
    model = family_model(name, **({"dropout": 0.0} if name == "opt" else {}))
    expected = reference_losses(model, collate(rows(), PAD)).sum() / sum(LABELLED)
    adapted = attach_adapters(model, {}, LoraConfig(rank=2), "block", seed=0)
    settings = TrainingConfig(batch_size=4, micro_batch_size=4)
    found = finetune(
        adapted, rows(), settings, Schedule(steps=1), tmp_path, seed=0, pad_id=PAD
    ).train_loss
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ARCHETYPES)
def test_the_head_runs_at_labelled_tokens_only(name: str, tmp_path: Path) -> None:
    """This holds in every pass that reads losses or predictions, and in training."""
    model, seen = family_model(name), list[int]()
    head: Any = model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][..., 0].numel()))
    samples, last = Samples(rows(), PAD, batch_size=3), blocks_of(model)[-1]
    paths = next(iter(group_linears(model.config, "block").values()))
    linears: Any = {path: model.get_submodule(path) for path in paths}
    weights, masks = (
        {path: linears[path].weight for path in paths},
        {path: (linears[path], 0) for path in paths},
    )

    def ignore(*_: Any) -> None:
        pass

    def train() -> None:
        adapted = attach_adapters(model, {}, LoraConfig(rank=2), "block", seed=0)
        settings = TrainingConfig(batch_size=4, micro_batch_size=2)
        finetune(adapted, rows(), settings, Schedule(steps=1), tmp_path, seed=0, pad_id=PAD)

    passes: dict[str, Callable[[], object]] = {
        "scoring": lambda: mean_loss(model, rows(), PAD, 3),
        "gradients": lambda: visit_gradients(model, weights, samples, ignore),
        "masks": lambda: visit_mask_gradients(model, masks, samples, ignore),
        "every sample's gradients": lambda: visit_linear_gradients(model, linears, samples, ignore),
        "outputs": lambda: visit_outputs(model, {"last": last}, samples, ignore),
        "training": train,
    }
    for title, run in passes.items():
        seen.clear()
        run()
        assert len(seen) == 2 and sum(seen) == sum(LABELLED), title


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_training_step_has_the_models_own_loss(name: str, tmp_path: Path) -> None:
    """The loss is divided by the labelled tokens of the optimizer batch."""
    model = family_model(name)
    adapted: Any = attach_adapters(model, {}, LoraConfig(rank=2), "block", seed=0)
    adapted.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = TrainingConfig(batch_size=4, micro_batch_size=2)
    arguments = _arguments(settings, Schedule(steps=1), tmp_path, 0, Share(0, 1))
    trainer = _Trainer(model=adapted, args=arguments, train_dataset=[BLANK])  # type: ignore[arg-type]
    adapted.train()
    tokens = torch.tensor(100)  # in the optimizer batch that this batch is a part of
    found = []
    for trainer_class in (_Trainer, Trainer):
        torch.manual_seed(0)  # OPT has dropout of its own
        batch = dict(collate(rows(), PAD))
        found.append(trainer_class.compute_loss(trainer, adapted, batch, num_items_in_batch=tokens))
    own, expected = found
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert expected > 0.1
    assert_same_gradients(adapted, own, expected, 1e-5, 1e-7)
    blank = trainer.compute_loss(adapted, dict(collate([BLANK], PAD)), num_items_in_batch=tokens)
    assert blank == 0
    assert all(not gradient.any() for gradient in gradients(adapted, blank).values())
