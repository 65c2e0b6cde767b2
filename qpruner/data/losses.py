"""Compute losses and logits where a labelled token is predicted; the head runs at those positions only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qpruner.data import measures
from qpruner.data.encoding import IGNORED_LABEL, collate, row_lengths
from qpruner.errors import TrainingDiverged

Rows = Sequence[Mapping[str, list[int]]]


@dataclass(frozen=True)
class LossResult:
    """Loss in nats per predicted token, and the rows' shares: their mean is `mean`, their spread its standard error.

    Rows have more and fewer tokens: it is a ratio estimator.
    """

    mean: float
    by_row: tuple[float, ...]

    @property
    def stderr(self) -> float:
        """Standard error of the mean over rows; NaN with one row."""
        return measures.over_questions(self.by_row).stderr


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Rows, pad_id: int, batch_size: int) -> LossResult:
    """Compute the cross entropy on the labelled tokens, in nats; raises `TrainingDiverged` where it is no number."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # Rows of like length together, so that little is spent on padding.
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    sums, counts = list[float](), list[int]()
    for batch in batches([rows[index] for index in order], batch_size, pad_id, device):
        sums.extend(token_losses(model, batch).sum(dim=1).tolist())
        counts.extend(predicting(batch["labels"]).sum(dim=1).tolist())
    model.train(was_training)
    total, tokens = sum(sums), sum(counts)
    mean = total / tokens
    if not math.isfinite(mean):
        raise TrainingDiverged(f"the validation loss is {mean}")
    off = [row - mean * count for row, count in zip(sums, counts, strict=True)]
    by_row = dict(zip(order, (mean + each * len(rows) / tokens for each in off), strict=True))
    return LossResult(mean, tuple(by_row[index] for index in range(len(rows))))


def batches(rows: Rows, batch_size: int, pad_id: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches on a device, in order."""
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def token_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute each next token's cross entropy in nats, ``(batch, seq)`` float32; zero where no label is predicted."""
    logits = predicted_logits(model, batch)
    positions = predicting(batch["labels"]).to(logits.device)
    losses = torch.zeros(positions.shape, device=logits.device)
    losses[positions] = torch.nn.functional.cross_entropy(
        logits.float(), predicted_labels(batch["labels"]).to(logits.device), reduction="none"
    )
    return losses


def predicted_logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute logits ``(positions, vocabulary)`` where a labelled token is predicted, of all samples together."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with labelled_only(model, batch["labels"]):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


@contextmanager
def labelled_only(model: torch.nn.Module, labels: torch.Tensor) -> Iterator[None]:
    """Run a model's head only where a label ``(batch, seq)`` is predicted: logits are ``(positions, vocabulary)``."""
    positions = predicting(labels)
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, inputs: inputs[0][positions.to(inputs[0].device)])
    try:
        yield
    finally:
        handle.remove()


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Mark positions whose next token has a label: ``(batch, seq)`` bool."""
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))


def predicted_labels(labels: torch.Tensor) -> torch.Tensor:
    """Select the labels predicted at these positions: ``(positions,)``, in the order of `predicted_logits`."""
    return labels[:, 1:][labels[:, 1:] != IGNORED_LABEL]
