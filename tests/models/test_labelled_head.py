"""Logits are computed only where a labelled token is predicted; gradients do not change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tensors import seeded
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

PAD = 0
BLANK = {"input_ids": [0], "labels": [-100]}
ARCHETYPES = ("llama", "gpt_neox")
LENGTHS = (9, 12, 6, 8)
LABELLED = (4, 7, 1, 5)
"""Numbers of tokens and of labelled tokens in each row."""
"""Number of labelled tokens in each row; the rows have 9, 12, 6 and 8 tokens."""


def rows() -> list[dict[str, list[int]]]:
    """Make rows with unlabelled prompts and labelled responses; one row also has labels in the
    middle."""
    generator = seeded(3)
    made = []
    for length, labelled in zip(LENGTHS, LABELLED, strict=True):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        labels = [-100] * (length - labelled) + ids[length - labelled :]
        made.append({"input_ids": ids, "labels": labels})
    made[3]["labels"][1:4] = made[3]["input_ids"][1:4]
    made[3]["labels"][4:6] = [-100, -100]
    return made


def reference_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of each token ``(batch, seq - 1)`` from logits at every position."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses: torch.Tensor = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    return losses


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    weights = {name: each for name, each in model.named_parameters() if each.grad is not None}
    return {name: weight.grad.clone() for name, weight in weights.items()}


def assert_same_gradients(
    model: torch.nn.Module,
    loss: torch.Tensor,
    expected: torch.Tensor,
    relative: float,
    absolute: float,
) -> None:
    computed = gradients(model, loss)
    references = gradients(model, expected)
    assert computed.keys() == references.keys()
    assert computed
    for key, reference in references.items():
        difference = (computed[key] - reference).norm()
        assert difference <= relative * reference.norm() + absolute, key


def tuned(model: Any, folder: Path, micro_batch_size: int) -> float:
    """Train adapters of a model by one step on all rows, and return its loss."""
    adapted = attach_adapters(model, {}, LoraConfig(rank=2), "block", seed=0)
    settings = TrainingConfig(batch_size=4, micro_batch_size=micro_batch_size)
    done = finetune(adapted, rows(), settings, Schedule(steps=1), folder, seed=0, pad_id=PAD)
    return float(done.train_loss)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        *((name, torch.float32, 1e-5) for name in FAMILY_NAMES),
        *((name, torch.bfloat16, 2e-2) for name in ARCHETYPES),
    ],
)
def test_losses_and_gradients_are_those_of_all_logits(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    """In float32 they agree up to rounding; in bfloat16, gradients are summed in another order and
    agree to 2 %."""
    model = family_model(name).to(dtype)
    batch = collate(rows(), PAD)
    expected = reference_losses(model, batch)
    losses = token_losses(model, batch)
    assert (losses != 0).sum() == sum(LABELLED)
    torch.testing.assert_close(losses[:, :-1], expected, rtol=tolerance, atol=tolerance)
    assert_same_gradients(model, losses.sum(), expected.sum(), tolerance, 1e-6)


# The positions of opt ignore `position_ids`.
# The positions of opt ignore `position_ids`.
@pytest.mark.parametrize("name", sorted({*FAMILY_NAMES} - {"opt"}))
def test_rows_that_are_joined_do_not_see_each_other(name: str) -> None:
    model = family_model(name).eval()
    joined = _collate(rows(), PAD)
    assert joined["input_ids"].shape == (1, sum(LENGTHS))
    labels = joined.pop("labels")
    with labelled_only(model, labels):
        logits = model(**joined, use_cache=False).logits
    targets = predicted_labels(labels)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = reference_losses(model, collate(rows(), PAD)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, loss, expected, 1e-5, 1e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_training_has_the_loss_of_rows_that_do_not_see_each_other(
    name: str, tmp_path: Path
) -> None:
    """The adapter is zero, so the first step's loss is the model's; OPT's rows are padded."""
    model = family_model(name, **({"dropout": 0.0} if name == "opt" else {}))
    expected = reference_losses(model, collate(rows(), PAD)).sum() / sum(LABELLED)
    assert tuned(model, tmp_path, 4) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ARCHETYPES)
def test_the_head_runs_at_labelled_tokens_only(name: str, tmp_path: Path) -> None:
    """This holds in every pass that reads losses or predictions, and in training."""
    model = family_model(name)
    head: Any = model.get_output_embeddings()
    seen: list[int] = []
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][..., 0].numel()))
    samples = Samples(rows(), PAD, batch_size=3)
    last = blocks_of(model)[-1]
    paths = next(iter(group_linears(model.config, "block").values()))
    linears: Any = {path: model.get_submodule(path) for path in paths}
    weights = {path: linear.weight for path, linear in linears.items()}
    masks = {path: (linear, 0) for path, linear in linears.items()}
    passes: dict[str, Callable[[], object]] = {
        "scoring": lambda: mean_loss(model, rows(), PAD, 3),
        "gradients": lambda: visit_gradients(model, weights, samples, ignore),
        "masks": lambda: visit_mask_gradients(model, masks, samples, ignore),
        "every sample's gradients": lambda: visit_linear_gradients(model, linears, samples, ignore),
        "outputs": lambda: visit_outputs(model, {"last": last}, samples, ignore),
        "training": lambda: tuned(model, tmp_path, 2),
    }
    for title, run in passes.items():
        seen.clear()
        run()
        assert len(seen) == 2
        assert sum(seen) == sum(LABELLED), title


def ignore(*_: object) -> None:
    pass


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

    def loss_of(kind: Any, rows: Any) -> torch.Tensor:
        torch.manual_seed(0)  # OPT has dropout of its own
        batch = dict(collate(rows, PAD))
        of_batch = torch.tensor(100)  # tokens in the optimizer batch that this batch is a part of
        loss: torch.Tensor = kind.compute_loss(trainer, adapted, batch, num_items_in_batch=of_batch)
        return loss

    own = loss_of(_Trainer, rows())
    expected = loss_of(Trainer, rows())
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert expected > 0.1
    assert_same_gradients(adapted, own, expected, 1e-5, 1e-7)
    blank = loss_of(_Trainer, [BLANK])
    assert blank == 0
    assert all(not gradient.any() for gradient in gradients(adapted, blank).values())
