"""The fine-tunes of the final table: their plans, training seeds and jobs."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import with_keys
from made_records import made_finalist, made_search, made_trial
from searched_runs import (
    a_winner,
    folders,
    progress_of,
    rows_of,
    searched_record,
    with_records,
    with_winner,
)

from qpruner.config.load import validate_config
from qpruner.estimate.hours import num_compared
from qpruner.pipeline import preflight
from qpruner.pipeline.comparison import Comparison, final_jobs
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls
from qpruner.pipeline.evaluate import Evaluate, scores_digest
from qpruner.pipeline.finalists import finalist_job, further_seeds
from qpruner.pipeline.finetune import Finetune, final_job
from qpruner.pipeline.search import Search
from qpruner.pipeline.tuning import distinct, job_progress
from qpruner.plans.plan import PrecisionPlan, plan_of
from qpruner.runs.events import Event
from qpruner.runs.records import (
    GIVEN,
    SELECTION,
    FinetuneRecord,
    RowLosses,
    SearchRecord,
    SensitivityRecord,
)
from qpruner.search.choice import seed_plan
from qpruner.training.jobs import FineTuneJob, ProgressFile

# of the base one plan fits
CONTROLS = (
    "unpruned-uniform",
    "cut-20-uniform",
    "cut-20-knapsack",
    "paper",
)


def plans_of(jobs: Iterable[FineTuneJob]) -> list[tuple[int | None, PrecisionPlan]]:
    """List training seed and plan of each job."""
    return [(job.record.seed, plan_of(job.record)) for job in jobs]


def by_row(context: Context, search: SearchRecord) -> dict[str, list[FineTuneJob]]:
    """Return the jobs of the final table by row, after a search."""
    rows: dict[str, list[FineTuneJob]] = {}
    for job in final_jobs(with_records(context, search=search)):
        rows.setdefault(job.record.name, []).append(job)
    return rows


def test_random_plans_have_equal_bytes_and_all_seeds(
    context: Context, changed: Callable[[str, Any], Context]
) -> None:
    winner = a_winner(context)
    space = context.shapes.space.spaces[0]
    plans = plans_of(rows_of(context, winner)["random"])
    drawn = {plan for _, plan in plans}
    assert len(drawn) == 3 and winner not in drawn
    assert set(plans) == set(itertools.product((1, 2, 3), drawn)) and len(plans) == 9
    for plan in drawn:
        assert space.plan_bytes(plan) == pytest.approx(space.plan_bytes(winner), rel=0.01)
    one = changed("finetune.random_plans", 1)
    assert [seed for seed, _ in plans_of(rows_of(one, winner)["random"])] == [1, 2, 3]
    assert plans_of(rows_of(replace(context), winner)["random"]) == plans


def test_only_rows_of_the_claim_have_several_seeds(changed: Callable[[str, Any], Context]) -> None:
    context = changed("finetune.seeds", 2)
    best, plan = controls(context)[2]
    searched = searched_record(a_winner(context), {"unpruned-uniform": 2.1, best: 2.0})
    uniform, rival, winner = searched.finalists
    rival = made_finalist(rival.index, best, 2.0, cut=plan.cut, plan=plan.as_dict())
    searched = searched.model_copy(update={"finalists": (uniform, rival, winner)})
    found = by_row(context, searched)
    assert sum(len(jobs) for jobs in found.values()) <= 1 + num_compared(context.config), (
        "as `check` counts"
    )
    seeds = {name: {job.record.seed for job in jobs} for name, jobs in found.items()}
    assert {name for name, each in seeds.items() if each == {1, 2}} == {"random", "searched", best}
    assert {name for name, each in seeds.items() if each == {1}} == {
        "base",
        "pruned",
        *CONTROLS,
    } - {best}


def test_controls_that_the_winner_beat_get_no_fine_tune(context: Context) -> None:
    """A control within noise of the winner stays, and so do its rival and the paper's flow, however
    bad."""
    losses = {"unpruned-uniform": 2.4, "cut-20-knapsack": 1.91, "cut-20-uniform": 2.5, "paper": 3.0}
    searched = with_rows(context, searched_record(a_winner(context), losses))
    names = set(by_row(context, searched))
    assert names.intersection(CONTROLS) == {"cut-20-knapsack", "paper"}
    far = with_rows(
        context,
        searched_record(a_winner(context), {name: loss + 1 for name, loss in losses.items()}),
    )
    assert far.rival == 1, "the best control"
    names = set(by_row(context, far))
    assert names.intersection(CONTROLS) == {"cut-20-knapsack", "paper"}


def with_rows(context: Context, searched: SearchRecord) -> SearchRecord:
    """Give the finalists of a search losses that vary by row, and the controls their plans."""
    plans, noise = dict(controls(context)), (0.1, -0.2, 0.1, 0.0)
    found = []
    for position, each in enumerate(searched.finalists):
        loss = each.mean.loss
        rows = tuple(loss + noise[(row + position) % 4] for row in range(16))
        update: dict[str, Any] = {"losses": {SELECTION: RowLosses(mean=loss, by_row=rows)}}
        if each.control:
            update |= {"plan": plans[each.origin].as_dict(), "cut": plans[each.origin].cut}
        as_trial = each.as_trial.model_copy(update=update)
        found.append(each.model_copy(update={"fine_tunes": (as_trial,)}))
    return searched.model_copy(update={"finalists": tuple(found)})


def test_if_a_control_won_the_best_searched_plan_is_its_rival(
    changed: Callable[[str, Any], Context],
) -> None:
    context = changed("finetune.seeds", 2)
    won, plan = dict(controls(context))["cut-20-knapsack"], a_winner(context)
    fresh = (
        made_finalist(3, "gp", 2.0, cut=plan.cut, plan=plan.as_dict()),
        made_finalist(7, "cut-20-knapsack", 1.9, cut=won.cut, plan=won.as_dict()),
    )
    searched = made_search(won.as_dict(), digest="0" * 16, finalists=fresh)
    rows = by_row(context, searched)
    assert plans_of(rows["best searched"]) == [(1, plan), (2, plan)]
    assert {job.record.origin for job in rows["best searched"]} == {"gp, trial 3"}
    added = len(distinct(sum(rows.values(), list[FineTuneJob]()))) - 1
    assert added <= num_compared(context.config), "as `check` counts"


def in_formats(raw: dict[str, Any], context: Context, *formats: str, budget: int) -> Context:
    """Return the run with other formats for all groups, and a budget in bytes."""
    keys = {
        "quantize.bits": None,
        "quantize.formats": list(formats),
        "quantize.embeddings": ["q8_0"],
        "quantize.budget": {"bytes": budget},
        "finetune.seeds": 2,
    }
    config = validate_config(with_keys(raw, **keys))
    return replace(context, config=config, inspection=preflight.inspect(config))


def test_the_base_is_merged_and_rounded_to_the_largest_format_that_fits(
    context: Context, sensed_raw: dict[str, Any]
) -> None:
    offered = ("q4_0", "q5_1", "q8_0")
    base = in_formats(sensed_raw, context, *offered, budget=10**6).shapes.base
    sizes = {}
    for name in offered:
        formats = tuple("q8_0" if group.is_table else name for group in base.groups)
        sizes[name] = replace(base, method="scales").plan_bytes(base.plan(formats))
    for name, above in (("q4_0", "q5_1"), ("q5_1", "q8_0")):
        between = (sizes[name] + sizes[above]) // 2
        given = in_formats(sensed_raw, context, *offered, budget=between)
        smallest = given.shapes.space.spaces[0].smallest()
        rows = by_row(given, searched_record(smallest))
        merged = rows["merged"]
        assert [job.record.seed for job in merged] == [1, 2]
        assert [job.merges for job in merged] == rows["base"], "the adapters of the same fine-tunes"
        assert {job.record.plan_bytes for job in merged} == {sizes[name]}, "no adapter beside them"
        blocks = {group.name: group.is_table for group in base.groups}
        for job in merged:
            chosen = {job.record.plan[group] for group, is_table in blocks.items() if not is_table}
            assert chosen == {name} and job.record.is_merged
        added = len(distinct(sum(rows.values(), list[FineTuneJob]()))) - 1 - len(merged)
        assert added <= num_compared(given.config), "as `check` counts"


@pytest.mark.parametrize("formats", [("q4_0", "q8_0"), ("nf4", "int8")])
def test_a_merged_model_that_llama_cpp_cannot_serve_in_the_budget_has_no_row(
    formats: tuple[str, ...], context: Context, sensed_raw: dict[str, Any]
) -> None:
    base = in_formats(sensed_raw, context, *formats, budget=10**6).shapes.base
    smallest = replace(base, method="scales").plan_bytes(base.smallest())
    budget = smallest - 1 if "q4_0" in formats else 10**6
    given = in_formats(sensed_raw, context, *formats, budget=budget)
    rows = by_row(given, searched_record(given.shapes.space.spaces[0].smallest()))
    assert "merged" not in rows and len(rows["base"]) == 1


def test_seeds_that_chose_the_winner_do_not_judge_it(
    changed: Callable[[str, Any], Context],
) -> None:
    context = changed("search.confirm_seeds", 2)
    jobs = final_jobs(with_winner(context, a_winner(context)))
    found = {job.record.seed for job in jobs}
    assert len(further_seeds(context.config)) == 2
    assert {*further_seeds(context.config), context.config.seed}.isdisjoint(found)


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantize.bits": [4]}, None),
        ({"quantize.bits": [16]}, None),
        ({"search.plan": "mutual_information"}, "mutual_information"),
        ({"search.plan": "plan.yaml"}, None),
    ],
    ids=str,
)
def test_check_counts_the_fine_tunes_without_a_search(
    changes: dict[str, Any], method: str | None, context: Context, sensed_raw: dict[str, Any]
) -> None:
    """A given plan may equal the plan of another row."""
    config = validate_config(with_keys(sensed_raw, **changes))
    given, measured = replace(context, config=config), context.record(SensitivityRecord)
    space = given.shapes.space.spaces[0]
    methods = {
        name: each
        for name, each in measured.methods.items()
        if name in given.config.measured_methods
    }
    winner = a_winner(given) if config.quantize.has_choice else space.smallest()
    winner = seed_plan(methods[method].values, space) if method else winner
    measured = measured.model_copy(update={"methods": methods})
    given = with_records(
        given, search=searched_record(winner, {"given": 2.0}), sensitivity=measured
    )
    assert len(distinct(final_jobs(given))) - 1 <= num_compared(given.config) <= 19


def finetune_record(job: FineTuneJob) -> FinetuneRecord:
    """Make the record of stage finetune after this job."""
    return FinetuneRecord(digest="1" * 16, seconds=1.0, winner=job.record)


def test_equal_models_with_equal_fine_tunes_are_one_job(context: Context) -> None:
    """A winner that is a control shares the fine-tune of the row of that control."""
    winner = dict(controls(context))["cut-20-uniform"]
    rows, won = rows_of(context, winner), with_winner(context, winner)
    assert Finetune(won).job == rows["searched"][0]
    assert plans_of(rows["searched"]) == [(1, winner), (2, winner), (3, winner)]
    found = folders(rows)
    assert found["searched", 1] == found["cut-20-uniform", 1]
    assert len({found["searched", seed] for seed in (1, 2, 3)}) == 3
    assert found["base", 1] != found["pruned", 1]
    tuned = with_records(won, finetune=finetune_record(rows["searched"][0]))
    untuned = {job.folder for job in Evaluate(tuned).jobs[:-1]}
    assert Evaluate(tuned).jobs[-1].folder == found["searched", 1]
    assert len(untuned) == 3 and not untuned & set(found.values())


@pytest.mark.parametrize(
    ("origin", "title"),
    [
        ("gp", "searched"),
        ("cut-20-knapsack", "winner (20 % pruned, knapsack)"),
        (GIVEN, "given plan"),
    ],
)
def test_a_row_is_named_as_in_the_final_table(origin: str, title: str, context: Context) -> None:
    """Every message about a row uses its title in the table."""
    winner = a_winner(context)
    found_context = with_records(context, search=searched_record(winner, origin=origin))
    labels = [job.label for job in Comparison(found_context).jobs if job.record.name == "searched"]
    assert labels == [f"{title}, training seed {seed}" for seed in (1, 2, 3)]
    tuned = finetune_record(Finetune(found_context).job)
    jobs = Evaluate(with_records(found_context, finetune=tuned)).jobs
    untuned = [job.label for job in jobs[:-1]]
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
    plan = context.shapes.space.spaces[0].uniform("nf4")
    contexts = (context, changed(key, value))
    before, after = (final_job(each, "searched", "gp", plan, 0) for each in contexts)
    assert (before.folder == after.folder) == is_same


@pytest.mark.parametrize(
    ("search", "is_control", "origin"),
    [
        ("another", True, "cut-20-uniform"),
        ("another", False, "gp of another search"),
        ("this", False, "gp"),
    ],
)
def test_a_finalist_says_where_its_plan_comes_from(
    search: str, is_control: bool, origin: str, context: Context
) -> None:
    """A control is named as one, whichever search ran it: reports know it by its name."""
    stage = Search(context)
    job = replace(stage.search_job(), search="this")
    plan = dict(job.controls)["cut-20-uniform"] if is_control else a_winner(context)
    trial = made_trial(plan, search=search, origin="cut-20-uniform" if is_control else "gp")
    record = finalist_job(stage, trial, 0, job).record
    assert (record.name, record.origin) == (origin, origin)


def test_scores_of_finalists_depend_on_the_files_of_tasks(
    changed: Callable[[str, Any], Context],
) -> None:
    """Another prompt may be asked with the same questions."""
    search = {"metric": "accuracy", "tasks": ["qpruner_everyday_validation"], "limit": 2}
    context = changed("search", {"steps": 4, "first_rung": 1, **search})
    trial = made_trial(a_winner(context), search="this", origin="gp")

    def digest(files: list[str]) -> str:
        own = replace(context)
        own.__dict__["task_files"] = files
        stage = Search(own)
        return finalist_job(stage, trial, 0, stage.search_job()).scoring.digest

    assert digest(["prompt"]) == digest(["prompt"])
    assert digest(["prompt"]) != digest(["another prompt"])


def test_progress_is_written_before_any_fine_tune_has_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "candidates" / "0123" / "progress"
    ProgressFile(file).write(1, 1)
    assert file.read_text() == "1 1"


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


def test_held_out_tasks_are_no_input_of_trials(
    sensed_raw: dict[str, Any], context: Context
) -> None:
    def digests(**keys: Any) -> tuple[str, str]:
        about = {"search.tasks": ["qpruner_everyday_validation"], "search.limit": 4, **keys}
        config = validate_config(with_keys(sensed_raw, **about))
        found = replace(context, config=config, inspection=preflight.inspect(config))
        return Search(found).trials_digest, scores_digest(found)

    (trials, scores), *others = (
        digests(),
        digests(**{"evaluate.limit": 5}),
        digests(**{"search.limit": 5}),
    )
    assert [(trials == each[0], scores == each[1]) for each in others] == [
        (True, False),
        (False, True),
    ]
