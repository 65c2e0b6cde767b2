"""Calibration samples and what is read off a model with them: gradients, group outputs and losses, one batch at a time.

Nothing here keeps more than it was asked for: a gradient is handed over in its own hook and dropped at once, outputs
are kept at the predicted positions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qpruner.data import IGNORED_LABEL, collate
from qpruner.errors import TrainingDiverged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Sequence[Mapping[str, list[int]]]


@dataclass(frozen=True)
class LossResult:
    """Loss in nats per predicted token, with its standard error over rows (a ratio estimator)."""

    mean: float
    stderr: float


def batches(rows: Rows, batch_size: int, pad_id: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches on the model's device, in order."""
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def visit_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, torch.nn.Parameter],
    rows: Rows,
    pad_id: int,
    visit: Callable[[str, torch.nn.Parameter, torch.Tensor], None],
    batch_size: int,
) -> None:
    """Run the loss backward batch by batch and hand each parameter's gradient over before it is dropped.

    The peak above the weights is one parameter's gradient plus the activations of one batch.

    Args:
        model: A dense model; its `requires_grad` flags are restored afterwards.
        parameters: The parameters to visit, by name.
        rows: Encoded samples; the loss is over every token that has a label.
        pad_id: Padding token.
        visit: Called with name, parameter and gradient ``(rows, columns)`` once per batch.
        batch_size: Samples per backward pass.

    Raises:
        TrainingDiverged: Naming the parameter whose gradient is NaN or infinite.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = {id(parameter) for parameter in parameters.values()}
    handles = []

    def hook_for(name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            assert gradient is not None
            if not torch.isfinite(gradient).all():
                raise TrainingDiverged(f"the gradient of {name} is NaN or infinite on the calibration samples")
            visit(name, parameter, gradient)  # type: ignore[arg-type]

        return hook

    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        for name, parameter in parameters.items():
            handles.append(parameter.register_post_accumulate_grad_hook(hook_for(name)))  # type: ignore[no-untyped-call]
        for batch in batches(rows, batch_size, pad_id, model.device):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            loss = token_losses(logits, batch["labels"]).sum() / count_labels(batch["labels"])
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


@torch.no_grad()
def visit_outputs(
    model: PreTrainedModel,
    modules: Mapping[str, torch.nn.Module],
    rows: Rows,
    pad_id: int,
    visit: Callable[[dict[str, torch.Tensor], torch.Tensor], None],
    batch_size: int,
) -> None:
    """Run the samples forward and hand over each module's output where the model predicts a labelled token.

    Args:
        model: The model.
        modules: The modules to listen to, by name.
        rows: Encoded samples.
        pad_id: Padding token.
        visit: Called per batch with name -> outputs ``(positions, features)`` float32 and the model's predicted token
            ids ``(positions,)``.
        batch_size: Samples per forward pass.
    """
    outputs: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        for batch in batches(rows, batch_size, pad_id, model.device):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            predicting = torch.zeros_like(batch["labels"], dtype=torch.bool)
            predicting[:, :-1] = batch["labels"][:, 1:] != IGNORED_LABEL
            kept = {name: output[predicting].float().cpu() for name, output in outputs.items()}
            for name, output in kept.items():
                if not torch.isfinite(output).all():
                    raise TrainingDiverged(f"the output of {name} is NaN or infinite on the calibration samples")
            if not torch.isfinite(logits[predicting]).all():
                raise TrainingDiverged("the output of model.lm_head is NaN or infinite on the calibration samples")
            visit(kept, logits[predicting].argmax(dim=-1).cpu())
            outputs.clear()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Rows, pad_id: int, batch_size: int) -> LossResult:
    """Cross entropy on the labelled tokens, in nats.

    Raises:
        TrainingDiverged: If it is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # Rows of like length together, so that little is spent on padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    sums: list[float] = []
    counts: list[int] = []
    for batch in batches([rows[index] for index in order], batch_size, pad_id, device):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        losses = token_losses(logits, batch["labels"])
        sums.extend(losses.sum(dim=1).tolist())
        counts.extend((batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1).tolist())
    model.train(was_training)
    total, tokens = sum(sums), sum(counts)
    mean = total / tokens
    if not math.isfinite(mean):
        raise TrainingDiverged(f"the validation loss is {mean}")
    squares = sum((row - mean * count) ** 2 for row, count in zip(sums, counts, strict=True))
    return LossResult(mean, math.sqrt(squares) / tokens)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next token.

    Args:
        logits: ``(batch, seq, vocabulary)``.
        labels: ``(batch, seq)``, -100 where no token is predicted.

    Returns:
        ``(batch, seq - 1)`` float32, zero where there is no label.
    """
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return flat.view(labels.shape[0], -1)


def count_labels(labels: torch.Tensor) -> int:
    """Tokens that are predicted in a batch of labels ``(batch, seq)``."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())
