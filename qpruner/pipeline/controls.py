"""The plans that a search has to beat: what a user would do without a search, within the same bytes.

- `unpruned-uniform`, `unpruned-knapsack`: the base model in its best format, and its best plan, by a sensitivity;
- `paper`: the flow of the QPruner paper: the pruned model in nf4 and int8, chosen by mutual information;
- `seed-METHOD`: the best plan of the pruned model by a sensitivity;
- `uniform-FORMAT`: every block of the pruned model in one format.

A control that no budget can hold is tried with its fewest bytes; it cannot win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from qpruner.models.layout import refusals
from qpruner.pipeline.context import Context
from qpruner.plans.plan import EMBEDDINGS, HEAD, UNPRUNED, PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.quantization.formats import DENSE, PAPER, format_of
from qpruner.report.results import MUTUAL_INFORMATION
from qpruner.runs.records import BankRecord, SensitivityRecord
from qpruner.search.choice import best_uniform, controls_of, seed_plan
from qpruner.search.searchers import Prior

Control = tuple[str, PrecisionPlan]
SHARED = ("kl", "fisher", "second_order", "loss", "first_order", MUTUAL_INFORMATION)
"""Sensitivities of the pruned model that may choose a plan of the base model; the first that is measured does."""


def controls(context: Context) -> list[Control]:
    """List the controls of a run in the order in which they are tried."""
    priors = {name: method.values for name, method in context.record(SensitivityRecord).methods.items()}
    paper = paper_plan(context)
    found = [("paper", paper)] if paper else []
    return [*unpruned_controls(context), *found, *controls_of(context.space.spaces[0], priors)]


def unpruned_controls(context: Context) -> list[Control]:
    """List the controls on the base model; none if the run prunes nothing, or if the base takes none of the formats."""
    layout = context.layout_of(UNPRUNED)
    refused = [refusals(level, group.linears, context.on_gpu) for group in layout.groups for level in group.formats]
    if context.reference == UNPRUNED or any(refused):
        return []
    space = PlanSpace.of(layout, context.space.budget_bytes)
    rises = _unpruned_rises(context, space)
    found = [("unpruned-uniform", best_uniform(space, rises))]
    if space.is_feasible(space.smallest()):
        found.append(("unpruned-knapsack", seed_plan(rises, space)))
    return found


def paper_plan(context: Context) -> PrecisionPlan | None:
    """Return the plan of the paper's flow in the budget, else with the fewest bytes; None if it cannot be made.

    It needs the mutual information, and widths that nf4 and int8 take. Embeddings stay unpacked.
    """
    methods, layout = context.record(SensitivityRecord).methods, context.layout_of(context.reference)
    if MUTUAL_INFORMATION not in methods:
        return None
    groups = []
    for group in layout.groups:
        levels = (DENSE,) if group.name in (EMBEDDINGS, HEAD) else PAPER
        if any(refusals(level, group.linears, context.on_gpu) for level in levels):
            return None
        groups.append(replace(group, formats=levels))
    space = PlanSpace.of(replace(layout, groups=tuple(groups)), context.space.budget_bytes)
    if not space.is_feasible(space.smallest()):
        return space.smallest()
    values = methods[MUTUAL_INFORMATION].values.values()
    shares = [next(of[at] for of in values if of[at] is not None) for at in range(len(groups))]
    return seed_plan({**dict.fromkeys((*PAPER, DENSE), [0.0] * len(shares)), PAPER[0]: shares}, space)


def _unpruned_rises(context: Context, space: PlanSpace) -> Prior:
    """Predict the rise of the loss by every (group, format) of the base model from those of the pruned model."""
    measured = context.record(SensitivityRecord)
    method = next((name for name in SHARED if name in measured.methods), None)
    known: dict[str, dict[str, float]] = {}
    if method:
        for level, values in measured.methods[method].values.items():
            known[level] = {name: each for name, each in zip(measured.groups, values, strict=True) if each is not None}
    else:
        known = context.record(BankRecord).error
    names = (group.name for group in context.layout_of(context.reference).groups)
    name_of = dict(zip(names, context.base_groups_of(context.reference), strict=True))
    known = {level: {name_of[name]: value for name, value in of.items()} for level, of in known.items()}
    return {level: [_rise(known, name, level) for name in space.groups] for level in space.levels}


def _rise(known: Mapping[str, Mapping[str, float]], group: str, level: str) -> float:
    """Look up a predicted rise; where it was not measured, take another format's, or the mean of the other groups.

    Each bit less multiplies the squared error by four. Dense weights raise nothing.
    """
    if not format_of(level).is_packed:
        return 0.0
    for other in sorted(known, key=lambda name: name != level):
        if format_of(other).is_packed and known[other]:
            factor = math.pow(4.0, format_of(other).bits - format_of(level).bits)
            return factor * known[other].get(group, sum(known[other].values()) / len(known[other]))
    return 0.0
