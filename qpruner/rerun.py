"""A batch that runs through a model once, and again from any block on: with other weights in it, or without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qpruner.calibration import entering
from qpruner.data import IGNORED_LABEL
from qpruner.errors import TrainingDiverged
from qpruner.models.structure import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 256
"""Predicted positions whose distributions are compared at once: float32 copies of so many rows of the vocabulary."""


class Rerun:
    """A batch that was run once and is run again from any block on; what the blocks before put out is handed on.

    Attributes:
        counts: ``(samples,)`` float64, predicted positions.
        base_loss: ``(samples,)`` float64, summed over them.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        family = family_of(model.config)
        self._model, self._batch = model, batch
        self._paths = [family.block_path(index) for index in range(model.config.num_hidden_layers)]
        self._blocks = [model.get_submodule(path) for path in self._paths]
        labels = batch["labels"][:, 1:]
        self._predicting = torch.nn.functional.pad(labels != IGNORED_LABEL, (0, 1))
        self._labels = labels[labels != IGNORED_LABEL]
        self._sample = self._predicting.nonzero()[:, 0].cpu()
        self.counts = self._predicting.sum(dim=1).double().cpu()
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[Any] = []
        handles = [block.register_forward_hook(self._listen, with_kwargs=True) for block in self._blocks]
        try:
            logits = self._logits()
        finally:
            for handle in handles:
                handle.remove()
        self._expected = logits.float().log_softmax(dim=-1)
        self._losses = -self._at_labels(self._expected, self._labels)
        self.base_loss = self._by_sample(self._losses, "the model as it is")

    def block_of(self, path: str) -> int:
        """The block that a layer lies in."""
        return next(index for index, block in enumerate(self._paths) if path.startswith(f"{block}."))

    def rise(self, first: int, what: str) -> torch.Tensor:
        """Summed divergence and change of the loss with blocks run from `first` on: ``(2, samples)`` float64."""
        return self._rise(self._outputs[:first], what)

    def rise_without(self, index: int, first: int) -> torch.Tensor:
        """The same with one block left out, as if it added nothing."""
        others = self._outputs[index][1:] if isinstance(self._outputs[index], tuple) else None

        def through(*args: Any, **kwargs: Any) -> Any:
            hidden = entering(args, kwargs)
            return hidden if others is None else (hidden, *others)

        with _running(self._blocks[index], through):
            return self.rise(first, f"the model without block {index}")

    def _rise(self, outputs: Sequence[Any], what: str) -> torch.Tensor:
        with ExitStack() as stack:
            for block, output in zip(self._blocks, outputs, strict=False):
                stack.enter_context(_running(block, lambda *args, output=output, **kwargs: output))
            logits = self._logits()
        kl, loss = [], []
        for start in range(0, len(logits), POSITIONS):
            here = slice(start, start + POSITIONS)
            expected, found = self._expected[here], logits[here].float().log_softmax(dim=-1)
            loss.append(-self._at_labels(found, self._labels[here]))
            kl.append((expected.exp() * (expected - found)).sum(dim=-1))
        changes = (torch.cat(kl), torch.cat(loss) - self._losses)
        return torch.stack([self._by_sample(change, what) for change in changes])

    def _listen(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._inputs.append(entering(args, kwargs))
        self._outputs.append(output)

    def _logits(self) -> torch.Tensor:
        """``(positions, vocabulary)`` at the predicted positions, all samples in one."""
        head = self._model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, inputs: inputs[0][self._predicting.to(inputs[0].device)])
        inputs = {name: self._batch[name] for name in ("input_ids", "attention_mask")}
        try:
            logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        return logits

    @staticmethod
    def _at_labels(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return log_probabilities.gather(1, labels.to(log_probabilities.device)[:, None])[:, 0]

    def _by_sample(self, values: torch.Tensor, what: str) -> torch.Tensor:
        if not values.isfinite().all():
            raise TrainingDiverged(f"the predictions of {what} are NaN or infinite on the calibration samples")
        return torch.zeros_like(self.counts).index_add_(0, self._sample, values.double().cpu())


@contextmanager
def _running(block: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a block do something else."""
    before = vars(block).get("forward")
    block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before  # type: ignore[method-assign]
