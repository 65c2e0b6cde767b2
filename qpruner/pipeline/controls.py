"""The plans that a search has to beat: what a user would do without a search, within the same bytes.

- `unpruned-uniform`, `unpruned-knapsack`: the base model in its best format, and its best plan, by a sensitivity;
- `CUT-uniform`, `CUT-knapsack`: the same of every cut;
- `paper`: the flow of the QPruner paper: a pruned model in nf4 and int8, chosen by mutual information.

The base and the paper's flow are tried with their fewest bytes if the budget cannot hold them; they cannot win.
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
from qpruner.search.choice import controls_of, seed_plan
from qpruner.search.searchers import Prior

Control = tuple[str, PrecisionPlan]
BEST_FIRST = ("kl", "fisher", "second_order", "loss", "first_order", MUTUAL_INFORMATION)
"""Sensitivities that may choose the plans of controls; the first that is measured does."""


def controls(context: Context) -> list[Control]:
    """List the controls of a run in the order in which they are tried."""
    found = []
    for cut in dict.fromkeys((UNPRUNED, *context.cuts)):
        layout = context.layout_of(cut)
        if any(refusals(level, group.linears, context.on_gpu) for group in layout.groups for level in group.formats):
            continue  # the base of a model whose cut takes other formats
        space = context.space_of(cut)
        if cut == UNPRUNED or space.is_feasible(space.smallest()):
            found += controls_of(space, _rises(context, space))
    paper = paper_plan(context)
    return [*found, *([("paper", paper)] if paper else [])]


def paper_plan(context: Context) -> PrecisionPlan | None:
    """Return the plan of the paper's flow on the least cut on which it fits; None if it cannot be made.

    It needs the mutual information, a cut, and widths that nf4 and int8 take. Embeddings stay unpacked. If it fits on
    no cut, it is the smallest plan of the most pruned one.
    """
    if MUTUAL_INFORMATION not in context.record(SensitivityRecord).methods:
        return None
    spaces = [space for cut in context.cuts if cut != UNPRUNED and (space := _paper_space(context, cut))]
    for space in spaces:
        if space.is_feasible(space.smallest()):
            shares: dict[str, float] = {}
            for of in _by_base_name(context, MUTUAL_INFORMATION).values():  # equal in all formats that a group takes
                shares |= of
            rises = [shares.get(name, 0.0) for name in space.base_groups]
            return seed_plan({**dict.fromkeys((*PAPER, DENSE), [0.0] * len(rises)), PAPER[0]: rises}, space)
    return spaces[-1].smallest() if spaces else None


def _paper_space(context: Context, cut: str) -> PlanSpace | None:
    """Return the plans of a cut in the paper's formats; None if a layer takes none of them."""
    layout = context.layout_of(cut)
    groups = []
    for group in layout.groups:
        levels = (DENSE,) if group.name in (EMBEDDINGS, HEAD) else PAPER
        if any(refusals(level, group.linears, context.on_gpu) for level in levels):
            return None
        groups.append(replace(group, formats=levels))
    return PlanSpace.of(replace(layout, groups=tuple(groups)), context.budget_bytes)


def _rises(context: Context, space: PlanSpace) -> Prior:
    """Predict the rise of the loss by every (group, format) of a cut from those of the reference cut."""
    measured = context.record(SensitivityRecord).methods
    known = _by_base_name(context, next((name for name in BEST_FIRST if name in measured), None))
    return {level: [_rise(known, name, level) for name in space.base_groups] for level in space.levels}


def _by_base_name(context: Context, method: str | None) -> dict[str, dict[str, float]]:
    """Map format and group, as the base model numbers blocks, to a sensitivity; without one to the weights' error."""
    names = context.space_of(context.reference).base_groups
    groups = [group.name for group in context.layout_of(context.reference).groups]
    if method is None:
        of_base = dict(zip(groups, names, strict=True))
        error = context.record(BankRecord).error
        return {level: {of_base[name]: value for name, value in of.items()} for level, of in error.items()}
    values = context.record(SensitivityRecord).methods[method].values.items()
    return {
        level: {name: each for name, each in zip(names, of, strict=True) if each is not None} for level, of in values
    }


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
