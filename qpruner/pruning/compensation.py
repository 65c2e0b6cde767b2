"""What the layers that stay do for what was cut: nothing, a bias, or weights solved anew.

Every removed unit ends in columns of an output projection (o, down). Before the cut those columns are set to zero, and
what they gave is handed to the bias (FLAP, arXiv 2312.11983, section 3.3) or to the columns that stay (least squares,
as in SliceGPT, ZipLM and SoBP): the cut itself then changes nothing. What whole blocks add is handed to the output
projection in front of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import InputMoments, Samples
from qpruner.errors import TrainingDiverged
from qpruner.models import ragged
from qpruner.models.families import UnitKind, family_of
from qpruner.pruning.block_stream import BlockStream
from qpruner.pruning.surgery import unit_indices
from qpruner.pruning.units import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Gram:
    """Sum outer products of a layer's inputs, and of targets with them, as least squares needs them."""

    def __init__(self) -> None:
        self.matrix: torch.Tensor | None = None
        self.targets: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Count inputs ``(tokens, features)`` in; the sum is ``(features, features)`` float32.

        Targets ``(tokens, outputs)`` go to a sum ``(outputs, features)``.
        """
        inputs = inputs.float()
        if self.matrix is None:
            self.matrix = inputs.T @ inputs
        else:
            self.matrix.addmm_(inputs.T, inputs)
        if targets is not None:
            product = targets.float().T.to(inputs.device) @ inputs
            self.targets = product if self.targets is None else self.targets.add_(product)


def compensate_blocks(
    model: PreTrainedModel, gone: Collection[int], layers: Collection[int], ridge: float, samples: Samples
) -> None:
    """Solve the MLP output in front of blocks that go whole, so that it adds what they added.

    With X the inputs of its output projection (down) over the calibration tokens, and D what the blocks that go add to
    the residual stream, its weights become the ``W'`` that minimize ``|X (W' - W)^T - D|^2 + lambda |W' - W|^2``:
    ``W + D^T X (X^T X + lambda I)^-1``. Where the family has a norm behind that projection, or stacked experts in its
    place, blocks go without.

    Args:
        model: Dense model, blocks still there; output projections are changed in place.
        gone: Blocks that go.
        layers: Blocks that may be changed.
        ridge: Weight of staying near the original weights, relative to the mean square of the inputs.
        samples: Calibration samples.
    """
    family, config = family_of(model.config), model.config
    factor = family.residual_factor(config)
    if factor is None:
        return
    stream = BlockStream(model, samples)
    for index in (index for index in range(config.num_hidden_layers) if index not in gone):
        behind = list(itertools.takewhile(lambda other: other in gone, range(index + 1, config.num_hidden_layers)))
        if behind and index in layers:
            linear = family.unit_kinds(config.per_layer_config[index], index)[-1].output_linear
            assert linear is not None, "a residual factor says that there is one"
            gram = _Gram()
            stream.visit_effect(index, linear, behind, gram.add)
            assert gram.matrix is not None and gram.targets is not None
            name = f"{family.block_path(index)}.{linear}"
            change = _ridge_solution(gram.matrix, gram.targets / factor, ridge, name)
            weight = model.get_parameter(f"{name}.weight").data
            weight.copy_(weight.float() + change.to(weight.device))
        stream.advance(index)
    if config.num_hidden_layers - 1 in gone:
        samples.on_progress(config.num_hidden_layers, config.num_hidden_layers)


def compensate(model: PreTrainedModel, kept: Kept, method: str, ridge: float, samples: Samples) -> None:
    """Zero the columns of the units that go and make up for them, block by block with the already pruned inputs.

    Args:
        model: Dense model; its output projections are changed in place.
        kept: The units that stay.
        method: `bias` or `least_squares`.
        ridge: Weight of staying near the original weights, relative to the mean square of the inputs.
        samples: Calibration samples.
    """
    family = family_of(model.config)
    stream = BlockStream(model, samples)
    biased: set[str] = set()
    for index in range(model.config.num_hidden_layers):
        kinds = family.unit_kinds(model.config.per_layer_config[index], index) if index in kept else ()
        block = model.get_submodule(family.block_path(index))
        with ExitStack() as as_cut:
            # Attention first: the MLP's inputs are those behind the pruned attention.
            for kind in kinds:
                units = kept[index].get(kind.name)
                if units is None:
                    continue
                linear = kind.output_linear
                assert linear is not None, "preflight refuses to compensate what has no output projection"
                module = block.get_submodule(linear)
                if method == "bias" and module.bias is None:
                    biased.add(linear)
                if len(units) == kind.num_units:
                    continue
                as_cut.enter_context(family.as_cut(block, kind, units))
                stays = _columns(kind, units)
                if method == "bias":
                    moments = InputMoments()
                    stream.visit_inputs(index, linear, moments.add)
                    ragged.add_output_biases(block, [linear])
                    _shift_bias(module, stays, moments.mean)
                else:
                    gram = _Gram()
                    stream.visit_inputs(index, linear, gram.add)
                    _solve(module, stays, gram, ridge, f"{family.block_path(index)}.{linear}")
            stream.advance(index)
    declare_biases(model, sorted(biased))


def _columns(kind: UnitKind, units: tuple[int, ...]) -> torch.Tensor:
    """List the columns of the output projection that some units own."""
    output = next(item for item in kind.slices if item.parameter == f"{kind.output_linear}.weight")
    return unit_indices(output, units)


@torch.no_grad()
def _shift_bias(linear: torch.nn.Linear, stays: torch.Tensor, mean: torch.Tensor) -> None:
    """Put what the removed columns gave on average into the bias: ``b += W_R mean(x_R)`` (FLAP, eq. 5)."""
    removed = _others(stays, linear.in_features)
    weight = linear.weight.data
    given = weight[:, removed].float() @ mean[removed].float().to(weight.device)
    linear.bias.add_(given.to(linear.bias.dtype))
    weight[:, removed] = 0


@torch.no_grad()
def _solve(linear: torch.nn.Linear, stays: torch.Tensor, gram: _Gram, ridge: float, name: str) -> None:
    """Solve the columns that stay anew and zero the others.

    With ``G = X^T X`` over the calibration tokens, S the columns that stay and R those that go, the weights ``W'`` that
    minimize ``|X W^T - X_S W'^T|^2 + lambda |W' - W_S|^2`` are ``W_S + W_R G_RS (G_SS + lambda I)^-1``.
    """
    assert gram.matrix is not None
    device = gram.matrix.device
    kept, removed = stays.to(device), _others(stays, linear.in_features).to(device)
    weight = linear.weight.data
    given = weight[:, removed].float() @ gram.matrix[removed][:, kept]
    change = _ridge_solution(gram.matrix[kept][:, kept], given, ridge, name)
    weight[:, kept] = (weight[:, kept].float() + change).to(weight.dtype)
    weight[:, removed] = 0


def _ridge_solution(gram: torch.Tensor, given: torch.Tensor, ridge: float, name: str) -> torch.Tensor:
    """``given (gram + lambda I)^-1``, ``(outputs, features)``; lambda is `ridge` times the mean of gram's diagonal."""
    penalty = max(ridge * float(gram.diagonal().mean()), torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    change = torch.cholesky_solve(given.T, factor).T
    if failed or not torch.isfinite(change).all():
        raise TrainingDiverged(
            f"the least-squares weights of {name} are NaN or infinite; raise `prune.ridge` or give more text"
        )
    return change


def _others(stays: torch.Tensor, length: int) -> torch.Tensor:
    others = torch.ones(length, dtype=torch.bool)
    others[stays] = False
    return others.nonzero().flatten()


def new_biases(model: PreTrainedModel, settings: PruneConfig, layers: Sequence[int]) -> list[str]:
    """List the output projections that compensation gives a bias where the family has none."""
    if settings.compensates_by != "bias":
        return []
    family = family_of(model.config)
    kinds = family.unit_kinds(model.config.per_layer_config[layers[0]], layers[0])
    linears = [kind.output_linear for kind in kinds if kind.name in settings.width_units and kind.output_linear]
    block = model.get_submodule(family.block_path(layers[0]))
    return sorted(linear for linear in linears if block.get_submodule(linear).bias is None)


def declare_biases(model: PreTrainedModel, linears: Sequence[str]) -> None:
    """Give layers a bias in every block, and say so in the config, from which blocks are built."""
    if not linears:
        return
    family = family_of(model.config)
    for index in range(model.config.num_hidden_layers):
        ragged.add_output_biases(model.get_submodule(family.block_path(index)), linears)
    known = set(getattr(model.config, ragged.OUTPUT_BIASES, ()))
    setattr(model.config, ragged.OUTPUT_BIASES, sorted(known | set(linears)))
