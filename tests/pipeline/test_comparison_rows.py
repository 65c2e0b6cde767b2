"""The rows of the final table: their plans, training seeds and jobs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import with_keys
from searched_runs import a_winner, folders, progress_of, rows_of, searched_record, with_records, with_winner

from qpruner.config.load import validate_config
from qpruner.estimate.hours import num_compared
from qpruner.pipeline.comparison import Comparison
from qpruner.pipeline.comparison_rows import (
    candidates_for,
    distinct,
    job_progress,
    jobs_of,
    table_rows,
    untuned_candidates,
    winner_row,
)
from qpruner.pipeline.context import Context
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.events import Event
from qpruner.runs.records import GIVEN, SensitivityRecord
from qpruner.search.choice import seed_plan

CONTROLS = ("uniform-nf4", "uniform-int8", "paper", "unpruned-uniform", "unpruned-knapsack")


def test_seed_rows_are_the_best_of_the_winners_bytes(context: Context) -> None:
    """A seed plan may use only the bytes of the winner, for a fair comparison."""
    space, methods = context.space.spaces[0], context.record(SensitivityRecord).methods
    assert space.groups == context.record(SensitivityRecord).groups
    offered = [[space.levels[at] for at in levels] for levels in space.offered]
    every = [PrecisionPlan(space.groups, formats, space.cut) for formats in itertools.product(*offered)]

    def gain(plan: PrecisionPlan, method: str) -> float:
        low, high = (np.nan_to_num(np.array(methods[method].values[name], dtype=float)) for name in ("nf4", "int8"))
        return float((low - high) @ (np.array(plan.formats) == "int8"))

    below_budget = 0
    for winner in np.random.default_rng(0).choice(len(every), 6, replace=False):
        size = space.plan_bytes(every[winner])
        below_budget += size < space.budget_bytes
        found = rows_of(context, every[winner])
        assert found["searched"].plans == tuple((seed, every[winner]) for seed in (1, 2, 3))
        (seed,) = {plan for _, plan in found["best seed"].plans}
        assert space.plan_bytes(seed) <= size
        best = max(gain(plan, "fisher") for plan in every if space.plan_bytes(plan) <= size)
        assert gain(seed, "fisher") == pytest.approx(best)
    assert below_budget, "some winners must leave bytes unused for this to say anything"


@pytest.mark.parametrize(
    ("losses", "method"),
    [
        ({"uniform-nf4": 1.0, "seed-fisher": 2.0, "seed-mutual-information": 2.1}, "seed-fisher"),
        ({"uniform-nf4": 1.0, "seed-fisher": 2.2, "seed-mutual-information": 2.1}, "seed-mutual-information"),
        ({"uniform-nf4": 1.0}, None),
    ],
)
def test_the_best_seed_is_the_best_confirmed_one(
    losses: dict[str, float], method: str | None, context: Context
) -> None:
    found = rows_of(context, a_winner(context), losses)
    origins = {name: row.origin for name, row in found.items()}
    assert origins.get("best seed") == (f"{method} at the winner's bytes" if method else None)
    assert found["searched"].origin == "gp, trial 7"


def test_random_plans_have_equal_bytes_and_all_seeds(context: Context, changed: Callable[[str, Any], Context]) -> None:
    winner, space = a_winner(context), context.space.spaces[0]
    plans = rows_of(context, winner)["random"].plans
    drawn = {plan for _, plan in plans}
    assert len(drawn) == 3 and winner not in drawn
    assert set(plans) == set(itertools.product((1, 2, 3), drawn)) and len(plans) == 9
    for plan in drawn:
        assert space.plan_bytes(plan) == pytest.approx(space.plan_bytes(winner), rel=0.01)
    one = changed("finetune.random_plans", 1)
    assert [seed for seed, _ in rows_of(one, winner)["random"].plans] == [1, 2, 3]
    assert rows_of(replace(context), winner)["random"].plans == plans


def test_only_rows_of_the_claim_have_several_seeds(changed: Callable[[str, Any], Context]) -> None:
    context = changed("finetune.seeds", 2)
    found = rows_of(context, a_winner(context))
    assert sum(len(row.plans) for row in found.values()) <= 1 + num_compared(context.config), "as `check` counts"
    seeds = {name: {seed for seed, _ in row.plans} for name, row in found.items()}
    assert {name for name, each in seeds.items() if each == {1, 2}} == {"best seed", "random", "searched"}
    assert {name for name, each in seeds.items() if each == {1}} == {*("base", "pruned", *CONTROLS)}


def test_all_seed_plans_are_rows_on_request(changed: Callable[[str, Any], Context]) -> None:
    """The best seed plan has its own row, with all training seeds."""
    context = changed("finetune.seed_rows", "all")
    methods = ("mutual_information", "fisher", "kl")
    config = context.config
    sensitivity = config.sensitivity.model_copy(update={"methods": methods})
    context = replace(context, config=config.model_copy(update={"sensitivity": sensitivity}))
    measured = context.record(SensitivityRecord)
    fisher = measured.methods["fisher"]
    backwards = fisher.model_copy(update={"values": {bits: each[::-1] for bits, each in fisher.values.items()}})
    measured = measured.model_copy(update={"methods": {**measured.methods, "kl": backwards}})

    def seed_rows(best: str) -> dict[str, int]:
        searched = searched_record(a_winner(context), {f"seed-{best}": 2.0})
        rows = table_rows(with_records(context, search=searched, sensitivity=measured))
        assert sum(len(row.plans) for row in rows) <= 1 + num_compared(context.config), "as check counts"
        return {row.name: len(row.plans) for row in rows if row.origin.startswith("seed-")}

    information = "mutual-information seed"
    assert seed_rows("fisher") == {information: 1, "kl seed": 1, "best seed": 3}
    assert seed_rows("kl") == {information: 1, "fisher seed": 1, "best seed": 3}
    assert seed_rows("mutual-information") == {"fisher seed": 1, "kl seed": 1, "best seed": 3}


@pytest.mark.parametrize(
    ("changes", "method", "number"),
    [
        ({"quantize.bits": [4]}, None, 6),
        ({"quantize.bits": [16]}, None, 5),
        ({"search.plan": "mutual_information"}, "mutual_information", 18),
        ({"search.plan": "fisher", "finetune.seed_rows": "all"}, "fisher", 19),
        ({"search.plan": "plan.yaml"}, None, 19),
    ],
    ids=str,
)
def test_check_counts_the_fine_tunes_without_a_search(
    changes: dict[str, Any], method: str | None, number: int, context: Context, sensed_raw: dict[str, Any]
) -> None:
    """A given plan may equal the plan of another row, and no seed plan was confirmed."""
    config = validate_config(with_keys(sensed_raw, **changes))
    given, measured = replace(context, config=config), context.record(SensitivityRecord)
    space = given.space.spaces[0]
    methods = {name: each for name, each in measured.methods.items() if name in given.config.measured_methods}
    winner = a_winner(given) if config.quantize.has_choice else space.smallest()
    winner = seed_plan(methods[method].values, space) if method else winner
    measured = measured.model_copy(update={"methods": methods})
    given = with_records(given, search=searched_record(winner, {"given": 2.0}), sensitivity=measured)
    rows = table_rows(given)
    assert len(distinct(jobs_of(given, rows))) - 1 <= num_compared(given.config) == number


def test_equal_models_with_equal_fine_tunes_are_one_job(context: Context) -> None:
    """A winner that is a control shares the fine-tune of the row of that control."""
    winner = context.space.spaces[0].uniform("int8")
    rows = rows_of(context, winner)
    assert winner_row(with_winner(context, winner)) == replace(rows["searched"], plans=((1, winner),))
    found = folders(context, rows)
    assert found["searched", 1] == found["uniform-int8", 1]
    assert len({found["searched", seed] for seed in (1, 2, 3)}) == 3
    assert found["base", 1] != found["pruned", 1]
    untuned = {each.folder for each in untuned_candidates(context, winner)}
    assert len(untuned) == 3 and not untuned & set(found.values())


@pytest.mark.parametrize(
    ("found", "title"),
    [
        ({}, "searched"),
        ({"best_origin": "seed-fisher", "control_won": True}, "winner (seed-fisher)"),
        ({"best_origin": GIVEN}, "given plan"),
    ],
)
def test_a_row_is_named_as_in_the_final_table(found: dict[str, Any], title: str, context: Context) -> None:
    """Every message about a row uses its title in the table."""
    winner = a_winner(context)
    found_context = with_records(context, search=searched_record(winner).model_copy(update=found))
    labels = [job.label for job in Comparison(found_context).jobs if job.name == "searched"]
    assert labels == [f"{title}, training seed {seed}" for seed in (1, 2, 3)]
    untuned = [job.label for job in untuned_candidates(found_context, winner)]
    assert untuned == [f"{name} (no fine-tune)" for name in ("base", "pruned", title)]


@pytest.mark.parametrize(
    ("key", "value", "is_same"),
    [
        ("finetune.seeds", 5, True),
        ("evaluate.limit", 1, True),
        ("quantize.budget", {"fraction": 0.75}, True),
        ("finetune.steps", 5, False),
        ("training.learning_rate", 0.002, False),
        ("lora.dropout", 0.1, False),
    ],
)
def test_only_what_a_fine_tune_depends_on_repeats_it(
    key: str, value: Any, is_same: bool, context: Context, changed: Callable[[str, Any], Context]
) -> None:
    plan = context.space.spaces[0].uniform("nf4")
    contexts = (context, changed(key, value))
    before, after = (job for each in contexts for job in candidates_for(each, [("searched", plan, 0)]))
    assert (before.folder == after.folder) == is_same


def test_progress_of_workers_and_records_adds_up(context: Context, tmp_path: Path) -> None:
    """One of three jobs is finished; equal progress is emitted once, and half a file is ignored."""
    events: list[Event] = []
    signs = [tmp_path / "a", tmp_path / "b"]
    emit = job_progress(Comparison(replace(context, emit=events.append)), signs, 3, "answers")
    for a, b in ((None, None), ("2 8", None), ("2 8", None), ("8 8", "3"), ("8 8", "8 8")):
        for sign, text in zip(signs, (a, b), strict=True):
            if text:
                sign.write_text(text)
        emit()
    assert progress_of(events, "comparison") == {"answers": [(10, 24), (16, 24), (24, 24)]}
