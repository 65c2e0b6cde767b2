"""The plans to beat: what one would do with the base model and with each cut, and the paper's flow."""

from dataclasses import replace

from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls, shared
from qpruner.pipeline.search import Search
from qpruner.plans.plan import UNPRUNED
from qpruner.runs.records import PruneRecord, SensitivityRecord


def in_budget(context: Context, size: int) -> Context:
    tight = replace(context)
    tight.__dict__["budget_bytes"] = size
    return tight


def test_each_cut_has_controls_and_the_paper_one(context: Context) -> None:
    found = controls(context)
    names = ["unpruned-uniform", "unpruned-knapsack", "cut-20-uniform", "cut-20-knapsack", "paper"]
    assert [origin for origin, _ in found] == names
    assert [plan.cut for _, plan in found] == [UNPRUNED, UNPRUNED, "cut-20", "cut-20", "cut-20"]
    *_, (_, knapsack), (_, paper) = found
    assert context.space.is_feasible(knapsack)
    assert set(paper.formats) <= {"bf16", "nf4", "int8"} and context.space_of("cut-20").plan_bytes(paper)


def test_controls_that_no_budget_holds_are_the_smallest(context: Context) -> None:
    """Those of the base and the paper's are tried all the same; those of a cut are not."""
    found = dict(controls(in_budget(context, 1)))
    assert found["unpruned-uniform"] == context.layout_of(UNPRUNED).smallest()
    assert list(found) == ["unpruned-uniform", "paper"]


def test_a_base_of_other_widths_is_no_control(context: Context) -> None:
    """The cut may have made widths that a format takes, which those of the base are not."""
    base = context.layout_of(UNPRUNED)
    first, *others = base.groups[1:]
    narrow = replace(first, linears=tuple(replace(linear, columns=48) for linear in first.linears), formats=("nf4",))
    odd = replace(context)
    odd._layouts[UNPRUNED] = replace(base, groups=(base.groups[0], narrow, *others))
    assert not [origin for origin, _ in controls(odd) if origin.startswith("unpruned")]


def test_a_cut_of_too_many_multiply_adds_may_not_win(context: Context) -> None:
    pruned = context.record(PruneRecord)
    share = pruned.cuts["cut-20"].multiply_adds / pruned.cuts[UNPRUNED].multiply_adds
    budget = context.config.quantize.budget.model_copy(update={"flops_fraction": share})
    quantize = context.config.quantize.model_copy(update={"budget": budget})
    limited = replace(context, config=context.config.model_copy(update={"quantize": quantize}))
    assert limited.may_win("cut-20") and not limited.may_win(UNPRUNED)
    assert limited.space.cuts == ("cut-20",)


def test_what_the_reference_measured_counts_for_groups_of_any_cut(context: Context) -> None:
    """A format that was not measured takes that of another, four times larger for each bit less."""
    space, values = context.space_of(context.reference), context.record(SensitivityRecord).methods["fisher"].values
    measured = shared(context, "fisher", space.base_groups, ("nf4", "bf16"))
    assert measured["nf4"][1:] == list(values["nf4"][1:]) and set(measured["bf16"]) == {0.0}
    [of_group] = shared(context, "fisher", space.base_groups[1:2], ("w3",))["w3"]
    assert of_group == 4 * values["nf4"][1]


def test_the_same_formats_of_another_cut_are_another_given_plan(context: Context) -> None:
    """Else the record of the first would be taken for that of the second."""
    plan, found = context.space.spaces[0].smallest(), set[str]()
    for cut in ("cut-20", UNPRUNED):
        given = replace(context)
        given.__dict__["plan_in_file"] = replace(plan, cut=cut)
        found.add(Search(given).digest)
    assert len(found) == 2
