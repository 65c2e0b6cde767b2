"""The plans that a search has to beat.

They are what a user would do without a search, within the same bytes.

- `unpruned-uniform`, `unpruned-knapsack`: the base model in its best format, and its best plan, by
  a sensitivity;
- `CUT-uniform`, `CUT-knapsack`: the same of every cut that may win;
- `paper`: the flow of the QPruner paper: a pruned model in nf4 and int8, chosen by mutual
  information.

The base and the paper's flow are tried with their fewest bytes if the budget cannot hold them; they
cannot win.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from qpruner.config.schema import MUTUAL_INFORMATION
from qpruner.models.layout import refusals
from qpruner.pipeline.context import Context
from qpruner.plans.plan import EMBEDDINGS, HEAD, UNPRUNED, PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.quantization.formats import DENSE, PAPER, format_of
from qpruner.runs.records import BankRecord, SensitivityRecord
from qpruner.search.choice import BEST_FIRST, controls_of, seed_plan

Control = tuple[str, PrecisionPlan]


def controls(context: Context) -> list[Control]:
    """List the controls of a run in the order in which they are tried.

    Those that cannot win come last, and leave at least one trial to a plan that can.
    """
    found, method = (
        [],
        next(
            (name for name in BEST_FIRST if name in context.record(SensitivityRecord).methods), None
        ),
    )
    for cut in dict.fromkeys((UNPRUNED, *context.cuts)):
        layout = context.layout_of(cut)
        if any(
            refusals(level, group.linears, context.on_gpu)
            for group in layout.groups
            for level in group.formats
        ):
            continue  # the base of a model whose cut takes other formats
        space = context.space_of(cut)
        if cut == UNPRUNED or (context.may_win(cut) and space.is_feasible(space.smallest())):
            found += controls_of(space, shared(context, method, space.base_groups, space.levels))
    if paper := paper_plan(context):
        found.append(("paper", paper))
    able = [each for each in found if _can_win(context, each[1])]
    others = [each for each in found if each not in able]
    return [*able, *others[: max(0, context.config.search.max_trials - max(1, len(able)))]]


def _can_win(context: Context, plan: PrecisionPlan) -> bool:
    """Return True if a plan is within the budget, by bytes and by multiply-adds."""
    return (
        context.may_win(plan.cut)
        and context.layout_of(plan.cut).plan_bytes(plan) <= context.budget_bytes
    )


def paper_plan(context: Context) -> PrecisionPlan | None:
    """Return the plan of the paper's flow on the least pruned cut on which it may win.

    None is returned if it cannot be made. It needs the mutual information, a cut, and widths that
    nf4 and int8 take. Embeddings stay unpacked. If it may win on no cut, it is the smallest plan of
    the most pruned one.
    """
    if MUTUAL_INFORMATION not in context.record(SensitivityRecord).methods:
        return None
    spaces = [
        space for cut in context.cuts if cut != UNPRUNED and (space := _paper_space(context, cut))
    ]
    for space in spaces:
        if context.may_win(space.cut) and space.is_feasible(space.smallest()):
            level = space.levels[0]  # the information is the same in all formats
            shares = shared(
                context, MUTUAL_INFORMATION, space.base_groups, (level,), factor_per_bit=1.0
            )[level]
            return seed_plan(
                {**dict.fromkeys((*PAPER, DENSE), [0.0] * len(shares)), PAPER[0]: shares}, space
            )
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
    return context.space_of(cut, replace(layout, groups=tuple(groups)))


def shared(
    context: Context,
    method: str | None,
    groups: Sequence[str],
    levels: Sequence[str],
    factor_per_bit: float = 4.0,
) -> dict[str, list[float]]:
    """Predict a sensitivity for groups of any cut: level -> by group.

    Without a `method`, the error of weights is predicted. Either was measured on the reference cut.
    `groups` are named as in the base model. A level that was not measured takes another's value,
    times `factor_per_bit` for each bit less (the squared error of rounding grows by four); a group
    that was not, the mean of the others. Unpacked weights raise nothing.
    """
    names = context.space_of(context.reference).base_groups
    known: dict[str, dict[str, float]] = {}
    if method is None:
        of_base = dict(
            zip(
                (group.name for group in context.layout_of(context.reference).groups),
                names,
                strict=True,
            )
        )
        for level, of in context.record(BankRecord).error.items():
            known[level] = {of_base[name]: value for name, value in of.items()}
    else:
        for level, values in context.record(SensitivityRecord).methods[method].values.items():
            known[level] = {
                name: each for name, each in zip(names, values, strict=True) if each is not None
            }

    def value(group: str, level: str) -> float:
        if not format_of(level).is_packed:
            return 0.0
        for other in sorted(known, key=lambda name: name != level):
            if format_of(other).is_packed and known[other]:
                factor = math.pow(factor_per_bit, format_of(other).bits - format_of(level).bits)
                return factor * known[other].get(
                    group, sum(known[other].values()) / len(known[other])
                )
        return 0.0

    return {level: [value(group, level) for group in groups] for level in levels}
