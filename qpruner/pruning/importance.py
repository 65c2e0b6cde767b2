"""Score the importance of units and blocks.

Taylor and magnitude use every matrix that a unit owns part of. They sum a salience per weight over
the rows or columns of the unit, and reduce the scores of all matrices to one by `reduction`
(LLM-Pruner, arXiv 2305.11627, section 3.2). Fluctuation (FLAP) and activation norm (Wanda) use the
inputs of the output projections (o, down). Biases and norms are cut with their unit but not scored,
as in LLM-Pruner.

Taylor estimates how the loss changes when the weights of a unit are zero (LLM-Pruner, eqs. 3 to 5).
Salience is ``s = w g`` per weight (`element`, eq. 5), or its sum over each row or column of a unit
(`vector`, eq. 4). With ``s`` of the mean loss over all N samples and ``s_j`` of sample j alone, a
unit sums ``|s|`` (`first`), ``1/N sum_j s_j^2`` (`second`) or ``|s - 1/2 1/N sum_j s_j^2|``
(`mixed`) over its entries. `second` uses the diagonal Fisher information for the Hessian, without
the factor 1/2, as LLM-Pruner's code does; with `vector` it is that of a mask on the row (arXiv
2204.09656, eq. 7). With several batches `element` sums ``|.|`` over them, which changes `first` and
`mixed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import (
    InputMoments,
    Samples,
    at_tokens,
    block_inputs,
    block_output,
    run_base,
    visit_gradients,
    visit_inputs,
    visit_mask_gradients,
)
from qpruner.data.losses import hooked, predicting
from qpruner.errors import TrainingDiverged
from qpruner.models.families import UnitKind, block_paths
from qpruner.pruning.units import unit_kinds_of

Scores = dict[int, dict[str, torch.Tensor]]
"""Block index -> kind of unit -> scores ``(units,)``, float64 on the CPU."""
Kinds = Mapping[int, Sequence[UnitKind]]
"""Block index -> kinds of unit to score."""


def score(
    model: PreTrainedModel,
    layers: Sequence[int],
    settings: PruneConfig,
    samples: Samples,
    seed: int = 0,
) -> Scores:
    """Score the units of the blocks in `layers` by `settings.importance`.

    Raise `TrainingDiverged` if a gradient or score is NaN or infinite.
    """
    kinds = unit_kinds_of(model.config, layers, settings.width_units)
    importance = settings.importance
    if importance == "random":
        return _at_random(kinds, seed)
    if importance == "fluctuation":
        return _by_output(model, kinds, samples, "variance")
    if importance == "activation_norm":
        return _by_output(model, kinds, samples, "mean_square")

    order = "second" if importance == "fisher" else settings.order
    if importance == "magnitude":
        scores = _by_weight(model, kinds, settings.norm)
    elif settings.aggregation == "vector":
        scores = _by_vector(model, kinds, samples, order)
    else:
        scores = _by_element(model, kinds, samples, order)
    return scores.reduce(settings.reduction, settings.query_heads == "modulo")


def _at_random(kinds: Kinds, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def draw(kind: UnitKind) -> torch.Tensor:
        return torch.rand(kind.num_units, generator=generator, dtype=torch.float64)

    return {
        index: {kind.name: draw(kind) for kind in of_block} for index, of_block in kinds.items()
    }


def _by_weight(model: PreTrainedModel, kinds: Kinds, norm: str) -> UnitScores:
    """Score by absolute (l1) or squared (l2) weights."""
    scores = UnitScores(model, kinds)
    for name, parameter in scores.matrices.items():
        weight = parameter.detach().float()
        # For l2 no square root is taken, as in LLM-Pruner.
        scores.add(name, weight.abs() if norm == "l1" else weight.square())
    return scores


def _by_vector(model: PreTrainedModel, kinds: Kinds, samples: Samples, order: str) -> UnitScores:
    """Score by the gradients of masks on rows and columns, in one pass for any `order`."""
    scores = UnitScores(model, kinds)
    linears: dict[str, Any] = {}
    for name, dim in scores.dims.items():
        linears[name] = (model.get_submodule(name.removesuffix(".weight")), dim)

    # The loss of all samples is a mean over tokens, so each sample is weighted by its number of
    # predicted tokens.
    labels = [torch.tensor([row["labels"]]) for row in samples.rows]
    counts = torch.tensor([int(predicting(of_row).sum()) for of_row in labels])
    shares = counts / counts.sum()
    sums: Any = dict.fromkeys(linears, 0)
    squares: Any = dict.fromkeys(linears, 0)
    num_seen = dict.fromkeys(linears, 0)

    def visit(name: str, by_sample: torch.Tensor) -> None:
        start = num_seen[name]
        num_seen[name] += len(by_sample)
        of_batch = shares[start : num_seen[name]].to(by_sample.device)
        sums[name] = sums[name] + of_batch @ by_sample
        squares[name] = squares[name] + by_sample.square().sum(dim=0) / len(samples.rows)

    visit_mask_gradients(model, linears, samples, visit)
    for name, dim in scores.dims.items():
        if order == "first":
            entries = sums[name].abs()
        elif order == "second":
            entries = squares[name]
        else:
            entries = (sums[name] - 0.5 * squares[name]).abs()
        scores.add(name, entries.unsqueeze(1 - dim))
    return scores


def _by_element(model: PreTrainedModel, kinds: Kinds, samples: Samples, order: str) -> UnitScores:
    """Score by the weight gradients, with one gradient at a time in memory."""
    scores = UnitScores(model, kinds)
    mean_squares: dict[str, torch.Tensor] = {}

    def visit_sample(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        square = _salience(parameter, gradient).square_().div_(len(samples.rows))
        if order == "second":  # all terms are positive, so samples can be added one by one
            scores.add(name, square)
        elif name in mean_squares:
            mean_squares[name].add_(square)
        else:
            mean_squares[name] = square

    def visit_batch(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        salience = _salience(parameter, gradient)
        if order == "mixed":
            salience.sub_(mean_squares[name], alpha=0.5)
        scores.add(name, salience.abs_())

    if order != "first":
        visit_gradients(model, scores.matrices, replace(samples, batch_size=1), visit_sample)
    if order != "second":
        visit_gradients(model, scores.matrices, samples, visit_batch)
    return scores


def _salience(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """Compute ``w g`` in float32; overwrite a float32 gradient, which is not needed afterwards."""
    salience = gradient.float().contiguous()
    pieces = torch.split(salience.detach().view(-1), ENTRIES_AT_ONCE)
    weights = torch.split(parameter.contiguous().detach().view(-1), ENTRIES_AT_ONCE)
    for piece, of_piece in zip(pieces, weights, strict=True):
        piece.mul_(of_piece)  # in pieces, to hold no float32 copy of the whole matrix
    return salience


def _by_output(model: PreTrainedModel, kinds: Kinds, samples: Samples, statistic: str) -> Scores:
    """Score a unit by its columns of an output projection: squared norm times an input statistic.

    `variance` is the score of FLAP, ``Var(x_j) * ||W_:j||^2`` (arXiv 2312.11983, eq. 4): the output
    error when feature j is replaced by its mean. `mean_square` is the squared score of Wanda, ``|W|
    * ||x||``, summed over the column: ``E[x_j^2] * ||W_:j||^2`` (after arXiv 2306.11695, eq. 1),
    the output error when feature j is replaced by zero.
    """
    paths = block_paths(model.config)
    outputs: dict[str, tuple[int, UnitKind]] = {}
    for index, of_block in kinds.items():
        for kind in of_block:
            outputs[f"{paths[index]}.{kind.output_linear}"] = (index, kind)

    moments = {name: InputMoments() for name in outputs}
    linears = {name: model.get_submodule(name) for name in outputs}
    visit_inputs(model, linears, samples, lambda name, inputs: moments[name].add(inputs))

    scores: Scores = {}
    for name, (index, kind) in outputs.items():
        weight = model.get_parameter(f"{name}.weight").detach().float()
        norms = weight.square().sum(dim=0).cpu().double()
        salience = norms * getattr(moments[name], statistic)
        check_finite(salience, f"the importance of {name}")
        scores.setdefault(index, {})[kind.name] = salience.view(kind.num_units, -1).sum(dim=1)
    return scores


_Owner = tuple[int, UnitKind, int]
"""Block index, kind of unit, and position of its slice of a matrix."""


class UnitScores:
    """Sum scores for each matrix and unit, then reduce them to one score for each unit.

    In the query and output projections (q, o) each query head has its own sum. `matrices` holds by
    name the matrices that units own parts of; `dims` holds the dimension that units divide.
    """

    def __init__(self, model: PreTrainedModel, kinds: Kinds) -> None:
        self._owners: dict[str, list[_Owner]] = {}
        self._by_matrix: dict[tuple[int, UnitKind], dict[int, torch.Tensor]] = {}
        self.matrices: dict[str, torch.nn.Parameter] = {}
        self.dims: dict[str, int] = {}
        paths = block_paths(model.config)
        for index, of_block in kinds.items():
            for kind in of_block:
                self._by_matrix[index, kind] = {}
                for position, item in enumerate(kind.slices):
                    name = f"{paths[index]}.{item.parameter}"
                    parameter = model.get_parameter(name)
                    if parameter.dim() > 1:
                        self.matrices[name] = parameter
                        self.dims.setdefault(name, item.dim)
                        self._owners.setdefault(name, []).append((index, kind, position))

    def add(self, name: str, entries: torch.Tensor) -> None:
        """Add the entries of a matrix ``(rows, columns)`` to the units that own them."""
        for index, kind, position in self._owners[name]:
            item = kind.slices[position]
            end = item.offset + kind.num_units * item.width
            owned = entries.sum(dim=1 - item.dim)[item.offset : end]
            by_head = owned.double().reshape(-1, item.width // item.heads).sum(dim=1).cpu()
            check_finite(by_head, f"the importance of {name}")
            scores = self._by_matrix[index, kind]
            if position in scores:
                by_head = scores[position] + by_head
            scores[position] = by_head

    def reduce(self, reduction: str, modulo: bool = False) -> Scores:
        """Reduce the scores of all matrices to one score for each unit.

        With `modulo` query head h counts for unit ``h % units``, as in LLM-Pruner's code; without
        it, for the unit that serves it.
        """
        scores: Scores = {}
        for (index, kind), by_matrix in self._by_matrix.items():
            by_unit = []
            for _, heads in sorted(by_matrix.items()):
                if modulo:
                    by_unit.append(heads.view(-1, kind.num_units).sum(dim=0))
                else:
                    by_unit.append(heads.view(kind.num_units, -1).sum(dim=1))
            scores.setdefault(index, {})[kind.name] = REDUCTIONS[reduction](torch.stack(by_unit))
        return scores


ENTRIES_AT_ONCE = 2**22  # entries of a matrix that are converted to float32 at once: 16 MiB
REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda scores: scores.sum(dim=0),
    "mean": lambda scores: scores.mean(dim=0),
    "max": lambda scores: scores.amax(dim=0),
    "product": lambda scores: scores.prod(dim=0),
    "last": lambda scores: scores[-1],
}
"""Name -> function from scores ``(matrices, units)`` to ``(units,)``; the last matrix is the output
projection."""


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise `TrainingDiverged` if any value is NaN or infinite."""
    # NaN if any value is; `isfinite` of all values takes 5 bytes for each.
    least_and_most = torch.stack(torch.aminmax(values.detach()))
    if not torch.isfinite(least_and_most).all():
        raise TrainingDiverged(f"{what} is NaN or infinite")


# ---- whole blocks


@torch.no_grad()
def block_importance(
    model: PreTrainedModel, layers: Sequence[int], samples: Samples
) -> dict[int, float]:
    """Score blocks by one minus the mean cosine between their inputs and outputs.

    This is the block influence of ShortGPT (arXiv 2403.03853, eq. 1).
    """
    paths = block_paths(model.config)
    sums = dict.fromkeys(layers, 0.0)
    tokens = torch.empty(0, dtype=torch.bool)
    count = 0

    def hook_for(index: int) -> Callable[..., None]:
        def hook(
            block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            after = block_output(output)
            # In a model spread over devices, the input may lie on the device of the block before.
            before = block_inputs(args, kwargs).to(after.device)
            cosines = torch.nn.functional.cosine_similarity(
                at_tokens(before, tokens).float(), at_tokens(after, tokens).float()
            )
            sums[index] += float(cosines.sum())

        return hook

    blocks = {index: model.get_submodule(paths[index]) for index in layers}
    with hooked(
        block.register_forward_hook(hook_for(index), with_kwargs=True)
        for index, block in blocks.items()
    ):
        for batch in samples.batches(model.device):
            tokens = batch["attention_mask"].bool()
            count += int(tokens.sum())
            run_base(model, batch)

    scores = {index: 1.0 - total / count for index, total in sums.items()}
    for index, value in scores.items():
        check_finite(torch.tensor(value), f"the importance of {paths[index]}")
    return scores
