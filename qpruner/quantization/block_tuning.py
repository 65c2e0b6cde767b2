"""Tune the codes of a block's weights by gradients, so that the block gives wanted outputs.

The method is that of AutoRound (Cheng et al., arXiv 2309.05516) and of the first phase of
EfficientQAT (Chen et al., arXiv 2407.11062), with two differences. Weights start where GPTQ leaves
them, which makes up for the errors of other columns, and scales stay: they are trained afterwards,
on the task.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from qpruner.config.schema import TuningConfig
from qpruner.errors import TrainingDiverged
from qpruner.quantization.formats import ScaledFormat
from qpruner.quantization.rounding import Rounded

Run = Callable[[int, Mapping[str, torch.Tensor]], torch.Tensor]
"""Runs a block with other weights, by name, on a batch of inputs; returns the outputs at tokens,
``(tokens, hidden)``."""


class TunedWeight(torch.nn.Module):
    """A weight ``(rows, columns)`` whose codes change as gradients move what they are rounded from.

    `moves` ``(rows, groups, group size)`` are in units of a group's scale. Gradients pass through
    rounding unchanged.
    """

    def __init__(self, packing: ScaledFormat, rounded: Rounded) -> None:
        super().__init__()
        self._packing = packing
        self._rounded = rounded
        self._scales = rounded.scales.unsqueeze(2)
        self._zeros = rounded.zeros.unsqueeze(2)
        shape = (*rounded.scales.shape, packing.group_size)
        self._start = rounded.latents.reshape(shape)
        self.moves = torch.nn.Parameter(torch.zeros_like(self._start))

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        """Compute the values of the present codes, ``(rows, columns)``."""
        latents = self._start + self._scales * self.moves
        with torch.no_grad():
            codes = self._packing.codes(latents, self._scales, self._zeros)
            values = self._packing.values(codes, self._scales, self._zeros)
            rounding = values - latents
        return (latents + rounding).flatten(1).to(dtype)

    @torch.no_grad()
    def packed(self) -> dict[str, torch.Tensor]:
        """Pack the present codes, as `Format.pack` does."""
        latents = self._start + self._scales * self.moves
        codes = self._packing.codes(latents, self._scales, self._zeros).to(torch.uint8)
        return self._packing.store(codes.flatten(1), self._rounded.scales, self._rounded.zeros)


def tune_block(
    weights: Mapping[str, TunedWeight],
    run: Run,
    targets: Sequence[torch.Tensor],
    settings: TuningConfig,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Tune the weights of a block in place.

    Args:
        weights: The weights by their names in the block.
        run: Runs the block on one of the batches.
        targets: The outputs that it shall give for each batch, ``(tokens, hidden)``.
        settings: Iterations and learning rate.
        dtype: The type in which the block computes.
        seed: Sets the order of the batches.

    Raises:
        TrainingDiverged: An output is NaN or infinite.
    """
    draw = random.Random(seed)
    optimizer = torch.optim.Adam([weight.moves for weight in weights.values()], lr=settings.rate)
    falling = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=settings.iterations
    )
    order: list[int] = []
    for _ in range(settings.iterations):
        if not order:
            order = draw.sample(range(len(targets)), len(targets))
        batch = order.pop()
        outputs = run(batch, {name: weight(dtype) for name, weight in weights.items()})
        # A sum: Adam's epsilon is small beside its gradients.
        error = (outputs.float() - targets[batch].float()).square().sum()
        if not error.isfinite():
            raise TrainingDiverged(
                "tuned rounding: the outputs of a block are NaN or infinite on the training rows"
            )
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
