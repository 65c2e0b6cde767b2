"""How much each unit matters: the importance criteria.

Taylor and magnitude look at every matrix a unit owns part of: a salience of each weight is summed over the unit's rows
or columns of a matrix, and the matrices are reduced to one score (`reduction`; the default `sum` and the others are
those of LLM-Pruner, arXiv 2305.11627, section 3.2). Fluctuation and activation norm look at what reaches the output
projection (o, down). Biases and norms are cut with their unit but do not count, as in LLM-Pruner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import InputMoments, Samples, visit_gradients, visit_inputs, visit_mask_gradients
from qpruner.data.losses import predicting
from qpruner.errors import TrainingDiverged
from qpruner.models.families import UnitKind, UnitSlice, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[int, dict[str, torch.Tensor]]
"""Block index -> kind of unit -> ``(units,)`` float64, on the CPU."""

Owner = tuple[int, UnitKind, int]
"""Block, kind and position among the kind's matrices: what one matrix's salience is added to."""


def score(
    model: PreTrainedModel, layers: Sequence[int], settings: PruneConfig, samples: Samples, seed: int = 0
) -> Scores:
    """Score every unit that may go, by the criterion of `settings`.

    Args:
        model: Dense model.
        layers: Blocks that may be cut.
        settings: Criterion, its options and the kinds of unit.
        samples: Calibration samples; not read by `magnitude` and `random`.
        seed: Of the random control.

    Raises:
        TrainingDiverged: Naming the parameter whose gradient or importance is NaN or infinite.
    """
    kinds = unit_kinds_of(model, layers, settings.width_units)
    reduction, modulo = settings.reduction, settings.query_heads == "modulo"
    if settings.importance == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            index: {kind.name: torch.rand(kind.num_units, generator=generator, dtype=torch.float64) for kind in some}
            for index, some in kinds.items()
        }
    if settings.importance == "magnitude":
        return magnitude(model, kinds, settings.norm, reduction, modulo)
    if settings.importance in ("fisher", "taylor"):
        order = "second" if settings.importance == "fisher" else settings.order
        return taylor(model, kinds, samples, order, settings.aggregation, reduction, modulo)
    moments = output_moments(model, kinds, samples)
    return (fluctuation if settings.importance == "fluctuation" else activation_norm)(model, kinds, moments)


def magnitude(
    model: PreTrainedModel,
    kinds: Mapping[int, Sequence[UnitKind]],
    norm: str = "l2",
    reduction: str = "sum",
    modulo: bool = False,
) -> Scores:
    """Sum ``|w|`` (`l1`) or ``w^2`` (`l2`; no root is taken, as in LLM-Pruner) over a unit's weights."""
    collected = _UnitScores(kinds)
    for name, (parameter, owners) in _matrices(model, kinds).items():
        weight = parameter.detach().float()
        collected.add(owners, weight.abs() if norm == "l1" else weight.square(), f"the importance of {name}")
    return collected.reduce(reduction, modulo)


def taylor(
    model: PreTrainedModel,
    kinds: Mapping[int, Sequence[UnitKind]],
    samples: Samples,
    order: str = "first",
    aggregation: str = "element",
    reduction: str = "sum",
    modulo: bool = False,
) -> Scores:
    """Estimate the change of the loss when a unit's weights are set to zero (arXiv 2305.11627, eqs. 3 to 5).

    The entries of a matrix's salience are ``s = w g`` weight by weight (`element`, eq. 5), or summed over each row or
    column a unit owns (`vector`, eq. 4). With ``s`` from the gradient of the mean loss over a batch and ``s_j`` from
    that of sample j alone, an entry counts as ``|s|`` (`first`), ``1/N sum_j s_j^2`` (`second`: the diagonal of the
    Fisher information stands for the Hessian's, without the half, as in LLM-Pruner's code; with `vector` it is that of
    a mask on the row, arXiv 2204.09656, eq. 7) or ``|s - 1/2 1/N sum_j s_j^2|`` (`mixed`). Entries are summed over the
    unit.

    LLM-Pruner puts all samples through one backward pass. `vector` is exact for any number of batches, and needs no
    gradient of a weight. `element` is exact for one batch; over several, the absolute values of each are summed, and
    `second` and `mixed` take a pass for every sample. `mixed` with `element` holds one float32 tensor more for every
    weight it scores.

    Args:
        model: Dense model.
        kinds: Units to score, by block.
        samples: Calibration samples.
        order: `first`, `second` or `mixed`.
        aggregation: `element` or `vector`.
        reduction: How the matrices of a unit become one score.
        modulo: Add query head h to key/value head h modulo their number, not to the one that serves it.
    """
    collect = _taylor_by_vector if aggregation == "vector" else _taylor_by_element
    return collect(model, kinds, samples, order).reduce(reduction, modulo)


def _taylor_by_vector(
    model: PreTrainedModel, kinds: Mapping[int, Sequence[UnitKind]], samples: Samples, order: str
) -> _UnitScores:
    """From the gradients of masks on rows and columns: one pass, whatever the order."""
    matrices = _matrices(model, kinds)
    linears = {
        name: (cast(torch.nn.Linear, model.get_submodule(name.removesuffix(".weight"))), owners[0][1].dim)
        for name, (_, owners) in matrices.items()
    }
    # The batch of all samples is the mean over tokens, so a sample counts as many times as it has tokens to predict.
    counts = torch.tensor([int(predicting(torch.tensor([row["labels"]])).sum()) for row in samples.rows])
    shares = counts / counts.sum()
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    seen = dict.fromkeys(linears, 0)

    def visit(name: str, by_sample: torch.Tensor) -> None:
        part = shares[seen[name] : seen[name] + len(by_sample)].to(by_sample.device)
        seen[name] += len(by_sample)
        sums[name] = sums.get(name, 0) + part @ by_sample
        squares[name] = squares.get(name, 0) + by_sample.square().sum(dim=0) / len(samples.rows)

    visit_mask_gradients(model, linears, samples, visit)
    collected = _UnitScores(kinds)
    for name, (_, owners) in matrices.items():
        if order == "second":
            entries = squares[name]
        else:
            entries = (sums[name] if order == "first" else sums[name] - 0.5 * squares[name]).abs()
        collected.add(owners, entries.unsqueeze(1 - owners[0][1].dim), f"the importance of {name}")
    return collected


def _taylor_by_element(
    model: PreTrainedModel, kinds: Mapping[int, Sequence[UnitKind]], samples: Samples, order: str
) -> _UnitScores:
    """From every weight's own gradient, which its hook hands over and drops."""
    matrices = _matrices(model, kinds)
    parameters = {name: parameter for name, (parameter, _) in matrices.items()}
    collected = _UnitScores(kinds)
    mean_squares: dict[str, torch.Tensor] = {}

    def add(name: str, entries: torch.Tensor) -> None:
        collected.add(matrices[name][1], entries, f"the importance of {name}")

    def visit_sample(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        square = _salience(parameter, gradient).square_().div_(len(samples.rows))
        if order == "second":  # a sum of positive terms: each sample's can be added by itself
            add(name, square)
        else:
            mean_squares[name] = mean_squares[name].add_(square) if name in mean_squares else square

    def visit_batch(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        salience = _salience(parameter, gradient)
        if order == "mixed":
            salience.sub_(mean_squares[name], alpha=0.5)
        add(name, salience.abs_())

    if order != "first":
        visit_gradients(model, parameters, samples.one_by_one, visit_sample)
    if order != "second":
        visit_gradients(model, parameters, samples, visit_batch)
    return collected


def _salience(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """``w g`` in float32; in the gradient's own memory where that is float32, for nobody reads it any more."""
    salience = gradient.float().contiguous()
    pieces = (torch.split(each.detach().view(-1), ENTRIES_AT_ONCE) for each in (salience, parameter.contiguous()))
    for piece, weights in zip(*pieces, strict=True):
        piece.mul_(weights)  # a whole matrix would be there a second time in float32
    return salience


def output_moments(
    model: PreTrainedModel, kinds: Mapping[int, Sequence[UnitKind]], samples: Samples
) -> dict[str, InputMoments]:
    """Measure mean and mean square of every input feature of the output projections, in one pass."""
    linears = {path: model.get_submodule(path) for path in output_linears(model, kinds).values()}
    moments = {path: InputMoments() for path in linears}
    visit_inputs(model, linears, samples, lambda path, inputs: moments[path].add(inputs))
    return moments


def fluctuation(
    model: PreTrainedModel, kinds: Mapping[int, Sequence[UnitKind]], moments: Mapping[str, InputMoments]
) -> Scores:
    """Sum FLAP's ``Var(x_j) * ||W_:j||^2`` (arXiv 2312.11983, eq. 4) over a unit's columns.

    That is what the output loses when a feature is replaced by its mean.
    """
    return _by_output(model, kinds, lambda path: moments[path].variance)


def activation_norm(
    model: PreTrainedModel, kinds: Mapping[int, Sequence[UnitKind]], moments: Mapping[str, InputMoments]
) -> Scores:
    """Sum Wanda's ``|W| * ||x||`` squared, ``E[x_j^2] * ||W_:j||^2`` (after arXiv 2306.11695, eq. 1), over columns.

    That is what the output loses when a feature is replaced by zero.
    """
    return _by_output(model, kinds, lambda path: moments[path].mean_square)


def output_linears(model: PreTrainedModel, kinds: Mapping[int, Sequence[UnitKind]]) -> dict[tuple[int, str], str]:
    """Map (block, kind) to the full path of the output projection, for kinds that have one."""
    family = family_of(model.config)
    return {
        (index, kind.name): f"{family.block_path(index)}.{kind.output_linear}"
        for index, some in kinds.items()
        for kind in some
        if kind.output_linear
    }


def _by_output(
    model: PreTrainedModel,
    kinds: Mapping[int, Sequence[UnitKind]],
    feature_weight: Callable[[str], torch.Tensor],
) -> Scores:
    """Squared norm of each column of an output projection times a weight of its input feature."""
    scores: Scores = {index: {} for index in kinds}
    paths = output_linears(model, kinds)
    for index, some in kinds.items():
        for kind in some:
            path = paths[index, kind.name]
            weight = model.get_parameter(f"{path}.weight").detach().float()
            salience = weight.square().sum(dim=0).cpu().double() * feature_weight(path)
            check_finite(salience, f"the importance of {path}")
            scores[index][kind.name] = salience.view(kind.num_units, -1).sum(dim=1)
    return scores


def unit_kinds_of(
    model: PreTrainedModel, layers: Sequence[int], units: Sequence[str]
) -> dict[int, tuple[UnitKind, ...]]:
    """List the kinds of unit that may go, by block."""
    family = family_of(model.config)
    return {
        index: tuple(
            kind for kind in family.unit_kinds(model.config.per_layer_config[index], index) if kind.name in units
        )
        for index in layers
    }


def _matrices(
    model: PreTrainedModel, kinds: Mapping[int, Sequence[UnitKind]]
) -> dict[str, tuple[torch.nn.Parameter, list[tuple[Owner, UnitSlice]]]]:
    """Each matrix of the blocks with the slices that units own of it; norms and biases are left out."""
    family = family_of(model.config)
    found = {}
    for index, some in kinds.items():
        owners: dict[str, list[tuple[Owner, UnitSlice]]] = {}
        for kind in some:
            for position, item in enumerate(kind.slices):
                owners.setdefault(item.parameter, []).append(((index, kind, position), item))
        for path, slices in owners.items():
            name = f"{family.block_path(index)}.{path}"
            parameter = model.get_parameter(name)
            if parameter.dim() > 1:
                found[name] = (parameter, slices)
    return found


class _UnitScores:
    """Add up scores of units by matrix, until they are reduced to one; of key/value groups, head by head."""

    def __init__(self, kinds: Mapping[int, Sequence[UnitKind]]) -> None:
        self._kinds = kinds
        self._scores: dict[tuple[int, UnitKind], dict[int, torch.Tensor]] = {}

    def add(self, slices: list[tuple[Owner, UnitSlice]], entries: torch.Tensor, what: str) -> None:
        """Add a matrix's entries ``(rows, columns)``, or ``(experts, rows, columns)``, to the units that own them."""
        for (index, kind, position), item in slices:
            kept = (0, item.dim) if kind.partitions > 1 else (item.dim,)
            along = entries.sum(dim=[dim for dim in range(entries.dim()) if dim not in kept]).view(kind.partitions, -1)
            owned = along[:, item.offset : item.offset + kind.units_per_partition * item.width]
            by_head = owned.double().reshape(-1, item.width // item.heads).sum(dim=1).cpu()
            check_finite(by_head, what)
            scores = self._scores.setdefault((index, kind), {})
            scores[position] = scores[position] + by_head if position in scores else by_head

    def reduce(self, reduction: str, modulo: bool = False) -> Scores:
        """Reduce the matrices of each unit to one score."""
        scores: Scores = {index: {} for index in self._kinds}
        for (index, kind), by_matrix in self._scores.items():
            by_unit = [
                heads.view(-1, kind.num_units).sum(dim=0) if modulo else heads.view(kind.num_units, -1).sum(dim=1)
                for _, heads in sorted(by_matrix.items())
            ]
            scores[index][kind.name] = REDUCTIONS[reduction](torch.stack(by_unit))
        return scores


ENTRIES_AT_ONCE = 2**22
"""Of a matrix, converted to float32 for a product: 16 MiB."""
REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda scores: scores.sum(dim=0),
    "mean": lambda scores: scores.mean(dim=0),
    "max": lambda scores: scores.amax(dim=0),
    "product": lambda scores: scores.prod(dim=0),
    "last": lambda scores: scores[-1],
}
"""``(matrices, units)`` -> ``(units,)``; the last matrix is the output projection."""


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a broken weight: one makes every gradient NaN.

    Raises:
        TrainingDiverged: Naming the first parameter, norms, biases and embeddings too, that is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        check_finite(parameter, f"the weight {name}")


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise `TrainingDiverged` where a value is NaN or infinite."""
    least_and_most = torch.stack(torch.aminmax(values.detach()))  # NaN if one is; `isfinite` of all takes 5 bytes each
    if not torch.isfinite(least_and_most).all():
        raise TrainingDiverged(f"{what} is NaN or infinite")
