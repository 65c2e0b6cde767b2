"""What the final table compares, under which training seeds, and that nothing of it is made twice."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import disk_of, flip_a_byte, raw_config, with_key
from made_records import made_confirmation, made_search

from qpruner.config.load import validate_config
from qpruner.data.encoding import load_encoded
from qpruner.errors import CorruptFile, StageError
from qpruner.estimate.hours import num_compared
from qpruner.pipeline import preflight
from qpruner.pipeline.comparison import Comparison
from qpruner.pipeline.context import Context
from qpruner.pipeline.evaluate import Evaluate, held_out_text, scores_digest
from qpruner.pipeline.finetune import Finetune, finetune_jobs, row_set_aside_if_damaged
from qpruner.pipeline.flow import recorded, run_stage
from qpruner.pipeline.run import run
from qpruner.pipeline.table_rows import (
    JobProgress,
    Row,
    candidates_for,
    distinct,
    gpus_held,
    jobs_of,
    table_rows,
    untuned_candidates,
    winner_row,
)
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.events import Event, Message, Progress, StageSkipped
from qpruner.runs.records import (
    GIVEN,
    CandidateRecord,
    EvalRecord,
    FinetuneRecord,
    Inference,
    InferenceSetting,
    PrepareRecord,
    Record,
    RowScores,
    SearchRecord,
    SensitivityRecord,
    TaskScore,
)
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import file_digest, write_json
from qpruner.sensitivity.seeds import seed_plan
from qpruner.training.table_rows import Evaluation, FinetuneOutcome, evaluate_candidate, finetune_candidate

MI_ROW = "mutual-information seed"


def ignore(event: Event) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def raw(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration whose run has got as far as the sensitivities."""
    raw = raw_config(tiny_model, tmp_path_factory.mktemp("finish") / "run")
    for key, value in (
        ("sensitivity.methods", ["mutual_information", "fisher"]),
        ("finetune.seeds", 3),
        ("finetune.random_plans", 3),
        ("evaluate.limit", 2),
    ):
        raw = with_key(raw, key, value)
    run(validate_config(raw), ignore, until="sensitivity")
    return raw


@pytest.fixture(scope="module")
def context(raw: dict[str, Any]) -> Context:
    config = validate_config(raw)
    context = Context(config, RunDir(Path(config.output)), ignore, None, preflight.inspect(config))
    recorded(context)
    return with_winner(context, a_winner(context))


@pytest.fixture
def changed(raw: dict[str, Any], context: Context) -> Callable[[str, Any], Context]:
    """The same run with another configuration."""
    return lambda key, value: replace(context, config=validate_config(with_key(raw, key, value)))


def searched_record(plan: PrecisionPlan, losses: dict[str, float] | None = None) -> SearchRecord:
    """A search that ended with `plan`; `losses` are those of its confirmed controls."""
    fresh = enumerate((losses or {"seed-fisher": 2.0}).items())
    confirmations = tuple(made_confirmation(index, origin, loss) for index, (origin, loss) in fresh)
    return made_search(plan.as_dict(), digest="0" * 16, confirmations=confirmations, best_control=0)


def with_winner(context: Context, winner: PrecisionPlan, losses: dict[str, float] | None = None) -> Context:
    """The run once a search has ended with `winner`."""
    return with_records(context, search=searched_record(winner, losses))


def with_records(context: Context, **records: Record) -> Context:
    return replace(context, records=context.records.model_copy(update=records))


def rows_of(context: Context, winner: PrecisionPlan, losses: dict[str, float] | None = None) -> dict[str, Row]:
    return {row.name: row for row in table_rows(with_winner(context, winner, losses))}


def a_winner(context: Context) -> PrecisionPlan:
    """A plan that is no control."""
    return context.space.plan_of([0, 1, 1, 0, 0, 1, 0, 0])


# Which plans


def test_the_seed_rows_are_the_best_seeds_of_the_winners_bytes(context: Context) -> None:
    """A seed plan with the whole budget against a winner that left bytes unused would be no fair comparison."""
    space, methods = context.space, context.record(SensitivityRecord).methods
    assert space.groups == context.record(SensitivityRecord).groups
    every = [PrecisionPlan(space.groups, bits) for bits in itertools.product((4, 8), repeat=len(space.groups))]

    def gain(plan: PrecisionPlan, method: str) -> float:
        rises = methods[method].values
        # More bits are never taken to be worse.
        worth = np.maximum(np.array(rises[4]) - np.array(rises[8]), 0.0)
        return float(worth @ (np.array(plan.bits) == 8))

    below_budget = 0
    for winner in np.random.default_rng(0).choice(len(every), 6, replace=False):
        size = space.plan_bytes(every[winner])
        below_budget += size < space.budget_bytes
        found = rows_of(context, every[winner])
        assert found["searched"].plans == tuple((seed, every[winner]) for seed in (1, 2, 3))
        for row, method in ((MI_ROW, "mutual_information"), ("best seed", "fisher")):
            (seed,) = {plan for _, plan in found[row].plans}
            assert space.plan_bytes(seed) <= size
            best = max(gain(plan, method) for plan in every if space.plan_bytes(plan) <= size)
            assert gain(seed, method) == pytest.approx(best)
    assert below_budget, "some winners must leave bytes unused for this to say anything"


@pytest.mark.parametrize(
    ("losses", "method"),
    [
        ({"uniform-4": 1.0, "seed-fisher": 2.0, "seed-mutual-information": 2.1}, "seed-fisher"),
        ({"uniform-4": 1.0, "seed-fisher": 2.2, "seed-mutual-information": 2.1}, "seed-mutual-information"),
        ({"uniform-4": 1.0}, None),
    ],
)
def test_the_best_seed_is_the_one_that_confirmed_best(
    losses: dict[str, float], method: str | None, context: Context
) -> None:
    found = rows_of(context, a_winner(context), losses)
    origins = {name: row.origin for name, row in found.items()}
    assert origins.get("best seed") == (f"{method} at the winner's bytes" if method else None)
    assert origins[MI_ROW] == "seed-mutual-information at the winner's bytes", "the paper's ablation stays"
    assert found["searched"].origin == "gp, trial 7"


@pytest.mark.parametrize("name", ["uniform-8", "seed-mutual-information"])
def test_a_seed_that_is_a_uniform_plan_ran_under_one_of_the_names(
    name: str, context: Context, raw: dict[str, Any]
) -> None:
    """Where all groups fit at their highest bits, every seed plan has them there."""
    everything = with_key(with_key(raw, "quantize.budget", {"fraction": 1.0}), "search.pareto", True)
    front = replace(context, config=validate_config(everything))
    found = rows_of(front, a_winner(context), {"uniform-4": 1.0, name: 2.0})
    assert found["best seed"].origin == "seed-mutual-information at the winner's bytes"
    assert "best seed" not in rows_of(front, a_winner(context), {"uniform-4": 1.0})


def test_every_random_plan_has_equal_bytes_and_every_training_seed(
    context: Context, changed: Callable[[str, Any], Context]
) -> None:
    winner, space = a_winner(context), context.space
    plans = rows_of(context, winner)["random"].plans
    drawn = {plan for _, plan in plans}
    assert len(drawn) == 3 and winner not in drawn
    assert set(plans) == set(itertools.product((1, 2, 3), drawn)) and len(plans) == 9
    for plan in drawn:
        assert space.plan_bytes(plan) == pytest.approx(space.plan_bytes(winner), rel=0.01)
    one = changed("finetune.random_plans", 1)
    assert [seed for seed, _ in rows_of(one, winner)["random"].plans] == [1, 2, 3]
    assert rows_of(replace(context), winner)["random"].plans == plans


def test_rows_of_the_claim_have_several_training_seeds_and_the_others_one(
    changed: Callable[[str, Any], Context],
) -> None:
    context = changed("finetune.seeds", 2)
    found = rows_of(context, a_winner(context))
    assert sum(len(row.plans) for row in found.values()) == 1 + num_compared(context.config), "as `check` counts"
    seeds = {name: {seed for seed, _ in row.plans} for name, row in found.items()}
    assert {name for name, each in seeds.items() if each == {1, 2}} == {"best seed", "random", "searched"}
    assert {name for name, each in seeds.items() if each == {1}} == {
        *("base", "pruned", "uniform 4-bit", "uniform 8-bit", MI_ROW)
    }


def test_every_seed_plan_is_a_row_where_all_are_asked_for(changed: Callable[[str, Any], Context]) -> None:
    """The best has its own row, under all training seeds."""
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
        shared = int(best == "mutual-information")  # that row's fine-tune is the best seed's first
        assert sum(len(row.plans) for row in rows) - shared == 1 + num_compared(context.config), "as check counts"
        return {row.name: len(row.plans) for row in rows if row.origin.startswith("seed-")}

    assert seed_rows("fisher") == {MI_ROW: 1, "kl seed": 1, "best seed": 3}
    assert seed_rows("kl") == {MI_ROW: 1, "fisher seed": 1, "best seed": 3}
    assert seed_rows("mutual-information") == {MI_ROW: 1, "fisher seed": 1, "kl seed": 1, "best seed": 3}


@pytest.mark.parametrize(
    ("changes", "method", "number"),
    [
        ({"quantize.bits": [4]}, None, 4),
        ({"quantize.bits": [16]}, None, 3),
        ({"search.plan": "mutual_information"}, "mutual_information", 15),
        ({"search.plan": "fisher"}, "fisher", 16),
        ({"search.plan": "fisher", "finetune.seed_rows": "all"}, "fisher", 16),
        ({"search.plan": "plan.yaml"}, None, 16),
    ],
    ids=str,
)
def test_check_counts_the_fine_tunes_without_a_search(
    changes: dict[str, Any], method: str | None, number: int, context: Context, raw: dict[str, Any]
) -> None:
    """The winner's own fine-tune is a row's, too, and no seed plan beside it was confirmed."""
    for key, value in changes.items():
        raw = with_key(raw, key, value)
    given, measured = replace(context, config=validate_config(raw)), context.record(SensitivityRecord)
    space = given.space
    methods = {name: each for name, each in measured.methods.items() if name in given.config.measured_methods}
    winner = space.plan_of([0, 1, 1, 0, 0, 1, 0, 0]) if len(space.levels) > 1 else space.uniform(space.levels[0])
    winner = seed_plan(methods[method].values, space) if method else winner
    measured = measured.model_copy(update={"methods": methods})
    given = with_records(given, search=searched_record(winner, {"given": 2.0}), sensitivity=measured)
    rows = table_rows(given)
    assert len(distinct(jobs_of(given, rows))) - 1 == num_compared(given.config) == number


def test_the_winner_comes_first_under_one_training_seed(context: Context) -> None:
    """Whatever is compared with it afterwards: its fine-tune is one of its row in the comparison."""
    winner = context.space.uniform(4)
    alone = winner_row(with_winner(context, winner))
    assert alone == Row("searched", "gp, trial 7", ((1, winner),))
    row = rows_of(context, winner)["searched"]
    assert (row.name, row.origin, row.plans[0]) == (alone.name, alone.origin, alone.plans[0])


@pytest.mark.parametrize(
    "settings", [{}, {"seeds": 5}, {"compare": False}, {"compare": False, "random_plans": 1}], ids=str
)
def test_what_is_compared_changes_nothing_of_the_winner(
    settings: dict[str, Any], context: Context, changed: Callable[[str, Any], Context]
) -> None:
    """`finetune` and `evaluate` of a finished run stay recorded when a comparison is added or taken away."""
    other = changed("finetune", {"steps": 4} | settings)
    assert Finetune(context).digest == Finetune(other).digest


# What is made once


def folders(context: Context, rows: dict[str, Row]) -> dict[tuple[str, int], Path]:
    """By row and training seed; of several random plans the last."""
    wanted = [(name, plan.as_dict(), seed) for name, row in rows.items() for seed, plan in row.plans]
    found = candidates_for(context, wanted)
    return {(name, seed): job.folder for (name, _, seed), job in zip(wanted, found, strict=True)}


def test_equal_models_with_equal_fine_tunes_are_one_job(context: Context) -> None:
    found = folders(context, rows_of(context, context.space.uniform(8)))
    assert found["searched", 1] == found["uniform 8-bit", 1]
    assert len({found["searched", seed] for seed in (1, 2, 3)}) == 3
    assert found["base", 1] != found["pruned", 1]
    untuned = {each.folder for each in untuned_candidates(context, context.space.uniform(8).as_dict())}
    assert len(untuned) == 3 and not untuned & set(found.values())


def test_the_base_row_has_the_model_that_lies_in_the_run(context: Context) -> None:
    """Wherever the run was when `prepare` wrote it."""
    prepared = context.record(PrepareRecord).model_copy(update={"model_path": "/gone/prepare/model", "converted": True})
    moved = with_records(context, prepare=prepared)
    base = untuned_candidates(moved, context.space.uniform(8).as_dict())[0]
    assert base.checkpoint == context.run_dir.root / "prepare" / "model"


@pytest.mark.parametrize(
    ("found", "title"),
    [
        ({}, "searched"),
        ({"best_origin": "seed-fisher", "control_won": True}, "winner (seed-fisher)"),
        ({"best_origin": GIVEN}, "given plan"),
    ],
)
def test_a_row_is_called_as_the_final_table_calls_it(found: dict[str, Any], title: str, context: Context) -> None:
    """In every line that tells of it while it is worked on."""
    winner = a_winner(context)
    found_context = with_records(context, search=searched_record(winner).model_copy(update=found))
    labels = [job.label for row, job in Comparison(found_context).jobs if row.name == "searched"]
    assert labels == [f"{title}, training seed {seed}" for seed in (1, 2, 3)]
    untuned = [job.label for job in untuned_candidates(found_context, winner.as_dict())]
    assert untuned == [f"{name} (no fine-tune)" for name in ("base", "pruned", title)]


def test_the_line_that_begins_the_fine_tune_says_why_its_loss_is_not_the_trials(context: Context) -> None:
    """It may be 0.3 worse than as a trial, after as many steps."""
    assert (
        Finetune(context)
        .detail()
        .endswith(", under another training seed than the trials', so its loss is not that of a trial")
    )


@pytest.mark.parametrize(
    ("key", "value", "is_same"),
    [
        ("finetune.save_steps", 1, True),
        ("finetune.seeds", 5, True),
        ("evaluate.limit", 1, True),
        ("quantize.budget", {"fraction": 0.75}, True),
        ("search.max_trials", 99, True),
        ("finetune.steps", 5, False),
        ("training.learning_rate", 0.002, False),
        ("lora.dropout", 0.1, False),
    ],
)
def test_a_fine_tune_is_made_again_only_for_what_changes_it(
    key: str, value: Any, is_same: bool, context: Context, changed: Callable[[str, Any], Context]
) -> None:
    plan = context.space.uniform(4).as_dict()
    contexts = (context, changed(key, value))
    before, after = (job for each in contexts for job in candidates_for(each, [("searched", plan, 0)]))
    assert (before.folder == after.folder) == is_same


def told(events: Sequence[Event], stage: str) -> list[str]:
    """Which rows a stage worked on."""
    messages = [event.text for event in events if isinstance(event, Message) and event.stage == stage]
    return [text.partition(":")[0] for text in messages]


def progress_of(events: Sequence[Event], stage: str) -> dict[str, list[tuple[int, int]]]:
    """What a stage counted, and how far it was."""
    found: dict[str, list[tuple[int, int]]] = {}
    for event in events:
        if isinstance(event, Progress) and event.stage == stage:
            found.setdefault(event.detail, []).append((event.done, event.total))
    return found


def test_what_workers_leave_adds_up_with_what_is_recorded(context: Context, tmp_path: Path) -> None:
    """One of three jobs was done before; nothing is told twice, and half a file is nothing."""
    events: list[Event] = []
    signs = [tmp_path / "a", tmp_path / "b"]
    progress = JobProgress(replace(context, emit=events.append), "evaluate", signs, 3, "answers")
    for a, b in ((None, None), ("2 8", None), ("2 8", None), ("8 8", "3"), ("8 8", "8 8")):
        for sign, text in zip(signs, (a, b), strict=True):
            if text:
                sign.write_text(text)
        progress.tell()
    assert progress_of(events, "evaluate") == {"answers": [(10, 24), (16, 24), (24, 24)]}


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_with_what_is_left(
    context: Context, changed: Callable[[str, Any], Context]
) -> None:
    """All fine-tunes but one were recorded before; what is recorded stands when seeds are taken away."""
    events: list[Event] = []
    one_plan, two_seeds = {"steps": 4, "random_plans": 1}, {"steps": 4, "random_plans": 1, "seeds": 2}
    whole, fewer = (replace(changed("finetune", each), emit=events.append) for each in (one_plan, two_seeds))
    jobs = folders(whole, rows_of(whole, a_winner(context)))
    seeds = {folder: seed for (_, seed), folder in jobs.items()}
    recorded = sorted(set(seeds) - {jobs["random", 2]})
    for number, folder in enumerate(recorded):
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_model.safetensors").touch()
        write_json(folder / "record.json", a_record(folder, seeds[folder], 2.0 + number))
    (recorded[0] / "checkpoints" / "checkpoint-4").mkdir(parents=True)  # its driver was killed just then

    def finetune_all(context: Context) -> list[CandidateRecord]:
        events.clear()
        return finetune_jobs(context, "comparison", Comparison(context).jobs)

    try:
        records = finetune_all(whole)
        assert not list(whole.run_dir.candidates.glob("*/checkpoints")), "what is recorded is not gone on from"
        assert told(events, "comparison") == ["random, training seed 2"]
        counted = progress_of(events, "comparison")
        assert list(counted) == ["steps"]
        assert counted["steps"][-1] == (4 * len(set(jobs.values())),) * 2, "those that were recorded are done"
        assert counted["steps"] == sorted(set(counted["steps"]))
        assert [(each.name, each.seed) for each in records] == list(jobs)
        for each in records:
            folder = jobs[each.name, each.seed]
            assert folder not in recorded or each.validation_loss == 2.0 + recorded.index(folder)

        weights = jobs["random", 2] / "adapter" / "adapter_model.safetensors"
        flip_a_byte(weights)
        mended = finetune_all(whole)
        assert told(events, "comparison") == ["warning", "random, training seed 2"], "only what was damaged"
        assert any(f"{weights} is damaged; set aside in " in str(event) for event in events)
        trained = next(each for each in mended if (each.name, each.seed) == ("random", 2))
        assert trained.adapter_sha256 == file_digest(weights)

        again = finetune_all(fewer)
        assert [(each.name, each.seed) for each in again] == [job for job in jobs if job[1] < 3]
        assert told(events, "comparison") == [], "nothing was trained again"
    finally:
        whole.close()
        for folder in set(jobs.values()):
            shutil.rmtree(folder)


@pytest.mark.slow
def test_the_winner_is_trained_and_scored_once(context: Context, changed: Callable[[str, Any], Context]) -> None:
    """Also where its adapter or the final folder is damaged, and where another final model could not be written."""
    events: list[Event] = []
    alone = replace(changed("finetune", {"steps": 4}), emit=events.append)
    [(_, job)] = Finetune(alone).jobs
    weights, final = (folder / "adapter_model.safetensors" for folder in (job.adapter, alone.run_dir.root / "final"))

    def messages() -> list[str]:
        events.clear()
        run_stage(Finetune(alone))
        return told(events, "finetune")

    try:
        assert messages() == ["searched, training seed 1"]
        counted = progress_of(events, "finetune")
        assert list(counted) == ["steps", "loading weights", "saving weights"]
        assert all(steps[-1][0] == steps[-1][1] and steps == sorted(set(steps)) for steps in counted.values())
        flip_a_byte(weights)
        assert messages() == ["warning", "searched, training seed 1"]
        written = file_digest(final)
        flip_a_byte(final)
        assert messages() == ["warning"] and file_digest(final) == written, "made again, nothing trained"
        assert messages() == [], "whole again"

        # A command that ends while it writes another final model must not leave the record of the one before.
        other = with_winner(alone, context.space.uniform(4))
        (stone := alone.run_dir.root / ".final").touch()
        with pytest.raises(FileExistsError):
            run_stage(Finetune(other))
        assert alone.run_dir.read_record("finetune", FinetuneRecord) is None
        stone.unlink()

        run_stage(Finetune(alone))
        scores = (TaskScore(task="arc", metric="acc", value=0.5, stderr=0.5, num_questions=1, correct=(1.0,)),)
        digest = scores_digest(alone)
        for each in untuned_candidates(alone, a_winner(context).as_dict()):
            write_json(
                each.folder / "scores.json", RowScores(digest=digest, name=each.name, seed=each.seed, scores=scores)
            )
        events.clear()
        run_stage(Evaluate(alone))
        scored = alone.record(EvalRecord)
        assert [(row.name, row.seed) for row in scored.rows] == [
            *(("base", None), ("pruned", None), ("searched", None)),
            ("searched", 1),
        ]
        assert scored.rows[0].scores == scored.rows[1].scores == scored.rows[2].scores == scores
        assert told(events, "evaluate") == ["searched, training seed 1", "1 model in turns"]
        counted = progress_of(events, "evaluate")
        assert counted["answers"][-1] == (32, 32), "of four models, two questions each with four answers"
        assert counted["memory and tokens a second"][-1] == (3, 3)
        assert [row.inference is None for row in scored.rows] == [True, True, True, False], (
            "only what is handed over is timed"
        )
        assert scored.text is None and scored.inference, "answers to questions have no perplexity"
        alone.run_dir.forget("evaluate")
        run_stage(Evaluate(alone))
        again_scored = alone.record(EvalRecord)
        assert [row.scores for row in again_scored.rows] == [row.scores for row in scored.rows]
        assert told(events, "evaluate")[2:] == ["1 model in turns"], "nothing was scored again"
        assert told(events, "finetune") == []
    finally:
        alone.close()


def test_gpu_seconds_are_those_of_every_fine_tune_and_every_evaluation(
    context: Context, changed: Callable[[str, Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows that are one model count once; the work is made up, and a job holds half a GPU for 8 seconds."""
    winner = context.space.uniform(8)  # a control
    context = with_winner(changed("training.learning_rate", 0.003), winner)
    context.__dict__["trial_resources"] = {"cpu": 1.0, "gpu": 0.5}

    def run_tasks(function: Any, jobs: Sequence[Any], resources: dict[str, float], *_: Any, **more: Any) -> Any:
        assert resources["gpu"] == 0.5
        for position, job in enumerate(jobs):
            if function is finetune_candidate:
                (job.candidate.adapter).mkdir(parents=True)
                (job.candidate.adapter / "adapter_model.safetensors").touch()
                yield position, FinetuneOutcome(8.0, 4, 2.0, 2.0, 2.0, (2.0,), 1, 1, "rss", "")
            elif function is evaluate_candidate:
                scores = (TaskScore(task="arc", metric="acc", value=0.5, stderr=0.5, num_questions=1, correct=(1.0,)),)
                yield position, Evaluation(scores, None, 8.0)
            else:
                more["on_held"](100.0)
                setting = InferenceSetting(device="a GPU", prompt_tokens=1, new_tokens=1, memory_counter="rss")
                taken = Inference(memory_bytes=1, prefill_tokens_per_second=(1.0,), decode_tokens_per_second=(1.0,))
                yield position, (setting, [taken] * len(job.candidates))

    monkeypatch.setattr("qpruner.cluster.tasks.run_tasks", run_tasks)
    monkeypatch.setattr(Context, "task_resources", lambda own, tasks, workers=1: (own.trial_resources, 1))
    monkeypatch.setattr("qpruner.pipeline.finetune.write_final", lambda job, cache, emit: None)
    try:
        for stage in (Finetune, Evaluate, Comparison):
            run_stage(stage(context))
        records = context.records
        tuned, scored, compared = records.finetune, records.evaluate, records.comparison
        assert tuned and scored and compared
        assert [each.gpu_seconds for each in tuned.candidates] == [4.0]
        assert tuned.gpu_seconds == pytest.approx(4.0, abs=0.1)
        untuned = len(untuned_candidates(context, winner.as_dict()))
        assert scored.gpu_seconds == pytest.approx(4.0 * (1 + untuned) + 100.0, abs=0.1)
        others = len({each.digest for each in compared.candidates}) - 1
        assert others < len(compared.candidates) - 1
        assert compared.gpu_seconds == pytest.approx(2 * 4.0 * others + 100.0, abs=0.1), "the winner's are told"
        assert gpus_held(context, 2) == 2.0, "workers of one model have whole GPUs"
    finally:
        for stage in (Finetune, Evaluate, Comparison):
            context.run_dir.forget(stage.name)


# The text that perplexity is measured on


def test_the_text_is_told_by_what_it_is(raw: dict[str, Any], tmp_path: Path) -> None:
    """Answers to questions are none; responses are, and so is a text that is named."""
    source = "package:qpruner/demo/data"
    text = {"source": f"{source}/questions_test.jsonl", "format": "text", "columns": {"text": "question"}}
    instructions = {"source": f"{source}/instructions.jsonl", "limit": 16}

    def found(name: str, **keys: Any) -> tuple[str | None, Path | None]:
        changed = with_key(raw, "output", str(tmp_path / name))
        for key, value in keys.items():
            changed = with_key(changed, key.replace("__", "."), value)
        config = validate_config(changed)
        run(config, ignore, until="prune")
        own = Context(config, RunDir(Path(config.output)), ignore, None, preflight.inspect(config))
        return held_out_text(own, tmp_path / f"{name}-text")

    assert found("questions") == (None, None)
    told, folder = found("text", evaluate__text=[text])
    assert folder and told == f"`evaluate.text` in {len(load_encoded(folder))} windows of 64 tokens"
    told, folder = found("responses", data__confirmation=[instructions], data__max_length=256)
    assert folder and told == f"the responses of the {len(load_encoded(folder))} confirmation rows that chose nothing"
    assert len(load_encoded(folder)) == 8, "half of 16"


@pytest.mark.slow
def test_the_final_folder_is_the_recorded_winners_and_whole(
    context: Context, changed: Callable[[str, Any], Context], tmp_path: Path
) -> None:
    events: list[Event] = []
    alone = replace(changed("finetune", {"steps": 4}), emit=events.append)
    first, second = a_winner(context), context.space.uniform(4)
    root = alone.run_dir.root
    weights, records = root / "final" / "model.safetensors", root / "records"
    try:
        run_stage(Finetune(with_winner(alone, first)))
        whole = weights.read_bytes()
        (root / "final" / "README.md").write_text("A card, which comes later.")
        events.clear()
        run_stage(Finetune(with_winner(alone, first)))
        assert [type(event) for event in events] == [StageSkipped]

        flip_a_byte(weights)
        run_stage(Finetune(with_winner(alone, first)))
        assert any(f"{weights} is damaged" in str(event) and "set aside in" in str(event) for event in events)
        assert weights.read_bytes() == whole and told(events, "finetune") == ["warning"], "no row is trained again"

        # Of another winner: ended before its record is written, as by a kill.
        records.rename(aside := tmp_path / "records")
        with disk_of("8m", records):
            shutil.copytree(aside, records, dirs_exist_ok=True)
            alone.run_dir.forget("finetune")
            with suppress(OSError), (records / "filler").open("wb", buffering=0) as filler:
                while filler.write(b"\0" * 4096):
                    pass
            with pytest.raises(StageError, match="no space left for"):
                run_stage(Finetune(with_winner(alone, second)))
            assert weights.read_bytes() != whole
            (records / "filler").unlink()
            run_stage(Finetune(with_winner(alone, first)))
            assert weights.read_bytes() == whole
        records.rmdir()
        aside.rename(records)
    finally:
        alone.close()


@pytest.mark.slow
def test_two_workers_fine_tune_what_one_does(changed: Callable[[str, Any], Context], raw: dict[str, Any]) -> None:
    """Through Ray Train, on packed 4- and 8-bit layers; in bfloat16, whose numbers have three digits, as does what both
    agree on."""
    found = {}
    for workers in (2, 1):
        whole = with_key(raw, "training.micro_batch_size", 2)
        config = validate_config(with_key(whole, "finetune", {"steps": 14, "save_steps": 4, "num_workers": workers}))
        context = replace(changed("finetune", {"steps": 14}), config=config)
        plan = a_winner(context)
        try:
            run_stage(Finetune(context))
            (found[workers],) = context.record(FinetuneRecord).candidates
        finally:
            context.close()
        [winner] = candidates_for(context, [("searched", plan.as_dict(), 1)])
        folder = winner.folder
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["adapter", "adapter.files.json", "owner.json", "progress", "record.json"]
        assert folder.joinpath("progress").read_text() == "14 14"
        assert not list(context.run_dir.root.glob(".scratch*"))
        shutil.rmtree(folder)
        context.run_dir.forget("finetune")
    one, two = found[1], found[2]
    assert two.digest == one.digest and two.steps == one.steps == 14
    assert two.measured_bytes == one.measured_bytes
    assert two.train_loss == pytest.approx(one.train_loss, rel=1e-3)
    assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-3)


def test_a_row_that_is_whole_seen_from_here_is_not_set_aside(tmp_path: Path) -> None:
    """The machine that could not read it may not see the storage; the row took hours."""
    run_dir = RunDir(tmp_path)
    folder = run_dir.candidates / "0123abcd"
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    write_json(folder / "record.json", a_record(folder, 1, 2.0))
    for is_there, told in ((True, "seen from the driver's machine it is whole"), (False, "set aside in")):
        if not is_there:
            weights.unlink()
        with pytest.raises(StageError) as caught, row_set_aside_if_damaged(run_dir, "evaluate"):
            raise CorruptFile(f"adapter {weights} cannot be read", weights)
        assert told in caught.value.cause and "repeat the command" in caught.value.remedy
        assert (folder / "record.json").exists() == is_there


def a_record(folder: Path, seed: int, loss: float) -> CandidateRecord:
    """As an earlier session left it for some row."""
    return CandidateRecord(
        digest=folder.name,
        seconds=1.0,
        name="",
        origin="",
        seed=seed,
        plan={},
        plan_bytes=1,
        measured_bytes=1,
        mean_bits=4.0,
        num_parameters=1,
        steps=4,
        train_loss=loss,
        validation_loss=loss,
        confirmation_loss=loss,
        peak_memory_bytes=1,
        memory_counter="rss",
    )
