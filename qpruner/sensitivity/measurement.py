"""The rise as it is measured: one group at a time starts as a trial would, and the samples run through the model.

KL divergence of the predictions from the unquantized model's, and the change of the loss, from the same passes. Blocks
in front of the changed one hand on what they put out before, so a group costs the blocks from its own to the last; the
head runs at the predicted positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from qpruner.calibration import Samples, batches
from qpruner.rerun import Rerun
from qpruner.sensitivity.starts import Starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """Sums over each sample's predicted positions, in nats.

    Attributes:
        counts: ``(samples,)`` predicted positions.
        base_loss: ``(samples,)`` loss of the unquantized model.
        kl: ``(levels, groups, samples)`` divergence from the unquantized model.
        loss: ``(levels, groups, samples)`` loss less that of the unquantized model.
    """

    counts: Floats
    base_loss: Floats
    kl: Floats
    loss: Floats

    @classmethod
    def joined(cls, parts: Sequence[Measurement]) -> Measurement:
        """Measurements of different samples as one."""
        fields = ("counts", "base_loss", "kl", "loss")
        return cls(*(np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in fields))

    def mean(self, sums: Floats) -> Floats:
        """Mean over positions ``(...)`` of sums ``(..., samples)``."""
        mean: Floats = sums.sum(axis=-1) / self.counts.sum()
        return mean

    def stderr(self, sums: Floats) -> Floats:
        """Standard error of the mean over samples (a ratio estimator)."""
        rest = sums - self.mean(sums)[..., None] * self.counts
        stderr: Floats = np.sqrt(np.square(rest).sum(axis=-1)) / self.counts.sum()
        return stderr


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    samples: Samples,
    starts: Starts,
    on_start: Callable[[int, int], None] = lambda done, total: None,
) -> Measurement:
    """Measure every (group, bits).

    In bfloat16 any change costs some KL by rounding alone: 0.0009 to 0.0015 nats on pruned SmolLM2 with one weight
    moved by one unit in the last place (2026-11), about what 8 bits cost there. Fisher tells such groups apart.

    Memory above the weights: every block's output for one batch, the unquantized model's log-probabilities at the
    batch's predicted positions in float32, and a group's weights once more.

    Args:
        model: The pruned model, unquantized; its weights are put back as they were.
        samples: The samples.
        starts: Groups, bit-widths and the weights at the start of a trial.
        on_start: Told how many passes of how many are done.

    Raises:
        TrainingDiverged: Naming the group whose predictions are NaN or infinite.
    """
    samples = samples.by_length
    total = len(list(samples.split())) * len(starts.groups) * len(starts.levels)
    done, parts = 0, []
    for batch in batches(samples.rows, samples.batch_size, samples.pad_id, model.device):
        run = Rerun(model, batch)
        sums = torch.zeros(len(starts.levels), len(starts.groups), 2, len(run.counts), dtype=torch.float64)
        for index, (group, paths) in enumerate(starts.groups.items()):
            for level, bits in enumerate(starts.levels):
                weights = {
                    path: starts.weight(group, bits, path, model.get_submodule(path).weight.device) for path in paths
                }
                with _replaced(model, weights):
                    sums[level, index] = run.rise(run.block_of(paths[0]), f"{group} at {bits} bits")
                done += 1
                on_start(done, total)
        parts.append(
            Measurement(run.counts.numpy(), run.base_loss.numpy(), sums[:, :, 0].numpy(), sums[:, :, 1].numpy())
        )
    return Measurement.joined(parts)


@contextmanager
def _replaced(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let layers have other weights for a while; their own tensors are put back, not copies."""
    parameters = {path: model.get_parameter(f"{path}.weight") for path in weights}
    own = {path: parameter.data for path, parameter in parameters.items()}
    try:
        for path, parameter in parameters.items():
            parameter.data = weights[path].to(parameter.dtype)
        yield
    finally:
        for path, parameter in parameters.items():
            parameter.data = own[path]
