"""What the claim and the table say of several tasks, and how often the claim speaks where there is nothing to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from made_rows import Scored, candidate, results_of, score

from qpruner.report.claim import comparisons
from qpruner.report.results import BEST_SEED, RANDOM, SEARCHED, rows
from qpruner.report.statistics import SAME, Difference
from qpruner.runs.records import Results

QUESTIONS = {
    "boolq": 330,
    "piqa": 184,
    "hellaswag": 1004,
    "winogrande": 127,
    "arc_easy": 238,
    "arc_challenge": 117,
    "openbookqa": 50,
}
"""A tenth of those of the seven tasks of the recipes."""


def scored(name: str, seed: int, plan: int, margins: Mapping[str, Any]) -> Scored:
    """A fine-tune by its margins of the right answer over the others, a task each; those of `rows` are losses."""
    losses = margins.get("rows", np.zeros(2))
    tuned = candidate(name, {"layers.0": plan}, seed=seed, confirmation_loss=float(losses.mean()))
    tasks = (
        score(list((each > 0).astype(float)), list(-each), task) for task, each in margins.items() if task != "rows"
    )
    return tuned.model_copy(update={"confirmation_losses": tuple(losses.tolist())}), tuple(tasks)


def differences(results: Results, other: str) -> dict[str, Difference]:
    (found,) = [each.differences for each in comparisons(results) if each.other == other]
    return {each.measure: each for each in found}


def test_the_claim_never_contradicts_the_table() -> None:
    """HellaSwag is half of all questions: what is gained there and lost on each of six other tasks is a loss."""
    generator = np.random.default_rng(0)
    theirs = {task: generator.normal(0.3, 1, count) for task, count in QUESTIONS.items()}
    gains = {task: 0.5 if task == "hellaswag" else -0.12 for task in QUESTIONS}
    ours = {task: margins + gains[task] for task, margins in theirs.items()}
    given = results_of([scored(BEST_SEED, 1, 4, theirs), scored(SEARCHED, 1, 8, ours)])
    pooled = np.concatenate([(ours[task] > 0) * 1.0 - (theirs[task] > 0) for task in QUESTIONS])
    assert pooled.mean() > 1.96 * pooled.std(ddof=1) / np.sqrt(len(pooled)), "so better, by all questions at once"
    table = {row.name: row for row in rows(given)}
    assert table[SEARCHED].accuracy < table[BEST_SEED].accuracy
    found = differences(given, BEST_SEED)["acc"]
    assert found.mean == pytest.approx(table[SEARCHED].accuracy - table[BEST_SEED].accuracy)
    assert found.verdict != "better" and found.num_pairs == sum(QUESTIONS.values())
    loss = differences(given, BEST_SEED)["answer loss"]
    assert loss.mean == pytest.approx(-np.mean(list(gains.values())))


@pytest.mark.parametrize(("spread", "num_random", "num_seeds"), [(0.05, 3, 2), (0.2, 5, 1)])
def test_one_more_random_plan_is_told_apart_in_5_percent(spread: float, num_random: int, num_seeds: int) -> None:
    """Where plans differ little beside seeds and questions, and where they differ more.

    Questions are hard or easy for all, plans and seeds better or worse, each plan is lucky with single questions, and
    with single seeds, and each fine-tune with single questions. The searched plan is one more random plan.
    """
    generator = np.random.default_rng(num_random + num_seeds)
    plans, number = num_random + 1, 2000

    def margins(count: int) -> np.ndarray[Any, Any]:
        of_all = [(spread, (plans, 1, 1)), (0.04, (1, num_seeds, 1)), (0.03, (plans, num_seeds, 1))]
        of_questions = [(1.0, (1, 1, count)), (0.2, (plans, 1, count)), (0.1, (plans, num_seeds, count))]
        return 0.3 + sum(generator.normal(0, size, shape) for size, shape in [*of_all, *of_questions])

    spoke: Counter[str] = Counter()
    for _ in range(number):
        drawn = {task: margins(count) for task, count in {"rows": 20, "arc": 20, "boolq": 50}.items()}
        own = [
            scored(RANDOM if plan else SEARCHED, seed, plan, {task: each[plan, seed] for task, each in drawn.items()})
            for plan in (*range(1, plans), 0)
            for seed in range(num_seeds)
        ]
        found = differences(results_of(own), RANDOM)
        spoke.update({measure: each.verdict != SAME for measure, each in found.items()})
    assert set(spoke) == {"acc", "answer loss", "confirmation loss"}
    shares = {measure: count / number for measure, count in spoke.items()}
    assert all(0.04 <= share <= 0.06 for share in shares.values()), shares


def test_accuracies_that_tie_show_no_difference() -> None:
    """Of few questions random plans have the same accuracy by chance, which is no evidence that plans do not differ."""
    theirs = {"arc": np.array([1.0, 1.0, 1.0, -1.0])}
    ours = {"arc": np.array([1.0, 1.0, 1.0, 1.0])}
    random = [scored(RANDOM, 1, plan, theirs) for plan in (4, 8)]
    found = differences(results_of([*random, scored(SEARCHED, 1, 16, ours)]), RANDOM)
    assert found["acc"].mean == 0.25 and found["acc"].verdict == SAME
