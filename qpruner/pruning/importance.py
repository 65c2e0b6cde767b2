"""How much each unit matters: the importance criteria.

A unit's score is summed over the rows and columns it owns in every layer of its group, as LLM-Pruner does with its
default `sum` aggregation (arXiv 2305.11627, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from qpruner.calibration import Rows, visit_gradients
from qpruner.errors import TrainingDiverged
from qpruner.models.structure import UnitSlice, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[int, dict[str, torch.Tensor]]
"""Block index -> kind of unit -> ``(units,)`` float32."""


def magnitude(model: PreTrainedModel, layers: range) -> Scores:
    """Sum of squared weights of a unit (LLM-Pruner's `l2`)."""
    scores = _empty_scores(model, layers)
    for name, parameter, slices in _owned(model, layers):
        _add(scores, slices, parameter.detach().float().square(), name)
    return scores


def taylor(model: PreTrainedModel, layers: range, rows: Rows, pad_id: int, batch_size: int | None = None) -> Scores:
    """First-order Taylor, element-wise: sum of ``|w * dL/dw|`` over a unit's weights (arXiv 2305.11627, eq. 4).

    Samples of a batch go through one backward pass, so the gradient is that of their mean loss, as in LLM-Pruner, which
    takes all at once; over several batches the scores are summed.

    Args:
        model: Dense model.
        layers: Blocks to score.
        rows: Encoded calibration samples.
        pad_id: Padding token.
        batch_size: Samples a backward pass; None takes all.
    """
    owned = {name: (parameter, slices) for name, parameter, slices in _owned(model, layers)}
    scores = _empty_scores(model, layers)
    for name, (parameter, _) in owned.items():
        # One broken weight makes every gradient NaN, so it is looked for before they are taken.
        _check_finite(parameter, f"the weight {name}")

    def visit(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        salience = (parameter.detach().float() * gradient.float()).abs()
        _add(scores, owned[name][1], salience, name)

    parameters = {name: parameter for name, (parameter, _) in owned.items()}
    visit_gradients(model, parameters, rows, pad_id, visit, batch_size or len(rows))
    return scores


def _owned(
    model: PreTrainedModel, layers: range
) -> list[tuple[str, torch.nn.Parameter, list[tuple[int, str, int, UnitSlice]]]]:
    """Each weight of the blocks with the slices that units own of it."""
    family = family_of(model.config)
    found = []
    for index in layers:
        by_linear: dict[str, list[tuple[int, str, int, UnitSlice]]] = {}
        for kind in family.unit_kinds(model.config.per_layer_config[index]):
            for item in kind.slices:
                by_linear.setdefault(item.linear, []).append((index, kind.name, kind.num_units, item))
        for linear, slices in by_linear.items():
            path = f"{family.block_path(index)}.{linear}"
            found.append((f"{path}.weight", model.get_submodule(path).weight, slices))
    return found  # type: ignore[return-value]


def _empty_scores(model: PreTrainedModel, layers: range) -> Scores:
    family = family_of(model.config)
    return {
        index: {
            kind.name: torch.zeros(kind.num_units) for kind in family.unit_kinds(model.config.per_layer_config[index])
        }
        for index in layers
    }


def _add(
    scores: Mapping[int, dict[str, torch.Tensor]],
    slices: list[tuple[int, str, int, UnitSlice]],
    salience: torch.Tensor,
    name: str,
) -> None:
    """Add a weight's salience ``(rows, columns)`` to the units that own parts of it."""
    _check_finite(salience, f"the importance of {name}")
    for index, kind, num_units, item in slices:
        along = salience.sum(dim=1 - item.dim)[item.offset : item.offset + num_units * item.width]
        scores[index][kind] += along.view(num_units, item.width).sum(dim=1).cpu()


def _check_finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise TrainingDiverged(f"{what} is NaN or infinite")
