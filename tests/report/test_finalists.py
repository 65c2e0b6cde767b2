"""The report shows first what a user would do instead of a search, and never hides that it is
better."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from made_records import made_finalist, made_fine_tune, made_search
from made_run import PLAN, RIVAL, results_of, row_of, searched_row, snapshot
from scipy import stats

from qpruner.plans.plan import formats_text
from qpruner.report import tables
from qpruner.report.card import model_card
from qpruner.report.claim import claim, comparisons, finalist_differences, finalists, headline
from qpruner.report.content import ComparedCell, Paragraph, Table, report_md
from qpruner.report.overview import overview
from qpruner.report.results import rows
from qpruner.report.sections import sections
from qpruner.runs.records import (
    BEST_SEARCHED,
    SELECTION,
    Finalist,
    FineTune,
    Results,
    RungAgreement,
)
from qpruner.search.roles import control_title, finalist_title, is_beaten

BUDGET = 101_500_000
NF4 = dict.fromkeys(PLAN, "nf4")
UNPRUNED = {"cut": "base", "plan": NF4}


def finalist(
    index: int, origin: str, losses: Sequence[float], size: int = 100_000_000, **changes: Any
) -> Finalist:
    """Return a finalist with these losses on the fresh rows under the trials' seed."""
    own = {"losses": {0: tuple(losses)}, "plan": PLAN, "plan_bytes": size, "fits": size <= BUDGET}
    return made_finalist(index, origin, float(np.mean(losses)), **own | changes)


def half_width(differences: Sequence[float], num_finalists: int) -> float:
    """Return half of the interval of a mean over rows, which holds every pair of the finalists
    together."""
    pairs, count = num_finalists * (num_finalists - 1) / 2, len(differences)
    return float(
        stats.t.ppf(1 - 0.025 / pairs, count - 1) * np.std(differences, ddof=1) / math.sqrt(count)
    )


WINNER = np.array([2.0, 4.0, 3.0, 7.0] * 4)
GAIN = np.array([0.3, 0.2, 0.3, 0.4] * 4)
UNIFORM = finalist(2, "unpruned-uniform", WINNER + 2 * GAIN, 80_000_000, **UNPRUNED)
KNAPSACK = finalist(3, RIVAL, WINNER + GAIN, 101_000_000, **UNPRUNED)
OVER = finalist(4, "unpruned-uniform", WINNER - GAIN, 120_000_000, **UNPRUNED)
SECOND = finalist(9, "gp", WINNER + 0.5 * GAIN, 90_000_000)
PAPER = finalist(5, "paper", WINNER + np.array([1.0, -0.9, 1.0, -1.0] * 4), 99_000_000)


def searched(*controls: Finalist, **changes: Any) -> Results:
    """Return a finished run whose winner is trial 11, scored beside these controls."""
    fresh = (*controls, finalist(11, "gp", WINNER))
    return results_of(searched_row([1.0]), finalists=fresh, steps=8, **changes)


def test_the_winner_stands_beside_every_finalist() -> None:
    """Those in the budget come first, each with its difference from the winner, paired by row."""
    found = tables.fresh_scores(searched(UNIFORM, KNAPSACK, OVER, PAPER, SECOND).search)  # type: ignore[arg-type]
    assert found.caption.startswith(
        "The winner, every control (what one would do instead) and the best trials: all as"
    )
    width = half_width(GAIN, 6)
    ends = f"95 % interval {-0.3 - width:+.4f} to {-0.3 + width:+.4f} under training seed 0 alone"
    assert [getattr(cell, "in_words", cell) for cell in found.rows[3]] == [
        *("not pruned, knapsack", "3", "not pruned", "nf4", "101.0 MB"),
        f"4.3000 (selection loss -0.3000 nats (16 rows, {ends}), better)",
    ]
    told = [(row[0], *row[3:5], getattr(row[-1].difference, "verdict", "-")) for row in found.rows]  # type: ignore[union-attr]
    assert told[:3] == [
        ("searched", "1 nf4, 1 int8", "100.0 MB", "-"),
        ("the paper's flow", "1 nf4, 1 int8", "99.0 MB", "not distinguishable"),
        ("gp", "1 nf4, 1 int8", "90.0 MB", "better"),
    ]
    assert told[-2:] == [
        ("not pruned, uniform", "nf4", "80.0 MB", "better"),
        ("not pruned, uniform", "nf4", "120.0 MB, exceeds the budget", "worse"),
    ]


def test_scored_accuracies_and_seeds_have_columns() -> None:
    losses = {
        seed: tuple(WINNER + 0.5 * GAIN + shift)
        for seed, shift in ((0, 0.0), (1001, 0.2), (1002, 0.1))
    }
    about = {"accuracy": 0.5, "accuracy_stderr": 0.1, "losses": losses, "reused": True}
    scored = made_finalist(9, "gp", 0.0, plan=PLAN, plan_bytes=90_000_000, **about)
    of_trial = scored.as_trial.selection.loss
    found = tables.fresh_scores(searched(scored).search)  # type: ignore[arg-type]
    told = [dict(zip(found.headings, row, strict=True)) for row in found.rows]
    assert [each["selection accuracy"] for each in told] == ["-", "0.500 (se 0.100)"]
    assert told[1]["row"] == "gp, reused"
    loss, mean = told[1]["selection loss"], told[1]["mean over seeds"]
    assert f"{loss}".startswith(f"{of_trial:.4f}  ["), (
        "the loss is that under the seed of all trials"
    )
    assert mean == f"{of_trial + 0.1:.4f} (3 seeds)" and told[0]["mean over seeds"] == "-"


def test_rungs_say_how_they_order_trials_within_and_between_cuts() -> None:
    rungs = (RungAgreement(step=4, num_trials=9, within=0.5, across=-0.25),)
    found = tables.rungs(made_search(PLAN, rungs=rungs))
    assert found.rows == [("4", "9", "+0.50", "-0.25")] and found.headings[2:] == (
        "within a cut",
        "between cuts",
    )


def test_controls_are_named_by_their_cut() -> None:
    names = ("cut-12.5-uniform", "unpruned-knapsack", "layers-25-uniform", "paper", "gp")
    assert [control_title(name) for name in names] == [
        *("12.5 % pruned, uniform", "not pruned, knapsack", "25 % of each block pruned, uniform"),
        *("the paper's flow", "gp"),
    ]


def as_a_trial(results: Results) -> str:
    """Return what the claim says of the rival as a trial, and check that the headline agrees."""
    lead, _, *items = claim(results).splitlines()
    [item] = items or [""]
    verdict = item.rpartition(", ")[2].removesuffix(".")
    shown = {"better": "better than", "not distinguishable": "not distinguishable from"}
    alternative = "compared with no other plan"
    if item:
        alternative = (
            f"{shown[verdict]} the best simple alternative, "
            "both as trials on the rows that chose the winner"
        )
    assert lead.partition(" (")[0].rstrip(".") == f"3.0 times smaller than the base; {alternative}"
    return item


def test_without_its_fine_tune_the_rival_is_compared_as_a_trial() -> None:
    width = half_width(GAIN, 4)
    ends = (
        f"16 rows, 95 % interval {-0.3 - width:+.4f} to {-0.3 + width:+.4f} "
        "under training seed 0 alone"
    )
    assert as_a_trial(searched(UNIFORM, KNAPSACK, OVER)) == (
        "- Against not pruned, knapsack, as trials on the rows that chose the winner: "
        f"selection loss -0.3000 nats ({ends}), better."
    )
    assert as_a_trial(searched(PAPER)).endswith(", not distinguishable.")
    assert as_a_trial(searched(OVER)) == as_a_trial(searched()) == "", (
        "one that may not win is no alternative"
    )


def trained_again(found: Finalist, shift: float = 0.2) -> Finalist:
    """Return a finalist that was trained under a further seed, which shifts its losses."""
    losses = [loss + shift for loss in found.losses[0]]
    further = made_fine_tune(found.origin, found.plan, 1001, {SELECTION: losses})
    return found.model_copy(update={"fine_tunes": (*found.fine_tunes, further)})


def test_a_further_seed_of_the_winner_turns_no_verdict() -> None:
    """Seeds shift all losses together; a control that had the trials' seed alone is compared under
    that seed."""
    beaten = finalist(3, RIVAL, WINNER + 0.2 * GAIN, 101_000_000, **UNPRUNED)
    tied = (
        trained_again(finalist(9, "gp", WINNER + 0.001)),
        trained_again(finalist(11, "gp", WINNER)),
    )
    results = results_of(searched_row([1.0]), finalists=(beaten, *tied), steps=8)
    assert results.search and beaten.mean.loss < results.search.winner.mean.loss, (
        "means over different seeds mislead"
    )
    assert as_a_trial(results).endswith(" under training seed 0 alone), better.")
    shown = finalist_differences(results.search)
    assert shown[9] and shown[9].seeds == (0, 1001) and shown[3] and shown[3].seeds == (0,)
    [row] = [row for row in tables.fresh_scores(results.search).rows if row[1] == "3"]
    assert isinstance(row[-2], ComparedCell) and row[-2].figure == f"{beaten.mean.loss:.4f}"


def test_a_control_that_was_not_trained_again_is_no_rival() -> None:
    """Its one score may be luck, as those of the others were; the winner too is chosen among means
    over seeds."""
    lucky = OVER.model_copy(update={"fits": True})
    again, winner = trained_again(KNAPSACK), trained_again(finalist(11, "gp", WINNER))
    results = results_of(searched_row([1.0]), finalists=(lucky, again, winner))
    assert as_a_trial(results).startswith("- Against not pruned, knapsack, ")


def test_a_control_that_won_is_compared_with_the_best_searched_plan() -> None:
    """Rows that chose nothing judge them, if both had a fine-tune, and otherwise the headline says
    which rows did."""
    fresh = (
        SECOND.model_copy(update={"plan": PLAN, "cut": "cut-20"}),
        UNIFORM,
        finalist(11, RIVAL, WINNER, **UNPRUNED),
    )
    won = {"finalists": fresh}
    alone = searched_row([1.0], plan=NF4)
    width = half_width(0.5 * GAIN, 3)
    lead = (
        "3.0 times smaller than the base. A plan that needs no search won: not pruned, knapsack; "
    )
    assert headline(results_of(alone, **won)) == (
        f"{lead}better than the best searched plan, both as trials on the rows that chose the "
        f"winner (-0.150 ± {width:.3f} nats under training seed 0 alone)"
    )
    both = results_of([*row_of(BEST_SEARCHED, [0.9], plan=PLAN), *alone], **won)
    assert headline(both) == f"{lead}not distinguishable from the best searched plan"
    assert "\n- Against the best searched plan (best searched, " in claim(both)
    assert [row.title for row in rows(both)] == [
        "best searched plan",
        "winner (not pruned, knapsack)",
    ]


def test_a_control_that_won_without_a_search_is_compared_with_the_next() -> None:
    """Its row is then the winner's, and says what it is."""
    won = {
        "best_index": 3,
    }
    fresh = (UNIFORM, KNAPSACK)
    results = results_of(searched_row([1.0]), finalists=fresh, steps=8, **won)
    assert "A plan that needs no search won: not pruned, knapsack; " in claim(results)
    assert "- Against not pruned, uniform, as trials on the rows that chose the winner: " in claim(
        results
    )
    assert (
        results.search
        and finalist_title(finalists(results.search)[0], results.search)
        == "winner (not pruned, knapsack)"
    )
    assert rows(results)[0].title == "winner (not pruned, knapsack)"
    about, table, _ = overview(results)
    assert about == Paragraph(
        "Winner (not pruned, knapsack) (gp, trial 11): 20 % pruned, nf4. "
        "Budget 101.5 MB, any adapter included.",
        True,
    )
    assert (
        isinstance(table, Table)
        and table.headings[-1] == "best simple alternative\nnot pruned, uniform, as a trial"
    )
    assert "`me/base`, not pruned, quantized to" in model_card(snapshot(results))


def tuned(name: str, confirmation: float, size: int, cut: str = "base") -> list[FineTune]:
    return [
        row.model_copy(update={"cut": cut})
        for row in row_of(name, [confirmation], plan=NF4, measured_bytes=size)
    ]


def test_full_fine_tunes_are_compared_with_the_rival_that_the_search_chose() -> None:
    """The rows that judge the winner do not choose its rival: the luckiest of several equal ones
    would seem better."""
    others = [
        *tuned("unpruned-uniform", 0.9, 80_000_000, "cut-10"),
        *tuned(RIVAL, 1.0, 90_000_000),
        *tuned("paper", 1.2, 80_000_000, "cut-20"),
    ]
    paper = finalist(
        5, "paper", WINNER + np.array([1.0, -0.9, 1.0, -1.0] * 4), 99_000_000, plan=NF4
    )
    results = results_of(
        [*others, *searched_row([1.5])], finalists=(KNAPSACK, paper, finalist(11, "gp", WINNER))
    )
    [found] = comparisons(results)
    assert found.other == "paper", "as trials the paper's flow was better than the knapsack"
    limited = KNAPSACK.model_copy(update={"fits": False})
    results = results_of(
        [*others, *searched_row([1.5])], finalists=(limited, paper, finalist(11, "gp", WINNER))
    )
    assert (
        tables.fresh_scores(results.search).rows[2][4] == "101.0 MB, computes more than the budget"
    )  # type: ignore[arg-type]
    results = results_of(
        [*others, *searched_row([1.5])], finalists=(KNAPSACK, finalist(11, "gp", WINNER))
    )
    [found] = comparisons(results)
    assert found.other == RIVAL and found.more_bytes == pytest.approx(-0.1), (
        "fewer bytes are no excuse"
    )
    lead, item = claim(results).splitlines()
    assert lead.endswith("; not distinguishable from the best simple alternative.")
    rival = "the best control in the budget (not pruned, knapsack)"
    assert item.startswith(
        f"- Against {rival} (unpruned-knapsack, -10.00% bytes), 1 training seed, paired: "
    )


def test_the_comparison_stands_in_every_output() -> None:
    results = searched(UNIFORM, OVER)
    run = snapshot(results)
    caption = tables.fresh_scores(results.search).caption  # type: ignore[arg-type]
    for text in (report_md(run, sections(run), "pictures"), model_card(run)):
        assert (
            text.count(caption) == 1
            and "| not pruned, uniform | 4 | not pruned | nf4 | 120.0 MB, exceeds" in text
        )
    unfinished = snapshot(results.model_copy(update={"finetune": None, "evaluate": None}))
    assert report_md(unfinished, sections(unfinished), "pictures").count(caption) == 1, (
        "known once the search is over"
    )


def test_a_plan_is_told_in_short_by_its_formats() -> None:
    blocks = {f"layers.{index}": name for index, name in enumerate(("int8", "nf4", "int8"))}
    assert formats_text(blocks) == "1 nf4, 2 int8"
    assert (
        formats_text({"embeddings": "int8"} | dict.fromkeys(blocks, "nf4"))
        == "nf4, embeddings int8"
    )
    assert formats_text({"embeddings": "int8"} | blocks | {"head": "bf16"}) == (
        "1 nf4, 2 int8, embeddings int8, head bf16"
    )


def test_a_winner_without_other_finalists_is_beaten_by_none() -> None:
    """As after a given plan: there is no pair, and the table is of one row."""
    search = searched().search
    assert search and not is_beaten(search.winner, search)
