"""Compensate for removed units by new weights in the output projections.

Before the cut the columns of removed units in an output projection (o, down) are set to zero, and
their contribution moves to the kept columns (least squares, as in SliceGPT, ZipLM and SoBP); that
of dropped blocks moves to the output projection before them. The cut itself then changes no output.
"""

import itertools
from collections.abc import Collection
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from qpruner.data.calibration import Samples
from qpruner.data.stream import BlockStream
from qpruner.errors import TrainingDiverged
from qpruner.models.families import block_paths, family_of
from qpruner.pruning.surgery import unit_indices
from qpruner.pruning.units import Kept, unit_kinds_of


class GramSums(list[torch.Tensor]):
    """Sum products with inputs over batches, in float32.

    The first sum is ``inputs^T inputs`` ``(features, features)``. If targets are added too, the
    second is ``targets^T inputs`` ``(outputs, features)``.
    """

    def add(self, *pair: torch.Tensor) -> None:
        """Add inputs ``(tokens, features)`` and perhaps targets ``(tokens, outputs)``."""
        wide = [states.to(pair[0].device, torch.float32) for states in pair]
        for position, states in enumerate(wide):
            if position == len(self):
                self.append(states.T @ wide[0])
            else:
                self[position].addmm_(states.T, wide[0])


def compensate_blocks(
    model: PreTrainedModel,
    dropped: Collection[int],
    layers: Collection[int],
    ridge: float,
    samples: Samples,
) -> None:
    """Make the MLP output projection (down) before dropped blocks add what these blocks added.

    Let X be its inputs over the calibration tokens, and D what the dropped blocks directly behind
    it add to the residual stream. The weights that minimize ``|X (W' - W)^T - D|^2 + lambda |W' -
    W|^2`` are ``W' = W + D^T X (X^T X + lambda I)^-1``; `ridge` is lambda relative to the mean
    square of the inputs. Only blocks in `layers` change, and nothing changes in families where a
    norm follows the projection.
    """
    paths = block_paths(model.config)
    factor = family_of(model.config).residual_factor(model.config)
    if factor is None:
        return

    stream = BlockStream(model, samples)
    for index, path in enumerate(paths):
        if index in dropped:
            continue
        behind = list(itertools.takewhile(dropped.__contains__, range(index + 1, len(paths))))
        if behind and index in layers:
            linear = unit_kinds_of(model.config, [index])[index][-1].output_linear
            grams = GramSums()
            stream.visit(index, linear, grams.add, behind)
            name = f"{path}.{linear}"
            change = _ridge_solution(grams[0], grams[1] / factor, ridge, name)
            weight = model.get_parameter(f"{name}.weight").data
            weight.copy_(weight.float() + change.to(weight.device))
        stream.advance(index)
    if len(paths) - 1 in dropped:
        samples.on_progress(len(paths), len(paths))


def compensate(model: PreTrainedModel, kept: Kept, ridge: float, samples: Samples) -> None:
    """Zero the columns of removed units and compensate for them by least squares.

    The inputs of each layer are those of the model as pruned before it.
    """
    family = family_of(model.config)
    stream = BlockStream(model, samples)
    for index, path in enumerate(block_paths(model.config)):
        kinds = unit_kinds_of(model.config, [index], kept.get(index, ()))[index]
        block = model.get_submodule(path)
        with ExitStack() as as_cut:
            # Attention comes first, because the MLP gets its inputs from the pruned attention.
            for kind in kinds:
                units = kept[index][kind.name]
                if len(units) == kind.num_units:
                    continue
                as_cut.enter_context(family.as_cut(block, kind, units))
                linear = kind.output_linear
                grams = GramSums()
                stream.visit(index, linear, grams.add)

                weight = block.get_parameter(f"{linear}.weight").data
                output = next(item for item in kind.slices if item.parameter == f"{linear}.weight")
                stays = unit_indices(output, units)
                _solve(weight, stays, grams[0], ridge, f"{path}.{linear}")
            stream.advance(index)


def _solve(
    weight: torch.Tensor, stays: torch.Tensor, gram: torch.Tensor, ridge: float, name: str
) -> None:
    """Replace the kept columns of `weight` by the least-squares solution, and zero the others.

    With ``G = X^T X`` (`gram`) over the calibration tokens, S the kept columns (`stays`) and R the
    removed columns, the weights ``W'`` that minimize ``|X W^T - X_S W'^T|^2 + lambda |W' - W_S|^2``
    are ``W_S + W_R G_RS (G_SS + lambda I)^-1``.
    """
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool)
    is_removed[stays] = False
    removed = is_removed.nonzero().flatten().to(gram.device)
    stays = stays.to(gram.device)

    gram_of_stays = gram[:, stays]
    given = weight[:, removed].float() @ gram_of_stays[removed]
    change = _ridge_solution(gram_of_stays[stays], given, ridge, name)
    compensated = weight[:, stays].float() + change
    weight[:, stays] = compensated.to(weight.dtype)
    weight[:, removed] = 0


def _ridge_solution(
    gram: torch.Tensor, given: torch.Tensor, ridge: float, name: str
) -> torch.Tensor:
    """Compute ``given (gram + lambda I)^-1``.

    The penalty lambda is `ridge` times the mean of the diagonal of `gram`. Raise `TrainingDiverged`
    if the result is NaN or infinite.
    """
    penalty = max(ridge * float(gram.diagonal().mean()), torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    change = torch.cholesky_solve(given.T, factor).T
    if failed or not torch.isfinite(change).all():
        raise TrainingDiverged(
            f"the least-squares weights of {name} are NaN or infinite; raise `prune.ridge` or use "
            "more calibration text"
        )
    return change
