"""How much each unit matters: the importance criteria.

Taylor and magnitude look at every matrix a unit owns part of: a salience of each weight is summed over the unit's rows
or columns of a matrix, and the matrices are reduced to one score (`reduction`; the default `sum` and the others are
those of LLM-Pruner, arXiv 2305.11627, section 3.2). Fluctuation and activation norm look at what reaches the output
projection (o, down). Biases and norms are cut with their unit but do not count, as in LLM-Pruner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import (
    InputMoments,
    Samples,
    at_tokens,
    block_inputs,
    hooked,
    visit_gradients,
    visit_inputs,
    visit_mask_gradients,
)
from qpruner.data.losses import predicting
from qpruner.errors import TrainingDiverged
from qpruner.models.families import EXPERT, MLP, UnitKind, family_of
from qpruner.pruning.units import unit_kinds_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[int, dict[str, torch.Tensor]]
"""Block index -> kind of unit -> ``(units,)`` float64, on the CPU."""
Kinds = Mapping[int, Sequence[UnitKind]]
"""The kinds of unit to score, by block."""


def score(
    model: PreTrainedModel, layers: Sequence[int], settings: PruneConfig, samples: Samples, seed: int = 0
) -> Scores:
    """Score every unit that may go, by the criterion of `settings`; `magnitude` and `random` read no samples.

    Raises:
        TrainingDiverged: Naming the parameter whose gradient or importance is NaN or infinite.
    """
    kinds, importance = unit_kinds_of(model.config, layers, settings.width_units), settings.importance
    if importance == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            index: {kind.name: torch.rand(kind.num_units, generator=generator, dtype=torch.float64) for kind in some}
            for index, some in kinds.items()
        }
    if settings.looks_at_linears:
        return _by_output(model, kinds, samples, "variance" if importance == "fluctuation" else "mean_square")
    if importance == "magnitude":
        scores = UnitScores(model, kinds)
        for name, parameter in scores.matrices.items():
            weight = parameter.detach().float()
            # Of l2 no root is taken, as in LLM-Pruner.
            scores.add(name, weight.abs() if settings.norm == "l1" else weight.square())
    else:
        order = "second" if importance == "fisher" else settings.order
        scores = _taylor(model, kinds, samples, order, settings.aggregation)
    return scores.reduce(settings.reduction, settings.query_heads == "modulo")


def _taylor(
    model: PreTrainedModel, kinds: Kinds, samples: Samples, order: str = "first", aggregation: str = "element"
) -> UnitScores:
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
    """
    return (_taylor_by_vector if aggregation == "vector" else _taylor_by_element)(model, kinds, samples, order)


def _taylor_by_vector(model: PreTrainedModel, kinds: Kinds, samples: Samples, order: str) -> UnitScores:
    """From the gradients of masks on rows and columns: one pass, whatever the order."""
    scores = UnitScores(model, kinds)
    dims = scores.dims.items()
    linears: dict[str, Any] = {name: (model.get_submodule(name.removesuffix(".weight")), dim) for name, dim in dims}
    # The batch of all samples is the mean over tokens, so a sample counts as many times as it has tokens to predict.
    counts = torch.tensor([int(predicting(torch.tensor([row["labels"]])).sum()) for row in samples.rows])
    shares = counts / counts.sum()
    sums: Any = dict.fromkeys(linears, 0)
    squares: Any = dict.fromkeys(linears, 0)
    seen = dict.fromkeys(linears, 0)

    def visit(name: str, by_sample: torch.Tensor) -> None:
        part = shares[seen[name] : seen[name] + len(by_sample)].to(by_sample.device)
        seen[name] += len(by_sample)
        sums[name] = sums[name] + part @ by_sample
        squares[name] = squares[name] + by_sample.square().sum(dim=0) / len(samples.rows)

    visit_mask_gradients(model, linears, samples, visit)
    for name, dim in dims:
        entries = sums[name] if order == "first" else sums[name] - 0.5 * squares[name]
        scores.add(name, (squares[name] if order == "second" else entries.abs()).unsqueeze(1 - dim))
    return scores


def _taylor_by_element(model: PreTrainedModel, kinds: Kinds, samples: Samples, order: str) -> UnitScores:
    """From every weight's own gradient, which its hook hands over and drops."""
    scores = UnitScores(model, kinds)
    mean_squares: dict[str, torch.Tensor] = {}

    def visit_sample(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        square = _salience(parameter, gradient).square_().div_(len(samples.rows))
        if order == "second":  # a sum of positive terms: each sample's can be added by itself
            scores.add(name, square)
        else:
            mean_squares[name] = mean_squares[name].add_(square) if name in mean_squares else square

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
    """``w g`` in float32; in the gradient's own memory where that is float32, for nobody reads it any more."""
    salience = gradient.float().contiguous()
    pieces = (torch.split(each.detach().view(-1), ENTRIES_AT_ONCE) for each in (salience, parameter.contiguous()))
    for piece, weights in zip(*pieces, strict=True):
        piece.mul_(weights)  # a whole matrix would be there a second time in float32
    return salience


def _by_output(model: PreTrainedModel, kinds: Kinds, samples: Samples, statistic: str) -> Scores:
    """Sum over a unit's columns of an output projection their squared norm times a statistic of their input feature.

    `variance`: FLAP's ``Var(x_j) * ||W_:j||^2`` (arXiv 2312.11983, eq. 4), what the output loses when a feature is
    replaced by its mean. `mean_square`: Wanda's ``|W| * ||x||`` squared, ``E[x_j^2] * ||W_:j||^2`` (after arXiv
    2306.11695, eq. 1), what it loses when a feature is replaced by zero. Both are measured in one pass.
    """
    path, scores = family_of(model.config).block_path, Scores()
    outputs = {f"{path(index)}.{kind.output_linear}": (index, kind) for index, some in kinds.items() for kind in some}
    moments = {name: InputMoments() for name in outputs}
    linears = {name: model.get_submodule(name) for name in outputs}
    visit_inputs(model, linears, samples, lambda name, inputs: moments[name].add(inputs))
    for name, (index, kind) in outputs.items():
        weight = model.get_parameter(f"{name}.weight").detach().float()
        salience = weight.square().sum(dim=0).cpu().double() * getattr(moments[name], statistic)
        check_finite(salience, f"the importance of {name}")
        scores.setdefault(index, {})[kind.name] = salience.view(kind.num_units, -1).sum(dim=1)
    return scores


class UnitScores:
    """Add up scores of units by matrix, until they are reduced to one; of key/value groups, head by head.

    `matrices` are those that units own parts of, norms and biases left out; `dims` says along which dimension.
    """

    def __init__(self, model: PreTrainedModel, kinds: Kinds) -> None:
        self._scores: dict[tuple[int, UnitKind], dict[int, torch.Tensor]] = {
            (index, kind): {} for index, some in kinds.items() for kind in some
        }
        self._owners: dict[str, list[tuple[int, UnitKind, int]]] = {}
        self.matrices: dict[str, torch.nn.Parameter] = {}
        self.dims: dict[str, int] = {}
        path = family_of(model.config).block_path
        for index, kind in self._scores:
            for position, item in enumerate(kind.slices):
                name = f"{path(index)}.{item.parameter}"
                parameter = model.get_parameter(name)
                if parameter.dim() > 1:
                    self.matrices[name] = parameter
                    self.dims.setdefault(name, item.dim)
                    self._owners.setdefault(name, []).append((index, kind, position))

    def add(self, name: str, entries: torch.Tensor) -> None:
        """Add a matrix's entries ``(rows, columns)``, or ``(experts, rows, columns)``, to the units that own them."""
        for index, kind, position in self._owners[name]:
            item = kind.slices[position]
            kept = (0, item.dim) if kind.partitions > 1 else (item.dim,)
            along = entries.sum(dim=[dim for dim in range(entries.dim()) if dim not in kept]).view(kind.partitions, -1)
            owned = along[:, item.offset : item.offset + kind.units_per_partition * item.width]
            by_head = owned.double().reshape(-1, item.width // item.heads).sum(dim=1).cpu()
            check_finite(by_head, f"the importance of {name}")
            scores = self._scores[index, kind]
            scores[position] = scores[position] + by_head if position in scores else by_head

    def reduce(self, reduction: str, modulo: bool = False) -> Scores:
        """Reduce the matrices of each unit to one score.

        With `modulo` query head h counts for key/value head h modulo their number, not for the one that serves it.
        """
        scores: Scores = {}
        for (index, kind), by_matrix in self._scores.items():
            by_unit = [
                heads.view(-1, kind.num_units).sum(dim=0) if modulo else heads.view(kind.num_units, -1).sum(dim=1)
                for _, heads in sorted(by_matrix.items())
            ]
            scores.setdefault(index, {})[kind.name] = REDUCTIONS[reduction](torch.stack(by_unit))
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
    """Refuse a weight, also of norms, biases and embeddings, that is NaN or infinite: it makes every gradient NaN."""
    for name, parameter in model.named_parameters():
        check_finite(parameter, f"the weight {name}")


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise `TrainingDiverged` where a value is NaN or infinite."""
    least_and_most = torch.stack(torch.aminmax(values.detach()))  # NaN if one is; `isfinite` of all takes 5 bytes each
    if not torch.isfinite(least_and_most).all():
        raise TrainingDiverged(f"{what} is NaN or infinite")


# ---- whole blocks


def block_importance(model: PreTrainedModel, layers: Sequence[int], method: str, samples: Samples) -> dict[int, float]:
    """Score every block that may go by `block_influence`, or by `taylor`, summed over its weights.

    Raises:
        TrainingDiverged: Naming the block whose importance is NaN or infinite.
    """
    if method == "block_influence":
        scores = _block_influence(model, layers, samples)
    else:
        # Each matrix counts once: whole experts and the router, not their channels too.
        kinds = {}
        for index, some in unit_kinds_of(model.config, layers).items():
            has_experts = any(kind.name == EXPERT for kind in some)
            kinds[index] = tuple(kind for kind in some if not (has_experts and kind.name == MLP))
        by_unit = _taylor(model, kinds, samples).reduce("sum")
        scores = {index: sum(float(score.sum()) for score in by_kind.values()) for index, by_kind in by_unit.items()}
    for index, value in scores.items():
        check_finite(torch.tensor(value), f"the importance of {family_of(model.config).block_path(index)}")
    return scores


@torch.no_grad()
def _block_influence(model: PreTrainedModel, layers: Sequence[int], samples: Samples) -> dict[int, float]:
    """Compute one minus the mean cosine between a block's input and output (ShortGPT, arXiv 2403.03853, eq. 1).

    A block that hardly turns its hidden states can go.
    """
    family = family_of(model.config)
    sums = dict.fromkeys(layers, 0.0)
    tokens = torch.empty(0, dtype=torch.bool)
    count = 0

    def hook_for(index: int) -> Callable[..., None]:
        def hook(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = block_inputs(args, kwargs)
            after = output[0] if isinstance(output, tuple) else output
            # Spread over several devices, a block is given what lies on the device of the one before.
            pair = at_tokens(before.to(after.device), tokens).float(), at_tokens(after, tokens).float()
            sums[index] += float(torch.nn.functional.cosine_similarity(*pair).sum())

        return hook

    hooks = (
        model.get_submodule(family.block_path(index)).register_forward_hook(hook_for(index), with_kwargs=True)
        for index in layers
    )
    with hooked(hooks):
        for batch in samples.batches(model.device):
            tokens = batch["attention_mask"].bool()
            count += int(tokens.sum())
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return {index: 1.0 - total / count for index, total in sums.items()}
