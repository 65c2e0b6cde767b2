"""The plans to beat: the unpruned model, the paper's flow, and what a sensitivity or one format gives."""

from __future__ import annotations

from dataclasses import replace

from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls, unpruned_controls
from qpruner.plans.plan import UNPRUNED
from qpruner.plans.space import PlanSpace, SearchSpace


def test_unpruned_plans_and_the_papers_come_first(context: Context) -> None:
    """They are tried even if `search.max_trials` leaves no trial to others."""
    found = controls(context)
    assert [origin for origin, _ in found[:3]] == ["unpruned-uniform", "unpruned-knapsack", "paper"]
    assert {origin.partition("-")[0] for origin, _ in found[3:]} == {"seed", "uniform"}
    space = PlanSpace.of(context.layout_of(UNPRUNED), context.space.budget_bytes)
    for _, plan in found[:2]:
        assert plan.cut == UNPRUNED and plan.groups == space.groups
    assert set(found[2][1].formats) <= {"bf16", "nf4", "int8"} and context.space.is_feasible(found[2][1])


def test_a_control_that_no_budget_holds_is_its_smallest_plan(context: Context) -> None:
    tight = replace(context)
    tight.__dict__["space"] = SearchSpace((replace(context.space.spaces[0], budget_bytes=1),))
    [(origin, plan)] = unpruned_controls(tight)
    assert origin == "unpruned-uniform" and plan == context.layout_of(UNPRUNED).smallest()


def test_a_run_that_prunes_nothing_has_no_unpruned_control(context: Context) -> None:
    cuts = {UNPRUNED: context.inspection.cuts["cut-20"]}
    assert unpruned_controls(replace(context, inspection=replace(context.inspection, cuts=cuts))) == []


def test_a_base_of_other_widths_is_no_control(context: Context) -> None:
    """The cut may have made widths that a format takes, which those of the base are not."""
    first, *others = context.layout_of(UNPRUNED).groups[1:]
    narrow = replace(first, linears=tuple(replace(linear, columns=48) for linear in first.linears), formats=("nf4",))
    groups = (context.layout_of(UNPRUNED).groups[0], narrow, *others)
    odd = replace(context)
    odd._layouts[UNPRUNED] = replace(context.layout_of(UNPRUNED), groups=groups)
    assert unpruned_controls(odd) == []
