"""Measure how predictions change when one group is quantized: KL divergence and loss.

The group gets the weights with which trials start. The blocks before it return their stored
outputs, so only the later ones run: all of them for embeddings, none for a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qpruner.data.calibration import Samples
from qpruner.data.losses import batches, hooked, predicted_labels, predicted_logits, returning
from qpruner.errors import TrainingDiverged
from qpruner.models.families import family_of
from qpruner.quantization.bank import Starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[str, str]  # a group and a packed format that it may have
POSITIONS = (
    256  # positions compared at once; each needs a float32 row of the size of the vocabulary
)


def pairs_of(starts: Starts) -> tuple[Pair, ...]:
    """List all pairs of a group and a packed format that it may have, group by group."""
    return tuple((group, name) for group in starts.groups for name in starts.offered[group])


@torch.no_grad()
def measure(
    model: PreTrainedModel, samples: Samples, starts: Starts
) -> dict[str, dict[Pair, float]]:
    """Measure `kl` and `loss`, their mean rise by every (group, format), in nats a predicted token.

    Progress counts both batches and pairs. In bfloat16 rounding alone causes 0.0009 to 0.0015 nats
    of KL divergence on pruned SmolLM2 (one weight changed in its last place, 2026-11), about as
    much as 8 bits do: rank groups at 8 bits by `fisher`. Packed embeddings also replace a head that
    is tied to them.
    """
    all_batches = list(
        batches(samples.by_length.rows, samples.batch_size, samples.pad_id, model.device)
    )
    pairs, positions = pairs_of(starts), 0
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64)
    layers = {
        group: {path: model.get_parameter(f"{path}.weight") for path in starts.groups[group]}
        for group, _ in pairs
    }
    for number, batch in enumerate(all_batches):
        run = _Rerun(model, batch)
        positions += len(run.labels)
        for index, (group, name) in enumerate(pairs):
            values = [
                starts.weight(group, name, path, each).to(each.dtype)
                for path, each in layers[group].items()
            ]
            with _replaced([*layers[group].values()], values):
                sums[index] += run.rise(
                    next(iter(layers[group])), f"the model with {group} in {name}"
                )
            samples.on_progress(number * len(pairs) + index + 1, len(all_batches) * len(pairs))
    means = (sums / positions).T.tolist()
    return {
        method: dict(zip(pairs, of, strict=True))
        for method, of in zip(("kl", "loss"), means, strict=True)
    }


class _Rerun:
    """Runs a batch through the unquantized model, then again from any block."""

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        family = family_of(model.config)
        self._model, self._batch = model, batch
        self._paths = [family.block_path(index) for index in range(model.config.num_hidden_layers)]
        self._blocks = [model.get_submodule(path) for path in self._paths]
        self.labels = predicted_labels(batch["labels"])
        self._outputs: list[Any] = []
        keep = lambda module, inputs, output: self._outputs.append(output)  # noqa: E731
        with hooked(block.register_forward_hook(keep) for block in self._blocks):
            logits = predicted_logits(self._model, self._batch)
        self._expected = logits.float().log_softmax(dim=-1)
        self._losses = -self._at_labels(self._expected, self.labels)
        self._sum(self._losses, "the unquantized model")  # raises an error if a loss is not finite

    def rise(self, layer_path: str, model_in_errors: str) -> torch.Tensor:
        """Run again from this layer on, and sum KL divergence and change of the loss, ``(2,)``."""
        first = (
            len(self._blocks)
            if self._model.get_submodule(layer_path) is self._model.get_output_embeddings()
            else 0
        )
        first = next(
            (at for at, block in enumerate(self._paths) if layer_path.startswith(f"{block}.")),
            first,
        )
        kept = [lambda *_, output=output, **__: output for output in self._outputs[:first]]
        with returning(self._blocks[:first], kept):
            logits = predicted_logits(self._model, self._batch)
        kl, loss = [], []
        for start in range(0, len(logits), POSITIONS):
            here = slice(start, start + POSITIONS)
            expected, found = self._expected[here], logits[here].float().log_softmax(dim=-1)
            loss.append(-self._at_labels(found, self.labels[here]))
            kl.append((expected.exp() * (expected - found)).sum(dim=-1))
        changes = (torch.cat(kl), torch.cat(loss) - self._losses)
        return torch.stack([self._sum(change, model_in_errors) for change in changes])

    @staticmethod
    def _at_labels(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return log_probabilities.gather(1, labels.to(log_probabilities.device)[:, None])[:, 0]

    @staticmethod
    def _sum(values: torch.Tensor, model_name: str) -> torch.Tensor:
        if not values.isfinite().all():
            raise TrainingDiverged(
                f"the predictions of {model_name} are NaN or infinite on the calibration samples"
            )
        return values.double().sum().cpu()


@contextmanager
def _replaced(
    parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Replace the values of parameters inside the context, and restore the originals afterwards."""
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, originals, strict=True):
            parameter.data = value
