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

from qpruner.config.schema import MUTUAL_INFORMATION, RunConfig
from qpruner.models.layout import refusals
from qpruner.pipeline.context import Context
from qpruner.pipeline.shapes import Shapes
from qpruner.plans.plan import UNPRUNED, Group, PrecisionPlan
from qpruner.plans.space import PlanSpace
from qpruner.quantization.formats import DENSE, PAPER, format_of
from qpruner.runs.records import BankRecord, SensitivityRecord
from qpruner.search.choice import BEST_FIRST, best_uniform, controls_of, seed_plan

Control = tuple[str, PrecisionPlan]


def controls(context: Context) -> list[Control]:
    """List the controls of a run in the order in which they are tried.

    Those that cannot win come last, and leave at least one trial to a plan that can.
    """
    shapes = context.shapes
    measured = context.record(SensitivityRecord).methods
    method = next((name for name in BEST_FIRST if name in measured), None)
    plans: list[Control] = []
    for cut in dict.fromkeys((UNPRUNED, *shapes.cuts)):
        if not all(_takes(group, group.formats, shapes) for group in shapes.layout_of(cut).groups):
            continue  # the base of a model whose cut takes other formats
        space = shapes.space_of(cut)
        if cut == UNPRUNED or (shapes.may_win(cut) and space.is_feasible(space.smallest())):
            plans += controls_of(space, shared(context, method, space.base_groups, space.levels))
    paper = paper_plan(context)
    if paper:
        plans.append(("paper", paper))

    able = [control for control in plans if _can_win(shapes, control[1])]
    others = [control for control in plans if control not in able]
    num_left = context.config.search.max_trials - max(1, len(able))
    return [*able, *others[: max(0, num_left)]]


def _takes(group: Group, levels: Sequence[str], shapes: Shapes) -> bool:
    """Return True if all layers of a group take all these formats."""
    return not any(refusals(level, group.linears, shapes.on_gpu) for level in levels)


def _can_win(shapes: Shapes, plan: PrecisionPlan) -> bool:
    """Return True if a plan is within the budget, by bytes and by multiply-adds."""
    plan_bytes = shapes.layout_of(plan.cut).plan_bytes(plan)
    return shapes.may_win(plan.cut) and plan_bytes <= shapes.budget_bytes


def paper_plan(context: Context) -> PrecisionPlan | None:
    """Return the plan of the paper's method, or None if no cut can have one.

    The method prunes, then chooses nf4 or int8 for each group by mutual information, and leaves the
    embeddings unpacked. Of the cuts that have such a plan within the budget of bytes and
    multiply-adds, the least pruned is used. If no cut has one, the smallest such plan of the most
    pruned cut is returned, although it is over the budget.

    The unpruned model does not count as a cut here, nor does a cut with a layer that cannot take
    both formats. None is returned if no cut is left, or if mutual information was not measured.
    """
    if MUTUAL_INFORMATION not in context.record(SensitivityRecord).methods:
        return None
    shapes = context.shapes
    of_cuts = [_paper_space(shapes, cut) for cut in shapes.cuts if cut != UNPRUNED]
    spaces = [space for space in of_cuts if space]
    for space in spaces:
        if shapes.may_win(space.cut) and space.is_feasible(space.smallest()):
            level = space.levels[0]  # the information is the same in all formats
            information = shared(
                context, MUTUAL_INFORMATION, space.base_groups, (level,), factor_per_bit=1.0
            )
            rises = {name: [0.0] * len(space.groups) for name in (*PAPER, DENSE)}
            rises[PAPER[0]] = information[level]
            return seed_plan(rises, space)
    return spaces[-1].smallest() if spaces else None


def _paper_space(shapes: Shapes, cut: str) -> PlanSpace | None:
    """Return the plans of a cut in the paper's formats; None if a layer cannot take one of them."""
    layout = shapes.layout_of(cut)
    groups = []
    for group in layout.groups:
        levels = (DENSE,) if group.is_table else PAPER
        if not _takes(group, levels, shapes):
            return None
        groups.append(replace(group, formats=levels))
    return shapes.space_of(cut, replace(layout, groups=tuple(groups)))


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
    reference = context.shapes.reference
    names = context.shapes.base_groups_of(reference.cut)
    measured: dict[str, dict[str, float]] = {}
    if method is None:
        in_base = dict(zip(reference.names, names, strict=True))
        for level, errors in context.record(BankRecord).error.items():
            measured[level] = {in_base[name]: error for name, error in errors.items()}
    else:
        for level, values in context.record(SensitivityRecord).methods[method].values.items():
            by_group = zip(names, values, strict=True)
            measured[level] = {name: value for name, value in by_group if value is not None}
    packed = [level for level, values in measured.items() if values and format_of(level).is_packed]

    def value(group: str, level: str) -> float:
        if not packed or not format_of(level).is_packed:
            return 0.0
        nearest = level if level in packed else packed[0]
        values = measured[nearest]
        mean = sum(values.values()) / len(values)
        factor = math.pow(factor_per_bit, format_of(nearest).bits - format_of(level).bits)
        return factor * values.get(group, mean)

    return {level: [value(group, level) for group in groups] for level in levels}


def may_merge(config: RunConfig) -> bool:
    """Return True if one of the formats for blocks is llama.cpp's."""
    return any(format_of(name).ggml_type for name in config.quantize.levels)


def merged_plan(context: Context) -> PrecisionPlan | None:
    """Return the largest uniform plan of the base model in llama.cpp's formats, without an adapter.

    None is returned if no such plan fits the budget, or if a group is offered no such format.
    """
    shapes = context.shapes
    groups = tuple(_in_llama_cpp(group, shapes.on_gpu) for group in shapes.base.groups)
    if not (may_merge(context.config) and all(group.formats for group in groups)):
        return None
    layout = replace(shapes.base, groups=groups, method="scales")
    space = shapes.space_of(UNPRUNED, layout)
    plan = best_uniform(space)
    return plan if shapes.may_win(UNPRUNED) and space.is_feasible(plan) else None


def _in_llama_cpp(group: Group, on_gpu: bool) -> Group:
    """Offer a group only formats that GGUF files have; embeddings and head may stay unpacked."""

    def is_taken(name: str) -> bool:
        if not format_of(name).is_packed:
            return group.is_table
        return bool(format_of(name).ggml_type) and not refusals(name, group.linears, on_gpu)

    return replace(group, formats=tuple(filter(is_taken, group.formats)))
