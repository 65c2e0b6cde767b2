"""Compute losses and logits at the positions whose next token has a label.

The head of the model runs at these positions only.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.data import measures
from qpruner.data.encoding import IGNORED_LABEL, collate, row_lengths
from qpruner.errors import TrainingDiverged

Rows = Sequence[Mapping[str, list[int]]]


@dataclass(frozen=True)
class LossResult:
    """Hold the mean loss in nats per labelled token, and values by row whose spread gives `stderr`.

    The values `by_row` have the same mean. A row with loss sum s and n tokens has ``mean + (s - n
    mean) / m``, m the mean of n (delta method for a ratio).
    """

    mean: float
    by_row: tuple[float, ...]

    @property
    def stderr(self) -> float:
        """Standard error of the mean loss over rows; NaN for a single row."""
        return measures.over_questions(self.by_row).stderr


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows, pad_id: int, batch_size: int) -> LossResult:
    """Compute the mean cross entropy on the labelled tokens of rows, in nats.

    Raise `TrainingDiverged` if it is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # Batches of rows of similar length need little padding.
    order = sorted(range(len(rows)), key=row_lengths(rows).__getitem__)
    sums = [0.0] * len(rows)
    counts = [0] * len(rows)
    for start in range(0, len(rows), batch_size):
        indices = order[start : start + batch_size]
        (batch,) = batches([rows[index] for index in indices], batch_size, pad_id, device)
        losses = token_losses(model, batch).sum(dim=1).tolist()
        labels = predicting(batch["labels"]).sum(dim=1).tolist()
        for index, loss, count in zip(indices, losses, labels, strict=True):
            sums[index] = loss
            counts[index] = count
    model.train(was_training)
    return loss_result(sums, counts)


def loss_result(sums: Sequence[float], counts: Sequence[int]) -> LossResult:
    """Average over rows, given by their sums of losses and their numbers of labelled tokens."""
    tokens = sum(counts)
    mean = sum(sums) / tokens
    if not math.isfinite(mean):
        raise TrainingDiverged(f"the mean loss of the scored rows is {mean}")
    by_row = []
    for row, count in zip(sums, counts, strict=True):
        by_row.append(mean + (row - mean * count) * len(sums) / tokens)
    return LossResult(mean, tuple(by_row))


def batches(
    rows: Rows, batch_size: int, pad_id: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield padded batches on a device, in order."""
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the cross entropy of each next token in nats, float32 ``(batch, seq)``.

    It is zero where the next token has no label.
    """
    logits = predicted_logits(model, batch)
    labels = batch["labels"].to(logits.device)
    positions = predicting(labels)
    losses = torch.zeros(positions.shape, device=logits.device)
    losses[positions] = nn.functional.cross_entropy(
        logits.float(), predicted_labels(labels), reduction="none"
    )
    return losses


def predicted_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute logits ``(positions, vocabulary)`` where the next token of the batch has a label."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    with labelled_only(model, batch["labels"]):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


@contextmanager
def labelled_only(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Make the head run only at positions whose next token has a label.

    Logits then are ``(positions, vocabulary)``.
    """
    positions = predicting(labels)
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][positions.to(inputs[0].device)]

    with hooked([head.register_forward_pre_hook(select)]):
        yield


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove these hooks (given by their handles) when the context ends."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


@contextmanager
def returning(
    modules: Sequence[nn.Module], outputs: Iterable[Callable[..., Any]]
) -> Iterator[None]:
    """Make each module return the output of a function instead of running."""
    before = [vars(module).get("forward") for module in modules]
    for module, output in zip(modules, outputs, strict=True):
        module.forward = output
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward:
                module.forward = forward


def predicting(labels: Tensor) -> Tensor:
    """Return a mask of the positions whose next token has a label, bool ``(batch, seq)``."""
    return nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))


def predicted_labels(labels: Tensor) -> Tensor:
    """Return the labels ``(positions,)`` that belong to the rows of `predicted_logits`."""
    return labels[:, 1:][labels[:, 1:] != IGNORED_LABEL]
