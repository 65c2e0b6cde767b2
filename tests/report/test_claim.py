"""The claim never states a gain that the measurements do not support."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from made_records import made_finalist, made_fine_tune, made_search
from made_run import (
    PLAN,
    RIVAL,
    SEED_PLAN,
    answers,
    candidate,
    random_rows,
    results_of,
    row_of,
    score,
    searched_row,
)
from scipy import stats

from qpruner.report.claim import claim, comparisons, headline
from qpruner.report.content import ComparedCell
from qpruner.report.results import rows
from qpruner.report.sections import search_text
from qpruner.report.statistics import SAME, Difference
from qpruner.report.tables import by_task
from qpruner.runs.records import (
    BEST_SEARCHED,
    CONFIRMATION,
    GIVEN,
    MERGED,
    RANDOM,
    SEARCHED,
    FineTune,
    Results,
)
from qpruner.search.roles import is_beaten


def line_about(results: Results, other: str) -> str:
    """Return the claim's line about the comparison with a row."""
    begins = {
        RIVAL: "- Against the best control in the budget (not pruned, knapsack)",
        RANDOM: "- Against random plans",
    }[other]
    (line,) = [line for line in claim(results).splitlines() if line.startswith(begins)]
    return line


def differences(results: Results, other: str = RIVAL) -> dict[str, Difference]:
    (found,) = [each.differences for each in comparisons(results) if each.other == other]
    return {each.measure: each for each in found}


def test_a_control_that_won_is_named() -> None:
    scored = [*row_of(BEST_SEARCHED, [2.0]), *searched_row([1.0])]
    fresh = (
        made_finalist(4, "gp", 2.0, plan=SEED_PLAN),
        made_finalist(11, RIVAL, 1.9, plan=PLAN),
    )
    results = results_of(scored, finalists=fresh)
    said = (
        "3.0 times smaller than the base. A plan that needs no search won: not pruned, knapsack; "
    )
    said += "not distinguishable from the best searched plan"
    title = "winner (not pruned, knapsack)"
    assert headline(results) == said and claim(results).splitlines()[0] == f"{said}."
    named = [(BEST_SEARCHED, "best searched plan"), (SEARCHED, title)]
    assert [(row.name, row.title) for row in rows(results)] == named
    assert by_task(results).rows[-1][0] == title
    assert "needs no search" not in claim(results_of([*row_of(RIVAL, [2.0]), *searched_row([1.0])]))


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_headline_says_whether_fine_tuning_first_is_better(num_seeds: int) -> None:
    """The merged model comes beside the best simple alternative, never in its place."""
    tuned = [
        *row_of(RIVAL, [2.0, 2.01, 1.99][:num_seeds]),
        *row_of(MERGED, [1.5, 1.52, 1.48][:num_seeds]),
        *searched_row([1.8, 1.81, 1.79][:num_seeds]),
    ]
    results = results_of(tuned)
    assert [found.other for found in comparisons(results)] == [RIVAL, MERGED]
    beside_rival, _, beside_merged = headline(results).partition(", and ")
    assert "the best simple alternative" in beside_rival
    if num_seeds > 1:
        assert beside_merged.startswith("worse than fine-tuning in 16 bits, then quantizing (+0.3")
    [line] = [line for line in claim(results).splitlines() if "16 bits, then" in line[:60]]
    assert line.startswith("- Against fine-tuning in 16 bits, then quantizing (")


def test_a_plan_that_was_given_is_not_called_searched() -> None:
    results = results_of([*row_of(RIVAL, [2.0]), *searched_row([1.0])], origin=GIVEN)
    assert rows(results)[-1].title == "given plan"
    alone = search_text(made_search(PLAN, finalists=(made_finalist(7, GIVEN, 2.0),)))
    assert alone.startswith("a given plan on loss, "), "no searcher chose it"


@pytest.mark.parametrize(
    ("widths", "verdict"),
    [(0.97, SAME), (-0.97, SAME), (0.0, SAME), (1.03, "worse"), (-1.03, "better")],
)
@pytest.mark.parametrize("other", [RIVAL, RANDOM])
def test_inside_the_interval_nothing_is_distinguishable(
    widths: float, verdict: str, other: str
) -> None:
    """Against one plan the interval is Student's over seeds; against several it predicts one more
    plan."""
    noise = np.array([-0.02, 0.0, 0.02])
    half_width = stats.t.ppf(0.975, 2) * 0.02 * math.sqrt(1 / 3 if other == RIVAL else 1 + 1 / 3)
    ours = 2.0 + noise + widths * half_width
    theirs = row_of(other, [2.0] * 3) if other == RIVAL else random_rows([2.0] * 3, noise)
    results = results_of([*theirs, *searched_row(list(ours))])
    found = differences(results, other)["confirmation loss"]
    assert (found.half_width, found.verdict) == (pytest.approx(half_width), verdict)
    line = line_about(results, other)
    assert ", 3 training seeds, paired: " in line
    assert f"confirmation loss {widths * half_width:+.4f} nats (± 0.0200 over seeds" in line
    assert line.endswith(f"), {verdict}.")
    than = f"{verdict} {'from' if verdict == SAME else 'than'} the best simple alternative"
    than = f"{than} ({widths * half_width:+.3f} ± {half_width:.3f} nats)"
    than = than if other == RIVAL else f"{SAME} from the best simple alternative, both as trials"
    assert headline(results).startswith(f"3.0 times smaller than the base; {than}"), (
        "random plans are no alternative"
    )


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [("loss", "worse than {} (+0.100 ±"), ("accuracy", "better than {} (+0.250 ±")],
)
def test_what_the_search_minimized_decides(metric: str, verdict: str) -> None:
    """Of several measures, each at 95 %, one may differ by chance: the others show their intervals
    alone."""
    off = np.array([0.001, -0.001, 0.0])
    ours, right = list(2.0 + off), [score(answers(400, 200))] * 3
    rivals = row_of(RIVAL, list(1.9 - off), [score(answers(400, 100))] * 3)
    fresh = [
        made_finalist(2, RIVAL, 2.1, plan=SEED_PLAN, accuracy=0.2, accuracy_stderr=0.1),
        made_finalist(11, "gp", 2.0, plan=PLAN, accuracy=0.3, accuracy_stderr=0.1),
    ]
    results = results_of(
        [*rivals, *searched_row(ours, right)], metric=metric, finalists=tuple(fresh)
    )
    assert f"; {verdict.format('the best simple alternative')}" in headline(results)
    found = differences(results)
    decided = {"loss": "confirmation loss", "accuracy": "acc"}[metric]
    assert [measure for measure, each in found.items() if each.verdict] == [decided]
    assert all(each.half_width for each in found.values())


@pytest.mark.parametrize("is_tuned", [True, False])
def test_a_search_by_accuracy_is_never_judged_by_its_loss(is_tuned: bool) -> None:
    """The winner has the higher accuracy and, beyond every doubt, the higher loss."""
    losses = [{0: tuple(mean + 0.001 * (at % 3) for at in range(64))} for mean in (2.0, 2.1)]
    rival = made_finalist(
        2, RIVAL, 2.0, plan=SEED_PLAN, losses=losses[0], accuracy=0.5, accuracy_stderr=0.1
    )
    winner = made_finalist(
        11, "gp", 2.1, plan=PLAN, losses=losses[1], accuracy=0.8, accuracy_stderr=0.1
    )
    rows = row_of(RIVAL, [2.0] * 3, [score(answers(400, 100))] * 3) if is_tuned else []
    rows += searched_row([2.1] * 3, [score(answers(400, 200))] * 3)
    results = results_of(rows, metric="accuracy", finalists=(rival, winner))
    said = "better than the best simple alternative (+0.250 ± "
    if not is_tuned:
        said = (
            "accuracy 0.800 as a trial, that of the best simple alternative 0.500, "
            "on the questions that chose"
        )
    assert f"; {said}" in headline(results) and "worse" not in claim(results)
    assert (
        results.search
        and not is_beaten(rival, results.search)
        and not is_beaten(winner, results.search)
    )


def scored(name: str, seed: int, plan: int, margins: Mapping[str, Any]) -> FineTune:
    """Return a fine-tune: task -> margins of the right answer per question; `rows` -> losses of
    confirmation rows."""
    losses = margins.get("rows", np.zeros(2))
    formats = {f"layers.{bit}": "int8" if plan >> bit & 1 else "nf4" for bit in range(4)}
    tasks = [
        score(list((each > 0).astype(float)), list(-each), task)
        for task, each in margins.items()
        if task != "rows"
    ]
    return made_fine_tune(name, formats, seed, {CONFIRMATION: losses.tolist()}, tasks)


def better_by(gains: np.ndarray) -> list[FineTune]:
    """Return the best seed and the searched plan, which under each of three seeds gains as much on
    each row."""
    theirs, questions = 2.0 + np.arange(len(gains)), {"arc": np.ones(2)}
    losses = {RIVAL: theirs, SEARCHED: theirs - gains}
    return [
        scored(
            name,
            seed,
            4 if name == RIVAL else 8,
            {"rows": losses[name] * (1 + (seed - 1) / 1e6), **questions},
        )
        for name in losses
        for seed in range(3)
    ]


FEW, MANY = np.array([0.8] + [0.0] * 7), np.array([0.18] + [0.1] * 7)
ONE_MORE_PLAN = float(stats.t.ppf(0.975, 2)) * 0.1 * math.sqrt(1 + 1 / 3)
# Questions are as hard for both plans; unpaired, their spread would drown the difference.
THEIRS = {"arc": np.random.default_rng(4).gamma(2.0, 1.0, 60), "rows": np.array([2.0])}
OURS = {"arc": THEIRS["arc"] + np.linspace(-0.1, 0.2, 60), "rows": np.array([1.0])}
ONE_SEED = " under training seed 1 alone)"
AGREED, THREE_OF_FOUR = [score(answers(50, 21))] * 3, [score(answers(4, 3))]
FEWER, MORE = ([score(answers(400, right))] for right in (200, 240))
RANDOM_LOSSES = [2.42, 2.5, 2.28]
ROWS = {
    "one more right answer": [*row_of(RIVAL, [2.0] * 3), *searched_row([1.9] * 3, AGREED)],
    "better on one row": better_by(FEW),
    "better on every row": better_by(MANY),
    "two seeds in common": [*row_of(RIVAL, [2.0, 2.2]), *searched_row([1.0, 1.1, 7.0])],
    "nine fine-tunes of three plans": [
        *random_rows(RANDOM_LOSSES, [0.1, 0.0, -0.1]),
        *searched_row([2.0, 2.1, 1.9]),
    ],
    "random plans tie": [
        *row_of(RANDOM, [2.0], THREE_OF_FOUR),
        *row_of(RANDOM, [2.0], THREE_OF_FOUR, plan={"layers.0": "nf4", "layers.1": "bf16"}),
        *searched_row([2.0], [score(answers(4, 4))]),
    ],
    "forty more right answers": [*row_of(RIVAL, [2.0], FEWER), *searched_row([2.0], MORE)],
    "forty fewer right answers": [*row_of(RIVAL, [2.0], MORE), *searched_row([2.0], FEWER)],
    "one training seed": [scored(RIVAL, 1, 4, THEIRS), scored(SEARCHED, 1, 8, OURS)],
    "the other way": [scored(RIVAL, 1, 4, OURS), scored(SEARCHED, 1, 8, THEIRS)],
    "one question": [
        *row_of(RIVAL, [2.0], [score([0.0], [3.0])]),
        *searched_row([1.0], [score([1.0], [0.1])]),
    ],
}


def over_rows(gains: Sequence[float]) -> float:
    count = len(gains)
    return float(stats.t.ppf(0.975, count - 1) * np.std(gains, ddof=1) / math.sqrt(count))


@pytest.mark.parametrize(
    ("case", "measure", "verdict", "mean", "half_width", "said"),
    [
        # Under every seed alike, so it has no spread over seeds, but other questions would differ.
        (
            "one more right answer",
            "acc",
            None,
            0.02,
            over_rows(answers(50, 1)),
            "(± 0.0000 over seeds, 50 questions, ",
        ),
        # Equal to the last bit is no spread of zero.
        (
            "one more right answer",
            "confirmation loss",
            SAME,
            -0.1,
            0.0,
            "3 training seeds, paired: ",
        ),
        # On one row of eight, it says little about other rows, even if every seed agrees.
        (
            "better on one row",
            "confirmation loss",
            SAME,
            -0.1,
            over_rows(FEW),
            "over seeds, 8 rows, 95 % interval",
        ),
        (
            "better on every row",
            "confirmation loss",
            "better",
            -0.11,
            over_rows(MANY),
            "8 rows, 95 % interval",
        ),
        (
            "two seeds in common",
            "confirmation loss",
            "better",
            -1.05,
            None,
            ", 2 training seeds, paired: ",
        ),
        # The interval is for one more plan, of three values. Student's interval for the mean of the
        # plans, or of nine fine-tunes, would make it "better".
        (
            "nine fine-tunes of three plans",
            "confirmation loss",
            SAME,
            -0.4,
            ONE_MORE_PLAN,
            "(± 0.0200 over seeds",
        ),
        # On few questions accuracies may be equal by chance, which does not prove that plans are
        # equal.
        ("random plans tie", "acc", None, 0.25, 0.0, "4 questions"),
        (
            "forty more right answers",
            "acc",
            None,
            0.1,
            over_rows(answers(400, 40)),
            " under training seed 0 alone); ",
        ),
        (
            "forty fewer right answers",
            "acc",
            None,
            -0.1,
            over_rows(answers(400, 40)),
            " under training seed 0 alone); ",
        ),
        (
            "one training seed",
            "answer loss",
            None,
            -0.05,
            over_rows(OURS["arc"] - THEIRS["arc"]),
            ONE_SEED,
        ),
        (
            "the other way",
            "answer loss",
            None,
            0.05,
            over_rows(OURS["arc"] - THEIRS["arc"]),
            ONE_SEED,
        ),
        (
            "one training seed",
            "confirmation loss",
            SAME,
            -1.0,
            None,
            "-1.0000 nats (1 row, no interval)",
        ),
        # Users often try `evaluate.limit: 1` first, and one answer has no spread.
        ("one question", "acc", None, 1.0, None, "acc +1.0000 (1 question, no interval)"),
        ("one question", "answer loss", None, -2.9, None, "1 question, no interval"),
    ],
)
def test_a_verdict_needs_a_difference_beyond_its_interval(
    case: str, measure: str, verdict: str | None, mean: float, half_width: float | None, said: str
) -> None:
    other, results = ROWS[case][0].name, results_of(ROWS[case])
    found = differences(results, other)[measure]
    assert (found.verdict, found.mean) == (verdict, pytest.approx(mean))
    assert said in line_about(results, other)
    if half_width is not None:
        assert found.half_width == pytest.approx(half_width)


@pytest.mark.parametrize(
    ("measure", "mean", "half_width", "drawn"),
    [
        ("confirmation loss", -0.3, 0.1, "2.0  [       |  --o--]"),
        ("confirmation loss", 0.3, 0.1, "2.0  [--o--  |       ]"),
        ("acc", 0.1, 0.0999, "2.0  [       |---o---]"),
        ("acc", 0.01, 0.1, "2.0  [ ------|o------]"),
        ("acc", 0.1, None, "2.0  "),
    ],
)
def test_an_interval_is_drawn_with_better_to_the_right(
    measure: str, mean: float, half_width: float | None, drawn: str
) -> None:
    """One that excludes zero does not touch the middle."""
    found = Difference(measure, mean, None, half_width, num_pairs=8, seeds=(0,), verdict=SAME)
    assert str(ComparedCell("2.0", difference=found)) == drawn


def test_one_random_plan_says_nothing_of_random_plans() -> None:
    """With one random plan, the row is in the table, but the claim says nothing of random plans."""
    losses = [2.0, 2.1, 1.9]
    results = results_of(
        [*row_of(RIVAL, losses), *random_rows(losses, [0.0]), *searched_row([1.0, 1.11, 0.9])]
    )
    first, *lines = claim(results).splitlines()
    assert "; better than the best simple alternative (-0.997 ±" in first
    assert lines[0].startswith("- Against the best control") and not any(
        "random" in line for line in lines
    )
    assert RANDOM in [row.name for row in rows(results)]


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_task_without_choices_leaves_the_answer_loss_out(lacking: int) -> None:
    """A mean over some tasks would look like a mean over all tasks."""
    losses: list[list[float]] = [[1.0, 2.0, 3.0, 4.0]] * 2
    losses[lacking] = []
    scores = tuple(
        score([1.0, 0.0, 1.0, 0.0], each, f"task-{number}") for number, each in enumerate(losses)
    )
    results = results_of(
        [candidate(RIVAL, SEED_PLAN, tasks=scores), candidate(SEARCHED, PLAN, tasks=scores)]
    )
    assert "answer loss" not in claim(results)
    assert differences(results)["acc"].num_pairs == 8
    assert rows(results)[0].answer_loss is None


def test_a_winner_alone_claims_nothing_at_equal_bytes() -> None:
    alone = results_of(searched_row([1.0]), finalists=(made_finalist(11, "gp", 2.0),))
    lead, *others = claim(alone).splitlines()
    assert lead == "3.0 times smaller than the base; compared with no other plan."
    assert others == ["- No other plan had this fine-tune, so nothing is claimed at equal bytes."]


def test_a_control_without_a_result_is_in_the_headline() -> None:
    lost = {RIVAL: "out of memory: no room (micro-batch 1)", "paper": "not tried, because x"}
    results = results_of([*row_of(RIVAL, [2.0]), *searched_row([1.0])], lost_controls=lost)
    said = "; 2 simple alternatives without a result (not pruned, knapsack), (the paper's flow)"
    assert headline(results).endswith(said)
    assert claim(results).splitlines()[-2:] == [
        "- Without a result: not pruned, knapsack, out of memory: no room (micro-batch 1).",
        "- Without a result: the paper's flow, not tried, because x.",
    ]


# ---- several tasks, and how often the claim speaks where there is nothing to say


def test_the_claim_never_contradicts_the_table() -> None:
    """HellaSwag has half of all questions; a gain there and a loss on each of six other tasks is a
    loss overall."""
    generator = np.random.default_rng(0)
    questions = {"boolq": 330, "piqa": 184, "hellaswag": 1004, "winogrande": 127}
    questions |= {"arc_easy": 238, "arc_challenge": 117, "openbookqa": 50}
    theirs = {task: generator.normal(0.3, 1, count) for task, count in questions.items()}
    gains = {task: 0.5 if task == "hellaswag" else -0.12 for task in questions}
    ours = {task: margins + gains[task] for task, margins in theirs.items()}
    given = results_of([scored(RIVAL, 1, 4, theirs), scored(SEARCHED, 1, 8, ours)])
    pooled = np.concatenate([(ours[task] > 0) * 1.0 - (theirs[task] > 0) for task in questions])
    assert pooled.mean() > 1.96 * pooled.std(ddof=1) / np.sqrt(len(pooled)), (
        "so better, by all questions at once"
    )
    table = {row.name: row for row in rows(given)}
    assert table[SEARCHED].accuracy < table[RIVAL].accuracy
    found = differences(given)["acc"]
    assert found.mean == pytest.approx(table[SEARCHED].accuracy - table[RIVAL].accuracy)
    assert found.mean - (found.half_width or 0.0) < 0 and found.num_pairs == sum(questions.values())
    loss = differences(given)["answer loss"]
    assert loss.mean == pytest.approx(-np.mean(list(gains.values())))


@pytest.mark.parametrize(("spread", "num_random", "num_seeds"), [(0.05, 3, 2), (0.2, 5, 1)])
def test_one_more_random_plan_seems_different_in_5_percent(
    spread: float, num_random: int, num_seeds: int
) -> None:
    """Plans differ little in one case, and more in the other; the searched plan is one more random
    plan.

    Margins have random effects of questions, plans and seeds, of plan with seed, and of question
    with plan and with fine-tune.
    """
    generator = np.random.default_rng(num_random + num_seeds)
    plans, number = num_random + 1, 700

    def margins(count: int) -> np.ndarray[Any, Any]:
        of_all = [(spread, (plans, 1, 1)), (0.04, (1, num_seeds, 1)), (0.03, (plans, num_seeds, 1))]
        of_questions = [
            (1.0, (1, 1, count)),
            (0.2, (plans, 1, count)),
            (0.1, (plans, num_seeds, count)),
        ]
        return 0.3 + sum(
            generator.normal(0, size, shape) for size, shape in [*of_all, *of_questions]
        )

    spoke: Counter[str] = Counter()
    for _ in range(number):
        drawn = {
            task: margins(count) for task, count in {"rows": 20, "arc": 20, "boolq": 50}.items()
        }
        own = [
            scored(
                RANDOM if plan else SEARCHED,
                seed,
                plan,
                {task: each[plan, seed] for task, each in drawn.items()},
            )
            for plan in (*range(1, plans), 0)
            for seed in range(num_seeds)
        ]
        found = differences(results_of(own), RANDOM)
        spoke.update(
            {name: abs(each.mean) > (each.half_width or math.inf) for name, each in found.items()}
        )
    assert set(spoke) == {"acc", "answer loss", "confirmation loss"}
    shares = {measure: count / number for measure, count in spoke.items()}
    assert all(0.03 <= share <= 0.07 for share in shares.values()), shares
