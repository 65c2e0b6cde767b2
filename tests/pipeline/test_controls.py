"""Plans to beat: what one would do with the base model and with each cut, and the paper's flow."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import flip_a_byte
from made_records import made_finalist, made_search

from qpruner.errors import PlanRefused
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls, shared
from qpruner.pipeline.search import Search
from qpruner.pipeline.shapes import Shapes
from qpruner.plans.plan import UNPRUNED
from qpruner.runs.records import PruneRecord, SensitivityRecord, TrialRecord
from qpruner.search.trial_records import trial_path, write_trial


def in_budget(context: Context, size: int) -> Context:
    return with_shapes(context, replace(context.shapes), budget_bytes=size)


def with_shapes(context: Context, shapes: Shapes, **known: object) -> Context:
    """Return the run with other shapes, and with other values of what is derived from them."""
    shapes.__dict__.update(known)
    other = replace(context)
    other.__dict__["shapes"] = shapes
    return other


def test_each_cut_has_controls_and_the_paper_one(context: Context) -> None:
    found = controls(context)
    names = ["unpruned-uniform", "cut-20-uniform", "cut-20-knapsack", "paper"]
    assert [origin for origin, _ in found] == names, "of the base one plan fits, which is both"
    assert [plan.cut for _, plan in found] == [UNPRUNED, "cut-20", "cut-20", "cut-20"]
    *_, (_, knapsack), (_, paper) = found
    assert context.shapes.space.is_feasible(knapsack)
    assert set(paper.formats) <= {"bf16", "nf4", "int8"}
    assert context.shapes.space_of("cut-20").plan_bytes(paper)


def test_controls_that_no_budget_holds_are_the_smallest(context: Context) -> None:
    """Those of the base and the paper's are tried all the same; those of a cut are not."""
    found = dict(controls(in_budget(context, 1)))
    assert found["unpruned-uniform"] == context.shapes.base.smallest()
    assert list(found) == ["unpruned-uniform", "paper"]


def test_a_control_over_the_budget_takes_no_trial_of_a_plan_that_may_win(context: Context) -> None:
    """Such a search ended with an error: its only trial, finished, was over the budget."""
    least = context.shapes.layout_of("cut-20").plan_bytes(
        context.shapes.layout_of("cut-20").smallest()
    )
    for max_trials, expected in ((1, []), (20, ["unpruned-uniform"])):
        given = in_budget(context, least)
        search = given.config.search.model_copy(update={"max_trials": max_trials})
        given.config = given.config.model_copy(update={"search": search})
        size = {
            origin: given.shapes.layout_of(plan.cut).plan_bytes(plan)
            for origin, plan in controls(given)
        }
        over = [origin for origin, plan_bytes in size.items() if plan_bytes > least]
        assert len(over) < len(size)
        assert over == [*size][len(size) - len(over) :], "those over the budget come last"
        assert set(expected) <= set(over)
        assert expected or not over


def test_a_base_of_other_widths_is_no_control(context: Context) -> None:
    """The cut may have made widths that a format takes, which those of the base are not."""
    base = context.shapes.base
    first, *others = base.groups[1:]
    narrow = replace(
        first,
        linears=tuple(replace(linear, columns=48) for linear in first.linears),
        formats=("nf4",),
    )
    odd_base = replace(base, groups=(base.groups[0], narrow, *others))
    odd = with_shapes(context, replace(context.shapes, base=odd_base))
    assert not [origin for origin, _ in controls(odd) if origin.startswith("unpruned")]


def test_a_cut_of_too_many_multiply_adds_may_not_win(context: Context, tmp_path: Path) -> None:
    """It is not searched, has no controls, and is not the paper's cut.

    No plan of it can be given.
    """
    pruned = context.record(PruneRecord)
    shapes = context.shapes
    share = pruned.cuts["cut-20"].multiply_adds / pruned.cuts[UNPRUNED].multiply_adds
    budget = context.config.quantize.budget.model_copy(update={"flops_fraction": share})
    quantize = context.config.quantize.model_copy(update={"budget": budget})
    slow = replace(shapes.base, cut="cut-5")
    limited_shapes = replace(
        shapes,
        config=context.config.model_copy(update={"quantize": quantize}),
        cuts={"cut-5": shapes.cuts["cut-20"], **shapes.cuts},
        layouts={"cut-5": slow, **shapes.layouts},
        made={"cut-5": pruned.cuts[UNPRUNED], **pruned.cuts},
    )
    limited = with_shapes(context, limited_shapes)
    assert limited_shapes.may_win("cut-20")
    assert not limited_shapes.may_win(UNPRUNED)
    assert limited_shapes.space.cuts == ("cut-20",)
    found = dict(controls(limited))
    assert {plan.cut for plan in found.values()} == {UNPRUNED, "cut-20"}
    assert found["paper"].cut == "cut-20"
    plan = {"cut": "cut-5", "plan": slow.smallest().as_dict()}
    (file := tmp_path / "plan.json").write_text(json.dumps(plan))
    search = context.config.search.model_copy(update={"plan": str(file)})
    given = replace(
        limited_shapes, config=limited_shapes.config.model_copy(update={"search": search})
    )
    with pytest.raises(PlanRefused, match=r"got cut-5: .*, of cut-20"):
        _ = given.plan


def test_a_plan_of_the_base_can_be_given(context: Context, tmp_path: Path) -> None:
    """A control of it may win, though it is no candidate; without a name the plan is of the only
    candidate."""
    plan = context.shapes.base.smallest()
    (file := tmp_path / "plan.json").write_text(
        json.dumps({"cut": UNPRUNED, "plan": plan.as_dict()})
    )
    search = context.config.search.model_copy(update={"plan": str(file)})
    given = replace(context, config=context.config.model_copy(update={"search": search}))
    size = context.shapes.base.plan_bytes(plan)
    assert list(context.shapes.cuts) == ["cut-20"]
    assert in_budget(given, size).shapes.plan == plan
    file.write_text(json.dumps(plan.as_dict()))
    assert in_budget(given, size).shapes.plan == replace(plan, cut="cut-20")


@pytest.mark.parametrize("lost", [0, 1], ids=["own", "a finalist of another search"])
def test_a_search_that_lost_a_trial_runs_again(lost: int, context: Context) -> None:
    """Its number gets another plan."""
    search = Search(context)
    run_dir = context.run_dir
    about = {"origin": "gp", "plan": {}, "plan_bytes": 1, "mean_bits": 4.0, "status": "finished"}
    for index, of in enumerate((search.search_digest, "another")):
        fields = {"index": index, "digest": search.trials_digest, "search": of, **about}
        write_trial(search.folder, TrialRecord.model_validate(fields))
    finalists = (made_finalist(1, "gp", 2.0),)
    run_dir.write_record(
        "search",
        made_search({}, digest=search.digest, num_trials=1, finalists=finalists, best_index=1),
    )
    run_dir.stage("search").mkdir()
    search.begin()
    assert search.matching_record(search.digest)
    flip_a_byte(trial_path(search.folder, lost))
    search.begin()
    assert not search.matching_record(search.digest)
    for folder in (search.folder, run_dir.stage("search")):
        shutil.rmtree(folder)


def test_what_the_reference_measured_counts_for_groups_of_any_cut(context: Context) -> None:
    """A format that was not measured takes that of another, four times larger for each bit less."""
    space = context.shapes.space_of(context.shapes.reference.cut)
    values = context.record(SensitivityRecord).methods["fisher"].values
    measured = shared(context, "fisher", space.base_groups, ("nf4", "bf16"))
    assert measured["nf4"][1:] == list(values["nf4"][1:])
    assert set(measured["bf16"]) == {0.0}
    [of_group] = shared(context, "fisher", space.base_groups[1:2], ("w3",))["w3"]
    assert of_group == 4 * values["nf4"][1]


def test_the_same_formats_of_another_cut_are_another_given_plan(context: Context) -> None:
    """Else the record of the first would be taken for that of the second."""
    plan = context.shapes.space.spaces[0].smallest()
    found = set[str]()
    for cut in ("cut-20", UNPRUNED):
        given = with_shapes(context, replace(context.shapes), plan=replace(plan, cut=cut))
        found.add(Search(given).digest)
    assert len(found) == 2
