"""The table and the claim under it: nobody may read a gain into the report that the measurements do not carry."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_records import made_confirmation, made_search
from recorded_runs import trial as recorded_trial
from scipy import stats

from qpruner.report import by_task, sections
from qpruner.report.card import model_card
from qpruner.report.claim import claim, comparisons
from qpruner.report.differences import Difference
from qpruner.report.legend import terms
from qpruner.report.marginal_effects import MarginalEffects
from qpruner.report.markdown import render
from qpruner.report.page.answer import tiles
from qpruner.report.results import BEST_SEED, RANDOM, SEARCHED, rows, title_of
from qpruner.report.results_json import summary_of
from qpruner.report.search_summary import search_text
from qpruner.report.sections import HEADINGS, cells, final_tables, steps
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import (
    GIVEN,
    BankRecord,
    CandidateRecord,
    Confirmation,
    EvalRecord,
    FinetuneRecord,
    FrontPoint,
    Inference,
    InferenceSetting,
    LayerWidths,
    MethodScores,
    PrepareRecord,
    PruneRecord,
    Results,
    RowScores,
    RungResult,
    RunState,
    SensitivityRecord,
    TaskScore,
    TrialRecord,
)

PLAN = {"layers.0": 8, "layers.1": 4}
SEED_PLAN = {"layers.0": 4, "layers.1": 8}
STAGE = {"digest": "0" * 16, "seconds": 1.5}
SAME = "not distinguishable"
UNTUNED = ("base", "pruned", "searched")
ORIGINS = {SEARCHED: "gp, trial 11", BEST_SEED: "seed-kl at the winner's bytes", RANDOM: "3 random plans"}
NO_EFFECTS = "32 effects and a constant need 50 finished trials, 1.5 for each, got 7"
STATE = RunState(
    config={"quantize": {"budget": {"fraction": 0.5, "bytes": None}}},
    until="report",
    command="qpruner run my.yaml",
    folder="/home/me",
    environment={},
    host="here",
    pid=1,
    started=0.0,
    updated=0.0,
    outcome="done",
)


def candidate(
    name: str,
    plan: dict[str, int],
    measured_bytes: int = 100_000_000,
    seed: int = 0,
    validation_loss: float = 2.125,
    confirmation_loss: float = 2.0,
) -> CandidateRecord:
    return CandidateRecord(
        **STAGE,
        name=name,
        origin=ORIGINS.get(name, "unquantized" if name in ("base", "pruned") else "uniform"),
        seed=seed,
        plan=plan,
        plan_bytes=measured_bytes,
        measured_bytes=measured_bytes,
        mean_bits=sum(plan.values()) / len(plan),
        num_parameters=120_000_000,
        steps=40,
        train_loss=1.9,
        validation_loss=validation_loss,
        confirmation_loss=confirmation_loss,
        peak_memory_bytes=900_000_000,
        memory_counter="rss",
    )


def score(
    correct: Sequence[float], answer_loss: Sequence[float] = (), task: str = "arc", metric: str = "acc"
) -> TaskScore:
    value = sum(correct) / len(correct)
    stderr = math.sqrt(value * (1 - value) / (len(correct) - 1)) if len(correct) > 1 else math.nan
    return TaskScore(
        task=task,
        metric=metric,
        value=value,
        stderr=stderr,
        num_questions=len(correct),
        correct=tuple(correct),
        answer_loss=tuple(answer_loss),
    )


def answers(num_questions: int, num_correct: int) -> list[float]:
    return [1.0] * num_correct + [0.0] * (num_questions - num_correct)


Scored = tuple[CandidateRecord, tuple[TaskScore, ...]]


def results_of(
    scored: Sequence[Scored], untuned: Sequence[tuple[str, tuple[TaskScore, ...]]] = (), **changes: Any
) -> Results:
    """A finished run whose rows are `scored`, the searched one last; `changes` are of the search's record."""
    search: dict[str, Any] = {
        **STAGE,
        "num_trials": 16,
        "num_finished": 7,
        "num_stopped": 8,
        "num_taken_over": 5,
        "ended": "all 16 trials were spent (`search.max_trials`)",
        "confirmations": (
            made_confirmation(2, "seed-kl", 2.125, taken_over=True),
            made_confirmation(11, "gp", 2.0625, stderr=0.03125),
        ),
        "best_index": 11,
        "resumed": 3,
        "sessions": 2,
        "failures": {"diverged": 1},
    }
    rows_scored = [RowScores(digest="0", name=name, seed=None, scores=scores) for name, scores in untuned]
    rows_scored += [RowScores(digest="0", name=row.name, seed=row.seed, scores=scores) for row, scores in scored]
    return Results(
        prepare=PrepareRecord(**STAGE, model_path="/models/base", converted=False, num_rows={"train": 48}),
        prune=PruneRecord(
            **STAGE,
            importance="taylor",
            selection="global",
            compensation="none",
            target="target 20.00% of all parameters",
            target_rate=0.2,
            achieved_rate=0.1984,
            parameters_before=150_000_000,
            parameters_after=120_240_000,
            bytes_before=300_000_000,
            bytes_after=240_480_000,
            peak_memory_bytes=0,
            memory_counter="none",
            dropped_blocks=(),
            layers=(
                LayerWidths(
                    layer=0,
                    kept_kv_groups=(0,),
                    kept_mlp_channels=(0, 1),
                    base_kv_groups=2,
                    base_mlp_channels=4,
                    heads_per_group=1,
                    base_parameters=60,
                    kept_parameters=30,
                ),
            ),
        ),
        sensitivity=SensitivityRecord(
            **STAGE,
            groups=tuple(PLAN),
            methods={
                "kl": MethodScores(
                    unit="nats",
                    source="one group at a time",
                    values={4: (0.5125, 0.25), 8: (0.0125, 0.0)},
                    seconds=12.5,
                    details={},
                )
            },
        ),
        search=made_search(scored[-1][0].plan, **(search | changes)),
        finetune=FinetuneRecord(**STAGE, winner=SEARCHED, candidates=tuple(row for row, _ in scored)),
        evaluate=EvalRecord(**STAGE, rows=tuple(rows_scored)),
    )


def snapshot(results: Results, effects: MarginalEffects | str = NO_EFFECTS, **state: Any) -> Snapshot:
    """A run with these records and no trials; `state` changes what its latest command did."""
    return Snapshot("demo", STATE.model_copy(update=state), results, (), effects)


def row_of(
    name: str,
    losses: Sequence[float],
    scores: Sequence[TaskScore] | None = None,
    plan: dict[str, int] = SEED_PLAN,
    measured_bytes: int = 100_000_000,
) -> list[Scored]:
    """A row under as many training seeds as it has confirmation losses; without scores they all answer alike."""
    scores = scores or [score(answers(50, 20), [1.0] * 50)] * len(losses)
    return [
        (candidate(name, plan, measured_bytes, seed, confirmation_loss=loss), (scored,))
        for seed, (loss, scored) in enumerate(zip(losses, scores, strict=True))
    ]


def searched_row(losses: Sequence[float], scores: Sequence[TaskScore] | None = None, **changes: Any) -> list[Scored]:
    return row_of(SEARCHED, losses, scores, **({"plan": PLAN} | changes))


def random_rows(losses: Sequence[float], by_plan: Sequence[float]) -> list[Scored]:
    """As many random plans as there are distances from these losses, each under as many training seeds."""
    plans = [{"layers.0": 4, "layers.1": bits} for bits in (4, 8, 16)]
    return [
        scored
        for plan, off in zip(plans, by_plan, strict=False)
        for scored in row_of(RANDOM, [loss + off for loss in losses], plan=plan)
    ]


def line_about(results: Results, other: str) -> str:
    """The claim's line about a row."""
    begins = {BEST_SEED: "- Against the best seed", RANDOM: "- Against random plans"}[other]
    (line,) = [line for line in claim(results).splitlines() if line.startswith(begins)]
    return line


def difference(results: Results, measure: str, other: str = BEST_SEED) -> Difference:
    (compared,) = [each for each in comparisons(results) if each.other == other]
    (found,) = [each for each in compared.differences if each.measure == measure]
    return found


# What is no claim


def test_the_first_figures_of_a_run_without_comparison_are_base_and_pruned_as_they_are() -> None:
    """An accuracy alone says nothing; what was measured has no fine-tune, and the run's owner can ask for more."""
    untuned = [(name, (score(answers(40, right)),)) for name, right in zip(UNTUNED, (25, 24, 20), strict=True)]
    run = snapshot(results_of(searched_row([1.0]), untuned))
    by_heading = {tile.heading: tile.lines for tile in tiles(run)}
    accuracy = by_heading["Test acc"]
    assert accuracy[1:3] == ("base, not fine-tuned: 0.625", "pruned, not fine-tuned: 0.600")
    assert "finetune.compare gives other plans the same fine-tune" in by_heading["How sure, on fresh rows"]
    tuned = [*row_of("base", [1.0]), *row_of("pruned", [1.0]), *searched_row([1.0])]
    compared = snapshot(results_of(tuned, untuned))
    assert not any("not fine-tuned" in line for tile in tiles(compared) for line in tile.lines)


def test_a_card_gives_its_readers_no_task_of_the_owner() -> None:
    config = {"model": {"source": "me/base"}, "data": {"train": []}}
    run = snapshot(results_of(searched_row([1.0])), config=config, environment={"qpruner": "1.2"})
    assert "nothing is claimed" in model_card(run, None) and "finetune.compare" not in model_card(run, None)


def test_a_search_that_returns_the_seed_says_so_whatever_the_scores() -> None:
    """The rows share their fine-tunes; were they made apart, noise must still not look like a gain."""
    results = results_of([*row_of(BEST_SEED, [2.0, 2.1], plan=PLAN), *searched_row([1.0, 1.1])])
    line = line_about(results, BEST_SEED)
    assert "it is the winner's plan itself, so there is no gain to claim" in line
    assert "better" not in line and "loss" not in line


@pytest.mark.parametrize(
    ("other_bytes", "told"), [(101_100_000, "1.1% more"), (98_900_000, "1.1% fewer"), (150_000_000, "50.0% more")]
)
@pytest.mark.parametrize("other", [BEST_SEED, RANDOM])
def test_other_bytes_are_no_comparison_in_either_direction(other_bytes: int, told: str, other: str) -> None:
    plans = (SEED_PLAN, {"layers.0": 4, "layers.1": 16})[: 2 if other == RANDOM else 1]
    rivals = [each for plan in plans for each in row_of(other, [2.0, 2.1], plan=plan, measured_bytes=other_bytes)]
    results = results_of([*rivals, *searched_row([1.0, 1.1])])
    line = line_about(results, other)
    assert "no claim at equal bytes" in line
    assert told in line
    assert "better" not in line and "loss" not in line
    (compared,) = [each for each in comparisons(results) if each.other == other]
    assert not compared.differences


@pytest.mark.parametrize("other_bytes", [101_000_000, 99_000_000])
def test_a_percent_either_way_counts_as_equal_bytes(other_bytes: int) -> None:
    results = results_of([*row_of(BEST_SEED, [2.0], measured_bytes=other_bytes), *searched_row([1.0])])
    assert f"({ORIGINS[BEST_SEED]}, {other_bytes / 1e8 - 1:+.2%} bytes)" in line_about(results, BEST_SEED)
    assert "no claim" not in line_about(results, BEST_SEED)


def test_one_random_plan_of_other_bytes_spoils_the_comparison() -> None:
    fine = row_of(RANDOM, [2.0, 2.1])
    off = row_of(RANDOM, [2.0, 2.1], plan={"layers.0": 4, "layers.1": 16}, measured_bytes=97_000_000)
    assert "no claim at equal bytes" in line_about(results_of([*fine, *off, *searched_row([1.0, 1.1])]), RANDOM)


def test_rows_that_are_not_there_are_missed_aloud() -> None:
    only_random = results_of([*row_of(RANDOM, [2.0]), *searched_row([1.0])])
    assert line_about(only_random, BEST_SEED).endswith("no claim, no seed plan was confirmed.")
    given = results_of([*row_of(RANDOM, [2.0]), *searched_row([1.0])], best_origin=GIVEN)
    assert line_about(given, BEST_SEED).endswith(
        "no claim, a plan was given, and no seed plan of this budget has finished in this folder."
    )


@pytest.mark.parametrize("origin", ["uniform-4", "seed-kl"])
def test_a_control_that_no_searched_plan_beat_is_named_as_what_is_returned(origin: str) -> None:
    scored = [*row_of(BEST_SEED, [2.0]), *searched_row([1.0])]
    results = results_of(scored, best_origin=origin, control_won=True)
    text, title = claim(results), f"winner ({origin})"
    assert text.startswith(f"No searched plan beat the best control on fresh rows: the control {origin} (100.00 MB)")
    assert f"in the row `{title}`." in text
    assert [row.name for row in rows(results)] == [BEST_SEED, SEARCHED], "programs find it as ever"
    assert [cells(row)[0] for row in rows(results)] == [BEST_SEED, title]
    assert title in by_task.table(results)[1][-1] and title in steps(results)[1][-1][0]
    assert "control" not in claim(results_of(scored))
    assert claim(results_of(scored)).startswith("Searched: gp, trial 11, 100.00 MB.")


def test_a_plan_that_was_given_is_not_called_searched() -> None:
    results = results_of([*row_of(BEST_SEED, [2.0]), *searched_row([1.0])], best_origin=GIVEN)
    assert claim(results).startswith("Given plan: ")
    assert cells(rows(results)[-1])[0] == "given plan"
    alone = made_search(PLAN, best_origin=GIVEN, confirmations=(made_confirmation(7, GIVEN, 2.0),))
    assert search_text(alone, ())[1].startswith(
        "Trial 7 is the plan that was given, the only one scored on fresh rows; "
    )
    assert search_text(alone, ())[0].startswith("a given plan on loss, "), "no searcher chose it"
    beside = made_search(PLAN, best_origin=GIVEN)
    assert "given, scored on fresh rows beside 1 control that a search had tried; " in search_text(beside, ())[1]


@pytest.mark.parametrize("origin", ["uniform-4", "seed-mutual-information"])
def test_a_given_plan_that_has_a_name_is_told_by_it(origin: str) -> None:
    """Of one bit-width, or of a sensitivity that `search.plan` names."""
    given = made_search(PLAN, best_origin=GIVEN, confirmations=(made_confirmation(7, origin, 2.0),))
    assert title_of(SEARCHED, given) == f"given plan ({origin})"


@pytest.mark.parametrize(
    ("metric", "ours", "theirs", "told"),
    [
        ("loss", (2.0625, 2.4), (2.125, 2.5), "Its selection loss is 2.0625, that of the best control 2.1250"),
        ("accuracy", (0.7, 0.6), (0.65, 0.5), "Its selection accuracy is 0.7000, that of the best control 0.6500"),
    ],
)
def test_the_winner_is_told_with_its_margin_and_with_who_had_the_better_score(
    metric: str, ours: tuple[float, float], theirs: tuple[float, float], told: str
) -> None:
    """Fresh rows choose; without a reason the winner looks like a mistake beside a trial that scored better."""

    def fresh(index: int, origin: str, value: float) -> Confirmation:
        return made_confirmation(index, origin, value, accuracy=value, accuracy_stderr=0.1)

    def trial(index: int, value: float) -> TrialRecord:
        rung = RungResult(step=8, loss=value, accuracy=value, train_loss=value)
        return recorded_trial(index, "444444", [value] * 3, rungs=(rung,))

    finalists = (fresh(2, "seed-kl", theirs[0]), fresh(3, "seed-fisher", theirs[1]), fresh(7, "gp", ours[0]))
    better = ours[1] - 0.1 if metric == "loss" else ours[1] + 0.1
    search = made_search(PLAN, metric=metric, confirmations=(*finalists, fresh(9, "gp", ours[1])))
    trials = [trial(2, ours[1]), trial(7, ours[1]), trial(9, better)]
    errors = f"{'0.0625 and 0.0625' if metric == 'loss' else '0.1000 and 0.1000'}, over the same "
    errors += "rows)" if metric == "loss" else "questions)"
    margin = f"{told} (trial 2, seed-kl): a margin of {abs(ours[0] - theirs[0]):.4f} (standard errors {errors}."
    first = f"Trial 9 had the best score as a trial ({better:.4f}, trial 7 {ours[1]:.4f}), but {ours[1]:.4f} on fresh"
    assert search_text(search, trials)[1] == (
        f"On fresh rows trial 7 (gp) was best, a searched plan. {margin} {first} rows."
    )
    assert search_text(search, trials[:2])[1].endswith(margin), "no finalist scored better"
    alone = made_search(PLAN, metric=metric, confirmations=finalists[-1:])
    assert search_text(alone, trials)[1].endswith("was best, a searched plan."), "there was no control"


def test_a_control_that_won_is_told_with_its_margin_over_searched_plans() -> None:
    won = {"best_index": 2, "best_origin": "seed-kl", "control_won": True}
    finalists = (
        made_confirmation(2, "seed-kl", 2.0),
        made_confirmation(7, "gp", 2.5),
        made_confirmation(8, "gp", 2.25),
    )
    told = search_text(made_search(PLAN, **won, confirmations=finalists), ())[1]
    assert told.endswith(
        "Its selection loss is 2.0000, that of the best searched plan 2.2500 (trial 8, gp): a margin of 0.2500 "
        "(standard errors 0.0625 and 0.0625, over the same rows)."
    )


def test_a_margin_is_told_with_the_error_of_its_rows_where_they_are_known() -> None:
    """Rows are hard and easy for all: their spread is far larger than that of the differences by row."""
    control, best = np.array([1.0, 3.0, 2.0, 6.0]), np.array([0.9, 2.7, 1.9, 5.5])
    finalists = [
        made_confirmation(index, origin, float(rows.mean()), losses=tuple(rows))
        for index, origin, rows in ((2, "seed-kl", control), (7, "gp", best))
    ]
    error = float((control - best).std(ddof=1) / 2)
    told = search_text(made_search(PLAN, confirmations=tuple(finalists)), ())[1]
    assert told.endswith(f"a margin of 0.2500 (standard error {error:.4f}, paired over 4 rows).")
    near = control - np.array([0.3, -0.1, 0.2, -0.1])
    unsure = (finalists[0], finalists[1].model_copy(update={"losses": tuple(near), "loss": float(near.mean())}))
    assert search_text(made_search(PLAN, confirmations=unsure), ())[1].endswith("over 4 rows, so it may be chance).")
    older = (finalists[0], finalists[1].model_copy(update={"losses": ()}))
    assert "(standard errors 0.0625 and 0.0625, " in search_text(made_search(PLAN, confirmations=older), ())[1]


def test_finalists_stand_beside_the_winner_row_by_row() -> None:
    """Their own errors say that nothing differs; most of them is which rows there are."""
    rows_of = {2: np.array([1.0, 3.0, 2.0, 6.0]), 3: np.array([1.1, 3.3, 2.1, 6.1]), 7: np.array([0.9, 2.7, 1.9, 5.5])}
    finalists = tuple(
        made_confirmation(index, origin, float(rows_of[index].mean()), losses=tuple(rows_of[index]))
        for index, origin in ((2, "seed-kl"), (3, "gp"), (7, "gp"))
    )
    headings, body = sections.finalists(made_search(PLAN, confirmations=finalists))
    apart = [row[headings.index("loss less the winner's, paired by row")] for row in body]
    errors = [float((rows_of[index] - rows_of[7]).std(ddof=1) / 2) for index in (2, 3)]
    assert apart == [f"+0.2500 (se {errors[0]:.4f})", f"+0.4000 (se {errors[1]:.4f})", "-"]
    older = tuple(each.model_copy(update={"losses": ()}) for each in finalists)
    assert sections.finalists(made_search(PLAN, confirmations=older))[0] == ("trial", "from", "selection loss")


def test_the_size_tells_what_the_plan_decides_on_and_where_the_base_came_from() -> None:
    results = results_of(searched_row([1.0]))
    assert results.prepare and results.search
    (size, *_) = tiles(snapshot(results))
    assert not any("in the plan's groups" in line or "expanded" in line for line in size.lines), "older records"
    group_bytes = {f"{bits}": dict.fromkeys(results.search.best_plan, bits * 1_000_000) for bits in (4, 8)}
    told = {
        "bank": BankRecord(**STAGE, files={}, bytes=1, residual_ratio={}, group_bytes=group_bytes),
        "prepare": results.prepare.model_copy(update={"source_bytes": 98_400_000}),
    }
    run = snapshot(results.model_copy(update=told))
    config = run.state.config | {"model": {"source": "package:some_weights/small.Q4_1.gguf"}}
    (size, *_) = tiles(replace(run, state=run.state.model_copy(update={"config": config})))
    others = "88.0 MB besides (embeddings, norms, head, adapter), whatever the plan"
    assert f"12.0 MB in the plan's groups; {others}" in size.lines
    assert "the base was expanded from a file of 98.4 MB, small.Q4_1.gguf" in size.lines


def test_sensitivities_of_one_pass_are_told_to_share_its_seconds() -> None:
    """Of those that were asked for."""
    measured = results_of(searched_row([1.0])).sensitivity
    assert measured
    scores = measured.methods["kl"]
    several = dict.fromkeys(("mutual_information", "first_order", "fisher", "kl"), scores)
    assert sections.methods_caption(measured.model_copy(update={"methods": several})) == (
        "Sensitivities; first_order and fisher come from one pass, and each has the seconds of all of it"
    )
    assert sections.methods_caption(measured) == "Sensitivities"


def test_a_plan_that_was_given_is_told_whole_to_repeat_it() -> None:
    """Its file may be gone, and the configuration only names it."""
    text = report(results_of(searched_row([1.0]), best_origin=GIVEN))
    assert "search:\n\n```yaml\nlayers.0: 8\nlayers.1: 4\n```" in text[text.index("## To repeat it") :]
    assert "`search.plan`" not in report(results_of(searched_row([1.0])))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, "a searched plan and"),
        ({"best_origin": "seed-kl", "control_won": True}, "the plan seed-kl, which no searched plan beat, and"),
        ({"best_origin": GIVEN}, "a plan that was given, not searched for, and"),
    ],
)
def test_the_model_card_says_where_the_plan_came_from(found: dict[str, Any], told: str) -> None:
    results = results_of(searched_row([1.0]), **found)
    config = {"model": {"source": "me/base"}, "data": {"train": []}}
    card = model_card(snapshot(results, config=config, environment={"qpruner": "1.2"}), None)
    assert f"`me/base`, pruned, quantized to 6.00 mean bits by {told} fine-tuned by qpruner" in card


# What several training seeds carry


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_interval_is_students_over_differences_paired_by_seed(num_seeds: int) -> None:
    generator = np.random.default_rng(num_seeds)
    order = generator.normal(0, 0.1, num_seeds)  # what a data order does to every plan
    theirs, ours = 2.0 + order + generator.normal(0, 0.01, (2, num_seeds))
    found = difference(results_of([*row_of(BEST_SEED, list(theirs)), *searched_row(list(ours))]), "confirmation loss")
    expected = stats.ttest_1samp(ours - theirs, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx((ours - theirs).mean())
    assert found.spread == pytest.approx((ours - theirs).std(ddof=1))
    assert found.half_width == pytest.approx((high - low) / 2)
    assert (found.verdict != SAME) == (expected.pvalue < 0.05)


@pytest.mark.parametrize(
    ("widths", "verdict"), [(0.97, SAME), (-0.97, SAME), (0.0, SAME), (1.03, "worse"), (-1.03, "better")]
)
@pytest.mark.parametrize("other", [BEST_SEED, RANDOM])
def test_inside_the_interval_nothing_is_distinguishable(widths: float, verdict: str, other: str) -> None:
    """Against one plan the interval is Student's over seeds, against several that of one more plan."""
    noise = np.array([-0.02, 0.0, 0.02])
    half_width = stats.t.ppf(0.975, 2) * 0.02 * math.sqrt(1 / 3 if other == BEST_SEED else 1 + 1 / 3)
    ours = 2.0 + noise + widths * half_width
    theirs = row_of(other, [2.0] * 3) if other == BEST_SEED else random_rows([2.0] * 3, noise)
    results = results_of([*theirs, *searched_row(list(ours))])
    found = difference(results, "confirmation loss", other)
    assert (found.half_width, found.verdict) == (pytest.approx(half_width), verdict)
    line = line_about(results, other)
    assert ", 3 training seeds, paired: " in line
    assert f"confirmation loss {widths * half_width:+.4f} nats (± 0.0200 over seeds" in line
    assert line.endswith(f"), {verdict}.")
    rival = "the best seed" if other == BEST_SEED else "random plans of equal bytes"
    told = f"cannot be told from {rival}" if verdict == SAME else f"is {verdict} than {rival} in confirmation loss"
    counts = "no difference shown" if verdict == SAME else f"{verdict} in 1 of 3"
    first = claim(results).splitlines()[0]
    assert first.endswith(f" It {told}. Over 3 comparisons, each at 95 % by itself: {counts}."), "words before figures"


@pytest.mark.parametrize(
    ("seed", "random", "said"),
    [
        (-0.1, 0.0, "better in 1 of 6"),
        (-0.1, -0.1, "better in 2 of 6"),
        (0.0, 0.1, "worse in 1 of 6"),
        (0.1, -0.1, "better in 1 and worse in 1 of 6"),
        (0.0, 0.0, "no difference shown"),
    ],
)
def test_one_verdict_of_six_is_not_told_as_that_of_all(seed: float, random: float, said: str) -> None:
    """Of six comparisons at 95 % each, one may show a difference by chance."""
    ours = [2.0, 2.1, 1.9]
    off = (0.001, -0.001, 0.0)
    best = row_of(BEST_SEED, [loss - seed + each for loss, each in zip(ours, off, strict=True)])
    drawn = random_rows([loss - random for loss in ours], off)
    results = results_of([*best, *drawn, *searched_row(ours)])
    among = "6 comparisons, each at 95 % by itself"
    assert claim(results).splitlines()[0].endswith(f" Over {among}: {said}.")
    (tile,) = [each for each in tiles(snapshot(results)) if each.heading.startswith("How sure")]
    assert (tile.figure, tile.lines[0]) == (said, among)


def test_an_accuracy_is_better_when_larger_and_a_loss_when_smaller() -> None:
    generator = np.random.default_rng(0)
    base = [score(answers(400, 200), generator.gamma(2.0, 1.0, 400)) for _ in range(3)]
    gained = [
        score(answers(400, 230 + seed), np.array(each.answer_loss) - 0.2 - generator.normal(0, 0.02, 400))
        for seed, each in enumerate(base)
    ]
    losses = [2.0, 2.1, 1.9]
    lower = [1.81, 1.9, 1.69]
    up = results_of([*row_of(BEST_SEED, losses, base), *searched_row(lower, gained)])
    down = results_of([*row_of(BEST_SEED, lower, gained), *searched_row(losses, base)])
    for results, verdict in ((up, "better"), (down, "worse")):
        for measure in ("acc", "answer loss", "confirmation loss"):
            assert difference(results, measure).verdict == verdict, measure
        assert line_about(results, BEST_SEED).count(f", {verdict}") == 3


def test_seeds_that_agree_on_a_few_questions_prove_nothing() -> None:
    """One more right answer of 50 under every seed has no spread over seeds, but other questions would differ."""
    base, ours = [score(answers(50, 20))] * 3, [score(answers(50, 21))] * 3
    results = results_of([*row_of(BEST_SEED, [2.0] * 3, base), *searched_row([1.9] * 3, ours)])
    found = difference(results, "acc")
    assert found.spread == pytest.approx(0.0)
    assert found.half_width == pytest.approx(1.96 * np.std(answers(50, 1), ddof=1) / math.sqrt(50))
    assert found.verdict == SAME
    # Losses that agree to the last bit are no evidence of a spread of zero either.
    assert difference(results, "confirmation loss").verdict == SAME


def test_seeds_that_agree_on_a_few_confirmation_rows_prove_nothing() -> None:
    """One row that every seed learns better says little of other rows; many that agree say much."""
    noise = np.array([-0.001, 0.0, 0.001])
    few = np.array([0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for gains, verdict in ((few, SAME), (np.repeat(0.1, 8) + few / 100, "better")):
        theirs = [2.0 + np.arange(8) + off for off in noise]
        ours = [rows_of_seed - gains + off for rows_of_seed, off in zip(theirs, noise, strict=True)]
        results = results_of([*row_by_row(BEST_SEED, SEED_PLAN, theirs), *row_by_row(SEARCHED, PLAN, ours)])
        found = difference(results, "confirmation loss")
        assert found.mean == pytest.approx(-gains.mean())
        assert found.half_width == pytest.approx(
            max(1.96 * gains.std(ddof=1) / math.sqrt(8), stats.t.ppf(0.975, 2) * 0.001 / math.sqrt(3))
        )
        assert found.verdict == verdict
        assert "over seeds, 8 rows, 95 % interval" in line_about(results, BEST_SEED)


def row_by_row(name: str, plan: dict[str, int], losses: Sequence[np.ndarray]) -> list[Scored]:
    """A row whose seeds had these losses on each confirmation row."""
    return [
        (tuned.model_copy(update={"confirmation_losses": tuple(map(float, by_row))}), scores)
        for (tuned, scores), by_row in zip(
            row_of(name, [float(by_row.mean()) for by_row in losses], plan=plan), losses, strict=True
        )
    ]


def test_only_seeds_that_both_rows_have_are_paired_and_counted() -> None:
    results = results_of([*row_of(BEST_SEED, [2.0, 2.2]), *searched_row([1.0, 1.1, 7.0])])
    assert difference(results, "confirmation loss").mean == pytest.approx(-1.05)
    assert ", 2 training seeds, paired: " in line_about(results, BEST_SEED)


def test_one_random_plan_says_nothing_of_random_plans() -> None:
    """`finetune.random_plans: 1`, or no more of equal bytes: the row stays, and nothing is claimed."""
    losses = [2.0, 2.1, 1.9]
    results = results_of([*row_of(BEST_SEED, losses), *random_rows(losses, [0.0]), *searched_row([1.0, 1.11, 0.9])])
    first, *lines = claim(results).splitlines()
    assert "random" not in first and first.endswith("each at 95 % by itself: better in 1 of 3.")
    assert len(lines) == 1 and lines[0].startswith("- Against the best seed")
    (tile,) = [each for each in tiles(snapshot(results)) if each.heading.startswith("How sure")]
    assert not any("random" in line for line in tile.lines)
    assert RANDOM in [row.name for row in rows(results)]


def test_random_plans_count_as_many_times_as_there_are_plans_not_fine_tunes() -> None:
    """Three plans under three seeds are nine fine-tunes, but three plans: a further one would lie as far from them."""
    by_plan, by_seed = np.array([0.1, 0.0, -0.1]), np.array([0.02, 0.0, -0.02])
    ours = np.array([2.0, 2.1, 1.9])
    results = results_of([*random_rows(list(ours + 0.4 + by_seed), by_plan), *searched_row(list(ours))])
    found = difference(results, "confirmation loss", RANDOM)
    assert found.mean == pytest.approx(-0.4)
    assert found.spread == pytest.approx(0.02)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 * math.sqrt(1 + 1 / 3))
    # Student's interval for the mean of the three plans, or of nine fine-tunes, would have made it "better".
    assert found.verdict == SAME and abs(found.mean) > stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    (row,) = [row for row in rows(results) if row.name == RANDOM]
    assert row.seeds == (0, 1, 2) and len(row.plans) == 3
    assert ", 3 training seeds, paired: " in line_about(results, RANDOM)


# What one training seed carries


def test_one_training_seed_falls_back_to_its_questions_and_says_so() -> None:
    generator = np.random.default_rng(4)
    their_correct, our_correct = generator.integers(0, 2, (2, 60)).astype(float)
    hardness = generator.gamma(2.0, 1.0, 60)
    their_loss, our_loss = hardness + generator.normal(0, 0.1, (2, 60))
    results = results_of(
        [
            *row_of(BEST_SEED, [2.0], [score(their_correct, their_loss)]),
            *searched_row([1.0], [score(our_correct, our_loss)]),
        ]
    )
    for measure, differences in (("acc", our_correct - their_correct), ("answer loss", our_loss - their_loss)):
        found = difference(results, measure)
        assert found.mean == pytest.approx(differences.mean())
        assert found.half_width == pytest.approx(1.96 * differences.std(ddof=1) / math.sqrt(60))
        assert (found.spread, found.num_pairs) == (None, 60)
    # Unpaired, the spread of the questions themselves would drown the difference.
    assert difference(results, "answer loss").half_width < 0.4 * np.std(hardness) / math.sqrt(60)  # type: ignore[operator]
    line = line_about(results, BEST_SEED)
    assert ", one training seed, whose luck the intervals leave out, paired by question and row: " in line
    assert line.endswith("confirmation loss -1.0000 nats (no interval), not distinguishable.")


@pytest.mark.parametrize(
    ("their_correct", "our_correct", "verdict"),
    # Of 100 questions 4 gained are 2.03 standard errors, 3 are 1.75.
    [(50, 54, "better"), (54, 50, "worse"), (50, 53, SAME), (53, 50, SAME), (50, 50, SAME)],
)
def test_an_accuracy_of_one_seed_is_distinguishable_beyond_1_96_standard_errors(
    their_correct: int, our_correct: int, verdict: str
) -> None:
    theirs, ours = score(answers(100, their_correct)), score(answers(100, our_correct))
    results = results_of([*row_of(BEST_SEED, [2.0], [theirs]), *searched_row([2.0], [ours])])
    assert difference(results, "acc").verdict == verdict


def test_one_question_distinguishes_nothing() -> None:
    """`evaluate.limit: 1` is what people try first; one answer has no spread to speak of."""
    scored = [*row_of(BEST_SEED, [2.0], [score([0.0], [3.0])]), *searched_row([1.0], [score([1.0], [0.1])])]
    assert not re.search("better|worse", claim(results_of(scored)))


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_task_without_choices_leaves_the_answer_loss_out(lacking: int) -> None:
    """A mean over some of the tasks would be taken for one over all."""
    losses: list[list[float]] = [[1.0, 2.0, 3.0, 4.0]] * 2
    losses[lacking] = []
    scores = tuple(score([1.0, 0.0, 1.0, 0.0], each, f"task-{number}") for number, each in enumerate(losses))
    results = results_of([(candidate(BEST_SEED, SEED_PLAN), scores), (candidate(SEARCHED, PLAN), scores)])
    assert "answer loss" not in claim(results)
    assert difference(results, "acc").num_pairs == 8
    assert rows(results)[0].answer_loss is None


# The table and the report


@pytest.fixture
def whole() -> Results:
    """A finished run with every row, on two tasks; three of the rows under two training seeds."""
    plans = {
        "base": {"layers.0": 16, "layers.1": 16},
        "pruned": {"layers.0": 16, "layers.1": 16},
        "uniform 4-bit": {"layers.0": 4, "layers.1": 4},
        "uniform 8-bit": {"layers.0": 8, "layers.1": 8},
        "mutual-information seed": SEED_PLAN,
        BEST_SEED: SEED_PLAN,
        RANDOM: SEED_PLAN,
        SEARCHED: PLAN,
    }
    scored: list[Scored] = []
    for number, (name, plan) in enumerate(plans.items()):
        for seed in range(2 if name in ORIGINS else 1):
            # Every random plan is another one.
            own = PLAN if name == RANDOM and seed else plan
            row = candidate(name, own, 100_000_000 + 100_000 * (number + seed), seed, 2.125 + seed / 4, 2.0 + seed)
            scores = (
                score(answers(50, 10 + number + 5 * seed), [1.0 + seed] * 50),
                score(answers(40, 30), [2.0] * 40, "piqa"),
            )
            scored.append((row, scores))
    untuned = [(name, (score(answers(50, 5)), score(answers(40, 6), task="piqa"))) for name in UNTUNED]
    return results_of(scored, untuned)


def report(
    results: Results,
    effects: MarginalEffects | str = NO_EFFECTS,
    config: str = "output: x\n",
    environment: dict[str, str] | None = None,
) -> str:
    """The Markdown report, plots left out."""
    return render(snapshot(results, effects, environment=environment or {}), [], "pictures", config, has_map=False)


def test_a_row_is_the_mean_of_its_tasks_and_of_its_seeds(whole: Results) -> None:
    table = {row.name: row for row in rows(whole)}
    assert [row.seeds for row in table.values()] == [(0,)] * 5 + [(0, 1)] * 3
    assert [row.plans for row in table.values()] == [
        *[("FF",), ("FF",), ("44",), ("88",), ("48",), ("48",), ("48", "84"), ("84",)]
    ]
    first, random = table["base"], table[RANDOM]
    assert first.accuracy == pytest.approx((10 / 50 + 30 / 40) / 2)
    variances = [0.2 * 0.8 / 49, 0.75 * 0.25 / 39]
    assert first.accuracy_stderr == pytest.approx(math.sqrt(sum(variances)) / 2)
    assert first.accuracy_spread is first.validation_loss_spread is first.answer_loss_spread is None
    assert random.accuracy == pytest.approx(((16 + 21) / 2 / 50 + 30 / 40) / 2)
    assert random.accuracy_spread == pytest.approx(0.05 / math.sqrt(2))
    assert (random.validation_loss, random.validation_loss_spread) == pytest.approx((2.25, 0.25 / math.sqrt(2)))
    assert (random.confirmation_loss, random.confirmation_loss_spread) == pytest.approx((2.5, 1 / math.sqrt(2)))
    assert (random.answer_loss, random.answer_loss_spread) == pytest.approx((1.75, 0.5 / math.sqrt(2)))
    assert random.measured_bytes == 100_650_000
    assert {name: row.origin for name, row in table.items() if name in ORIGINS} == ORIGINS


def test_the_standard_error_of_a_row_is_that_of_its_mean_over_seeds() -> None:
    """Of the accuracy that stands there: luck with a question under one seed counts for less than under all of them."""
    by_seed = [answers(4, 2), answers(4, 3), answers(4, 3)]
    results = results_of([*row_of(BEST_SEED, [2.0]), *searched_row([1.0] * 3, [score(each) for each in by_seed])])
    (row,) = [row for row in rows(results) if row.name == SEARCHED]
    assert row.accuracy == pytest.approx(np.mean(by_seed))
    expected = np.mean(by_seed, axis=0).std(ddof=1) / 2
    assert row.accuracy_stderr == pytest.approx(expected)
    (told,) = [each for each in by_task.accuracies(results)["arc", "acc"] if each.row == SEARCHED]
    assert (told.value, told.value - told.low) == pytest.approx((row.accuracy, 1.96 * expected))


@pytest.mark.parametrize(
    ("metrics", "name", "in_full"),
    [
        (("acc_norm", "acc_norm"), "acc_norm", "acc_norm"),
        (("acc_norm", "acc"), "accuracy", "accuracy (acc_norm of arc; acc of boolq)"),
    ],
)
def test_every_accuracy_is_shown_with_the_metric_it_is(metrics: tuple[str, str], name: str, in_full: str) -> None:
    """acc and acc_norm of one model lie as far apart as models do (HellaSwag 53 and 69)."""
    scores = tuple(
        score(answers(50, 20), [1.0] * 50, task, metric) for task, metric in zip(("arc", "boolq"), metrics, strict=True)
    )
    tuned = [*row_of("base", [1.0]), *row_of("pruned", [1.0]), *row_of(BEST_SEED, [2.0]), *searched_row([1.0])]
    results = results_of([(row, scores) for row, _ in tuned])
    caption, headings, _ = final_tables(results)[0]
    assert f"test {name}" in headings and caption.endswith(f"; {in_full}") == (name == "accuracy")
    assert f"its test {in_full} is 0.400 (base 0.400, pruned 0.400)" in claim(results)
    assert f"\n- Against the best seed ({ORIGINS[BEST_SEED]}, +0.00% bytes)" in claim(results)
    assert f": {name} +0.0000 (100 questions, " in claim(results)
    tile = tiles(snapshot(results))[1]
    assert tile.heading == f"Test {name}" and (in_full in tile.lines) == (name == "accuracy")
    legend = dict(terms(results))[f"test {in_full}"]
    assert all(f"({metric})" in legend for metric in metrics) and "has the highest log-likelihood" in legend
    assert by_task.table(results)[0][1:] == tuple(
        f"{task} {metric} (50 questions)" for task, metric in zip(("arc", "boolq"), metrics, strict=True)
    )
    config = {"model": {"source": "me/base"}, "data": {"train": []}}
    card = model_card(snapshot(results, config=config, environment={"qpruner": "1.2"}), None)
    assert all(f"name: {metric}\n" in card for metric in metrics), "in what the hub reads"
    assert f"| test {name} |" in card


def test_a_search_is_told_with_the_metric_it_is_by() -> None:
    metrics = {"arc": "acc_norm"}
    finalists = [
        made_confirmation(index, origin, 2.0, accuracy=0.5, accuracy_stderr=0.1)
        for index, origin in ((2, "seed-kl"), (7, "gp"))
    ]
    search = made_search(PLAN, metric="accuracy", metrics=metrics, confirmations=tuple(finalists))
    told = " ".join(search_text(search, ()))
    assert told.startswith("gp on acc_norm, budget ") and "Its selection acc_norm is 0.5000" in told
    assert sections.finalists(search)[0][2:] == ("selection loss", "selection acc_norm")
    mixed = search.model_copy(update={"metrics": metrics | {"boolq": "acc"}})
    assert search_text(mixed, ())[0].startswith("gp on accuracy (acc_norm of arc; acc of boolq), budget ")


def test_a_row_of_one_seed_can_be_compared_with_the_same_seed_of_the_others(whole: Results) -> None:
    told = {row.name: dict(zip(HEADINGS, cells(row), strict=True)) for row in rows(whole)}
    assert (told["base"]["seeds"], told[SEARCHED]["seeds"]) == ("1 (0)", "2 (0-1)")
    caption, headings, body = final_tables(whole)[1]
    assert "under training seed 0 alone" in caption
    alike = {row[0]: dict(zip(headings, row, strict=True)) for row in body}
    assert list(alike) == [row.title for row in rows(whole)]
    assert alike["base"]["confirmation loss"] == told["base"]["confirmation loss"]
    assert told[SEARCHED]["confirmation loss"] == "2.5000 ± 0.7071"
    assert alike[SEARCHED]["confirmation loss"] == "2.0000"
    assert f"\n{caption}:\n\n| row | " in report(whole)
    seeds = {row.name: row.seeds for row in summary_of(snapshot(whole)).first_seed_table}
    assert set(seeds.values()) == {(0,)}


def test_a_seed_plan_that_is_the_best_seed_says_so() -> None:
    """Else one plan stands there with two sets of figures."""
    seed = row_of("mutual-information seed", [2.0], plan=SEED_PLAN)
    base = row_of("base", [1.0], plan=SEED_PLAN)
    same = results_of([*base, *seed, *row_of(BEST_SEED, [2.0, 2.1], plan=SEED_PLAN), *searched_row([1.0, 1.1])])
    titles = [row.title for row in rows(same)]
    assert titles == ["base", "mutual-information seed = best seed", BEST_SEED, SEARCHED]
    other = results_of([*seed, *row_of(BEST_SEED, [2.0, 2.1], plan=PLAN), *searched_row([1.0, 1.1])])
    assert [row.title for row in rows(other)] == ["mutual-information seed", BEST_SEED, SEARCHED]


def test_the_claim_says_what_was_lost_against_base_and_pruned(whole: Results) -> None:
    lost = (
        "At 100.7% of the bytes of the base with such an adapter, its test acc is 0.545 (base 0.475, pruned "
        "0.485) and its answer loss 1.500 (base 1.500, pruned 1.500), all after the same fine-tune under "
        "training seed 0."
    )
    card = model_card(
        snapshot(whole, config={"model": {"source": "me/base"}, "data": {"train": []}}, environment={"qpruner": "1.2"}),
        None,
    )
    assert f" {lost} Its confirmation loss is 2.000 " in claim(whole).splitlines()[0]
    assert lost in report(whole) and lost in card
    alike = [*row_of("base", [1.0]), *row_of("pruned", [1.0]), *row_of(BEST_SEED, [2.0]), *searched_row([1.0])]
    assert "after the same fine-tune. It" in claim(results_of(alike)), "one seed each"
    wordless = [(tuned, (score(answers(50, 20)),)) for tuned, _ in alike]
    assert " (base 0.400, pruned 0.400), all after" in claim(results_of(wordless))
    assert "base" not in claim(results_of(alike[1:])), "there is no such row"


def test_the_claim_says_what_uniform_bits_know_for_their_bytes() -> None:
    """The winner beside fewer bytes and beside more, each under the one seed that all had."""
    four, eight = dict.fromkeys(PLAN, 4), dict.fromkeys(PLAN, 8)
    uniform = [
        *row_of("uniform 4-bit", [1.75], plan=four, measured_bytes=80_000_000),
        *row_of("uniform 8-bit", [1.25], plan=eight, measured_bytes=120_000_000),
    ]
    told = claim(results_of([*uniform, *row_of(BEST_SEED, [2.0, 2.1]), *searched_row([1.5, 1.0])]))
    assert (
        " Its confirmation loss is 1.500 at 100.0 MB (uniform 4-bit 1.750 at 80.0 MB, uniform 8-bit 1.250 at 120.0 "
        "MB), under the same training seed." in told
    )
    won = claim(results_of([*uniform, *searched_row([1.5], plan=four)]))
    assert "(uniform 8-bit 1.250 at 120.0 MB)" in won, "the winner is no row beside itself"
    assert "confirmation loss is" not in claim(results_of([*row_of(BEST_SEED, [2.0]), *searched_row([1.0])]))


def test_rows_of_equally_many_seeds_are_told_once() -> None:
    results = results_of([*row_of(BEST_SEED, [2.0, 2.1]), *searched_row([1.0, 1.1])])
    assert len(final_tables(results)) == 3 and "alone" not in report(results)


def test_the_report_holds_every_row_the_claim_and_the_configuration(whole: Results) -> None:
    config = "output: runs/demo\nlora:\n  rank: 8\n"
    text = report(whole, config=config, environment={"python": "3.11.9", "torch": "2.13.0"})
    lines = text.splitlines()
    for caption, headings, body in final_tables(whole):
        start = lines.index(f"{caption}:")
        table = ["| " + " | ".join(cells) + " |" for cells in (headings, *body)]
        assert [line for line in lines[start + 2 : start + 3 + len(table)] if "---" not in line] == table
    assert " | gp, trial 11 | 2 (0-1) | 2.2500 ± 0.1768 | 2.5000 ± 0.7071 |" in text
    assert f"\n\n{claim(whole)}\n\n" in text
    assert f"```yaml\n{config}```" in text
    assert "- python: 3.11.9" in lines and "- torch: 2.13.0" in lines
    steps = lines[lines.index("## Step by step") :]
    scored = "arc acc 0.100 (se 0.043) (50 questions), piqa acc 0.150 (se 0.057) (40 questions)"
    tuned = "arc acc 0.340 (se 0.068) (50 questions), piqa acc 0.750 (se 0.069) (40 questions)"
    base = "arc acc 0.200 (se 0.057) (50 questions), piqa acc 0.750 (se 0.069) (40 questions)"
    assert [line for line in steps[:11] if line.startswith("| ")] == [
        "| model | scores | answer loss |",
        *(f"| {name} (no fine-tune) | {scored} | - |" for name in UNTUNED),
        f"| searched, training seed 0 | {tuned} | 1.5000 |",
        f"| base, training seed 0 | {base} | 1.5000 |",
    ]


def test_each_step_tells_the_answer_loss_and_the_perplexity_where_there_are_such() -> None:
    """By accuracies of 48 questions alone a pruned model may look better than its base."""

    def of_losses(accuracy: int, *losses: float) -> tuple[TaskScore, ...]:
        return tuple(score(answers(48, accuracy), [loss] * 48 if loss else []) for loss in losses)

    untuned = [("base", of_losses(30, 11.0, 12.0)), ("pruned", of_losses(31, 12.0, 13.0))]
    results = results_of(searched_row([1.0], of_losses(33, 8.0)), untuned)
    assert steps(results)[0] == ("model", "scores", "answer loss"), "no text, no perplexity"
    assert [row[2] for row in steps(results)[1]] == ["11.5000", "12.5000", "8.0000"]
    headings, body = steps(with_figures(results))
    assert headings[3] == "perplexity" and [row[3] for row in body] == ["8.00"] * 3
    wordless = results_of(searched_row([1.0], of_losses(33, 0.0)), [("base", of_losses(30, 11.0, 0.0))])
    assert steps(wordless)[0] == ("model", "scores"), "of some of the tasks alone it would be no mean over all"


def test_the_searched_plan_without_a_fine_tune_is_no_rival(whole: Results) -> None:
    """The claim and the table are those of equal fine-tunes, whatever the quantized model scored before."""
    assert whole.evaluate
    without = [row for row in whole.evaluate.rows if (row.name, row.seed) != (SEARCHED, None)]
    assert len(without) == len(whole.evaluate.rows) - 1
    alone = whole.model_copy(update={"evaluate": whole.evaluate.model_copy(update={"rows": tuple(without)})})
    assert (rows(whole), comparisons(whole), claim(whole)) == (rows(alone), comparisons(alone), claim(alone))


def with_figures(results: Results, **of_record: Any) -> Results:
    """The same run, with a text and timings: three turns a training seed, each seed's own."""
    assert results.evaluate
    fields: dict[str, Any] = {"text_loss": math.log(8.0)}
    rows_scored = []
    for row in results.evaluate.rows:
        taken = None
        if row.seed is not None:
            fast = 100.0 + row.seed
            taken = Inference(
                memory_bytes=300_000_000 + 10_000_000 * row.seed,
                prefill_tokens_per_second=(fast, fast + 10, fast + 50),
                decode_tokens_per_second=(20.0, 10.0, 12.0),
            )
        fields["text_loss"] = math.log(8.0 + 2 * (row.seed or 0))
        rows_scored.append(row.model_copy(update={**fields, "inference": taken}))
    setting = InferenceSetting(device="NVIDIA X", prompt_tokens=128, new_tokens=16, memory_counter="cuda peak")
    given = {"rows": tuple(rows_scored), "text": "the text", "inference": setting, **of_record}
    return results.model_copy(update={"evaluate": results.evaluate.model_copy(update=given)})


def test_a_row_tells_what_its_model_takes_to_use(whole: Results) -> None:
    """Over all turns of all its models, since each training seed may have its own plan."""
    table = {row.name: row for row in rows(with_figures(whole))}
    assert table["base"].prefill_tokens_per_second == (110.0, 100.0, 150.0)
    assert table["base"].decode_tokens_per_second == (12.0, 10.0, 20.0)
    assert table[RANDOM].prefill_tokens_per_second == (110.5, 100.0, 151.0)
    assert table[RANDOM].inference_memory_bytes == 310_000_000
    assert table["base"].perplexity == pytest.approx(8.0) and table["base"].perplexity_spread is None
    assert (table[RANDOM].perplexity, table[RANDOM].perplexity_spread) == pytest.approx((9.0, math.sqrt(2)))
    assert cells(table["base"])[-3:] == ("300 MB", "110 (100-150)", "12.0 (10.0-20.0)")
    assert dict(zip(HEADINGS, cells(table["base"]), strict=True))["perplexity"] == "8.00"


def test_the_legend_says_on_what_text_and_where_it_was_measured(whole: Results) -> None:
    text = report(with_figures(whole))
    assert "mean loss a token on the text." in text
    assert "NVIDIA X, adapter on: 128 tokens read (prefill), 16 written" in text
    assert "- **perplexity**: none: the confirmation rows are multiple-choice" in report(with_figures(whole, text=None))


def test_a_record_without_timings_is_shown_without_them(whole: Results) -> None:
    """Of an evaluation that was recorded before they were taken."""
    without = [dict(zip(HEADINGS, cells(row), strict=True)) for row in rows(whole)]
    assert all([*row.values()][-3:] == ["-", "-", "-"] and row["perplexity"] == "-" for row in without)
    assert "turns" not in report(whole)


def test_the_legend_says_why_a_trials_loss_is_another(whole: Results) -> None:
    assert "none is the trials', so a plan's loss as a trial does not compare with its loss here." in report(whole)


def test_the_legend_says_what_the_rows_and_their_losses_are(whole: Results) -> None:
    told = dict(terms(whole))
    assert list(told)[:7] == ["base", "pruned", "uniform", "seed", BEST_SEED, RANDOM, SEARCHED]
    assert "right answer given the question, in nats per answer (not per token): lower is better" in told["answer loss"]
    assert all(
        told[f"{name} loss"].startswith("in nats per token") for name in ("validation", "selection", "confirmation")
    )
    text = report(whole)
    assert all(f"\n- **{term}**: {meaning}\n" in text for term, meaning in told.items())
    assert terms(results_of(searched_row([1.0])))[0][0] == SEARCHED, "there are no other rows to explain"


def test_the_report_tells_how_search_and_pruning_ended(whole: Results) -> None:
    text = report(whole)
    assert "16 trials, 7 finished, 8 stopped early, 1 failed" in text
    assert "It ended because all 16 trials were spent (`search.max_trials`)." in text
    assert "started from 5 trials that earlier searches left" in text
    assert "Resumed: 2 sessions; the last began with 3 trials recorded before. Failed: 1 diverged (lower" in text
    assert "On fresh rows trial 11 (gp) was best, a searched plan." in text
    assert "\n| trial | from | selection loss |\n" in text, "no accuracy was searched"
    assert "\n| 2 | seed-kl, taken over | 2.1250 (se 0.0625) |\n" in text
    assert "\n| 11 | gp | 2.0625 (se 0.0312) |\n" in text
    assert "none of fewer or equal bytes" not in text, "there is no front"
    assert "target 20.00% of all parameters, achieved 19.84%" in text
    assert "150,000,000 -> 120,240,000 parameters, 300.0 -> 240.5 MB" in text
    assert "| 0 | 1 of 2 | 1 of 2 | 2 of 4 | 50.0% |" in text


def test_the_report_shows_a_front() -> None:
    front = (
        FrontPoint(index=4, origin="gp", plan=SEED_PLAN, plan_bytes=9_000_000, loss=2.5, stderr=0.25),
        FrontPoint(
            index=7,
            origin="gp",
            plan=PLAN,
            plan_bytes=9_900_000,
            loss=2.25,
            stderr=0.25,
            accuracy=0.5,
            accuracy_stderr=0.1,
        ),
    )
    text = report(results_of(searched_row([1.0]), front=front))
    assert "| trial | from | bytes | plan | selection loss | selection accuracy |" in text
    assert "| 4 | gp | 9.0 MB | 48 | 2.5000 (se 0.2500) | - |" in text
    assert "| 7 | gp | 9.9 MB | 84 | 2.2500 (se 0.2500) | 0.500 (se 0.100) |" in text


def test_the_report_shows_sensitivities_beside_what_trials_show(whole: Results) -> None:
    text = report(whole)
    assert "| method | what | unit | seconds |\n" in text, "no column of dashes"
    assert "| kl | one group at a time | nats | 12.5 |\n" in text
    assert f"Rank correlations with what trials show were not computed: {NO_EFFECTS}." in text, "which is none of zero"
    assert "| layers.0 | 8 | 0.5 |" in text and "| layers.1 | 4 | 0.25 |" in text
    effects = MarginalEffects({4: (0.01, 0.02)}, num_trials=9, residual=0.005)
    text = report(whole, effects)
    assert "| seconds | rank correlation |\n" in text and "| kl | one group at a time | nats | 12.5 | -1.00 |" in text
    assert "main effects of 9 finished trials (residual 0.0050 nats)" in text
    assert "| layers.0 | 8 | 0.5 | 0.01 |" in text


def test_no_cell_of_the_table_breaks_it(whole: Results) -> None:
    lines = report(whole).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| row |"))
    table = lines[start : start + 10]
    assert len({line.count("|") for line in table}) == 1
    assert lines[start + 10] == ""
