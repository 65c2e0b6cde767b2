"""The table and the claim under it: nobody may read a gain into the report that the measurements do not carry."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from qpruner.records import (
    BankRecord,
    CandidateRecord,
    Confirmation,
    EvalRecord,
    FinetuneRecord,
    LayerWidths,
    PrepareRecord,
    PruneRecord,
    Results,
    SearchRecord,
    SensitivityRecord,
    TaskScore,
)
from qpruner.report.markdown import cells, render
from qpruner.report.table import SEARCHED, SEED, claim, rows

PLAN = {"layers.0": 8, "layers.1": 4}
SEED_PLAN = {"layers.0": 4, "layers.1": 8}
STAGE = {"digest": "0" * 16, "seconds": 1.5}
SAME = "not distinguishable"
BEYOND = "beyond the 95 % interval of this one training seed"


def candidate(name: str, plan: dict[str, int], measured_bytes: int = 100_000_000) -> CandidateRecord:
    return CandidateRecord(
        **STAGE,
        name=name,
        plan=plan,
        plan_bytes=measured_bytes,
        measured_bytes=measured_bytes,
        mean_bits=sum(plan.values()) / len(plan),
        num_parameters=120_000_000,
        steps=40,
        train_loss=1.9,
        validation_loss=2.125,
        peak_memory_bytes=900_000_000,
        memory_counter="rss",
    )


def score(correct: list[float], answer_loss: list[float] | None = None, task: str = "arc") -> TaskScore:
    value = sum(correct) / len(correct)
    stderr = math.sqrt(value * (1 - value) / (len(correct) - 1)) if len(correct) > 1 else math.nan
    return TaskScore(
        task=task,
        metric="acc",
        value=value,
        stderr=stderr,
        num_questions=len(correct),
        correct=tuple(correct),
        answer_loss=tuple(answer_loss or ()),
    )


def results_of(
    candidates: list[CandidateRecord],
    scores: dict[str, tuple[TaskScore, ...]],
    best_origin: str = "hyperopt",
) -> Results:
    searched = candidates[-1]
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
            estimator="KSG",
            source="arXiv cond-mat/0305641",
            bias="less the shuffled baseline",
            num_positions=64,
            num_classes=9,
            groups=tuple(PLAN),
            mutual_information_nats=(0.5125, 0.25),
            raw_nats=(0.6, 0.3),
            baseline_nats=(0.0875, 0.05),
        ),
        bank=BankRecord(**STAGE, files={}, bytes=1, residual_ratio={}),
        search=SearchRecord(
            **STAGE,
            trials_digest="1" * 16,
            searcher="hyperopt",
            budget_bytes=101_500_000,
            num_trials=16,
            num_finished=7,
            num_stopped=8,
            num_failed=1,
            confirmations=(Confirmation(index=11, loss=2.0625, stderr=0.03125),),
            best_index=11,
            best_origin=best_origin,
            best_plan=searched.plan,
            resumed=3,
        ),
        finetune=FinetuneRecord(**STAGE, winner=SEARCHED, candidates=tuple(candidates)),
        evaluate=EvalRecord(**STAGE, scores=scores),
    )


def compared(
    seed: tuple[TaskScore, ...],
    searched: tuple[TaskScore, ...],
    seed_bytes: int = 100_000_000,
    searched_bytes: int = 100_000_000,
    **changes: Any,
) -> Results:
    rows = [candidate(SEED, SEED_PLAN, seed_bytes), candidate(SEARCHED, PLAN, searched_bytes)]
    return results_of(rows, {SEED: seed, SEARCHED: searched}, **changes)


def parts_of(text: str) -> dict[str, str]:
    """What is said of accuracy and of answer loss, each by itself."""
    _, _, stated = text.rstrip(".").partition("): ")
    return {"answer loss" if part.startswith("answer loss") else "accuracy": part for part in stated.split("; ")}


def figures(part: str) -> tuple[float, float, int]:
    """Difference, standard error and number of pairs as they are written."""
    found = re.search(r"([+-]\d+\.\d+)(?: nats)? \+- (\d+\.\d+) \((\d+) questions, paired\)", part)
    assert found, part
    return float(found[1]), float(found[2]), int(found[3])


def answers(num_questions: int, num_correct: int) -> list[float]:
    return [1.0] * num_correct + [0.0] * (num_questions - num_correct)


# What is no claim


def test_without_a_row_to_compare_with_there_is_no_claim() -> None:
    alone = (score(answers(50, 49), [0.1] * 50),)
    text = claim(results_of([candidate(SEARCHED, PLAN)], {SEARCHED: alone}))
    assert text.startswith("No claim")
    assert "`finetune.compare`" in text
    assert "better" not in text


def test_a_search_that_returns_the_seed_says_so_whatever_the_scores() -> None:
    """The rows share one fine-tune; were they scored apart, noise must still not look like a gain."""
    rows = [candidate(SEED, PLAN), candidate(SEARCHED, PLAN)]
    scores = {SEED: (score(answers(50, 1), [3.0] * 50),), SEARCHED: (score(answers(50, 49), [0.1] * 50),)}
    text = claim(results_of(rows, scores))
    assert "returned the mutual-information seed plan itself" in text
    assert "better" not in text and "accuracy" not in text


@pytest.mark.parametrize(
    ("searched_bytes", "told"), [(101_100_000, "1.1% more"), (98_900_000, "1.1% fewer"), (150_000_000, "50.0% more")]
)
def test_other_bytes_are_no_comparison_in_either_direction(searched_bytes: int, told: str) -> None:
    seed, searched = score(answers(50, 1), [3.0] * 50), score(answers(50, 49), [0.1] * 50)
    text = claim(compared((seed,), (searched,), searched_bytes=searched_bytes))
    assert text.startswith("No claim at equal bytes")
    assert told in text
    assert f"{searched_bytes / 1e6:.2f} MB against 100.00 MB" in text
    assert "better" not in text and "accuracy" not in text


@pytest.mark.parametrize("searched_bytes", [100_900_000, 99_100_000])
def test_a_percent_either_way_counts_as_equal_bytes(searched_bytes: int) -> None:
    text = claim(compared((score(answers(50, 20)),), (score(answers(50, 20)),), searched_bytes=searched_bytes))
    assert text.startswith("Searched against the mutual-information seed at equal bytes")
    assert f"({searched_bytes / 1e6:.2f} MB against 100.00 MB)" in text


# What the measurements carry


def test_the_figures_are_those_of_a_paired_comparison() -> None:
    generator = np.random.default_rng(4)
    seed_correct, searched_correct = generator.integers(0, 2, (2, 60)).astype(float)
    hardness = generator.gamma(2.0, 1.0, 60)
    seed_loss, searched_loss = hardness + generator.normal(0, 0.1, (2, 60))
    text = claim(
        compared(
            (score(list(seed_correct), list(seed_loss)),),
            (score(list(searched_correct), list(searched_loss)),),
        )
    )
    parts = parts_of(text)
    for name, first, second in (
        ("accuracy", seed_correct, searched_correct),
        ("answer loss", seed_loss, searched_loss),
    ):
        differences = second - first
        expected = (np.mean(differences), np.std(differences, ddof=1) / np.sqrt(60))
        difference, stderr, count = figures(parts[name])
        assert difference == pytest.approx(expected[0], abs=6e-4)
        assert stderr == pytest.approx(expected[1], abs=6e-5)
        assert count == 60
    # Unpaired, the spread of the questions themselves would drown the difference.
    assert figures(parts["answer loss"])[1] < 0.2 * np.std(seed_loss) / np.sqrt(60)


def test_several_tasks_are_pooled_by_question() -> None:
    generator = np.random.default_rng(5)
    sizes = {"arc": 30, "piqa": 70}
    seed = {name: generator.normal(2, 1, size) for name, size in sizes.items()}
    searched = {name: values + generator.normal(0.05, 0.2, len(values)) for name, values in seed.items()}
    correct = {name: generator.integers(0, 2, (2, size)).astype(float) for name, size in sizes.items()}

    def scores(losses: dict[str, Any], row: int) -> tuple[TaskScore, ...]:
        return tuple(score(list(correct[name][row]), list(losses[name]), name) for name in sizes)

    parts = parts_of(claim(compared(scores(seed, 0), scores(searched, 1))))
    for name, pooled in (
        ("answer loss", np.concatenate([searched[task] - seed[task] for task in sizes])),
        ("accuracy", np.concatenate([correct[task][1] - correct[task][0] for task in sizes])),
    ):
        difference, stderr, count = figures(parts[name])
        assert count == 100
        assert difference == pytest.approx(pooled.mean(), abs=6e-4)
        assert stderr == pytest.approx(pooled.std(ddof=1) / 10, abs=6e-5)


@pytest.mark.parametrize(
    ("stderrs", "verdict"), [(1.95, SAME), (-1.95, SAME), (0.0, SAME), (1.97, "worse"), (-1.97, "better")]
)
def test_an_answer_loss_is_better_when_smaller_beyond_1_96_standard_errors(stderrs: float, verdict: str) -> None:
    noise = np.random.default_rng(6).normal(0, 0.3, 80)
    noise -= noise.mean()
    seed = np.random.default_rng(7).gamma(2.0, 1.0, 80)
    searched = seed + noise + stderrs * noise.std(ddof=1) / math.sqrt(80)
    same = answers(80, 40)
    parts = parts_of(claim(compared((score(same, list(seed)),), (score(same, list(searched)),))))
    assert parts["answer loss"].endswith(verdict if verdict == SAME else f"{verdict} {BEYOND}")
    assert parts["accuracy"].endswith(SAME), "equal answers say nothing"


@pytest.mark.parametrize(
    ("seed_correct", "searched_correct", "verdict"),
    # Of 100 questions 4 gained are 2.03 standard errors, 3 are 1.75.
    [(50, 54, "better"), (54, 50, "worse"), (50, 53, SAME), (53, 50, SAME), (50, 50, SAME)],
)
def test_an_accuracy_is_better_when_larger_beyond_1_96_standard_errors(
    seed_correct: int, searched_correct: int, verdict: str
) -> None:
    seed, searched = score(answers(100, seed_correct)), score(answers(100, searched_correct))
    part = parts_of(claim(compared((seed,), (searched,))))["accuracy"]
    assert part.endswith(verdict if verdict == SAME else f"{verdict} {BEYOND}")


def test_the_two_measures_may_disagree() -> None:
    losses = np.random.default_rng(8).gamma(2.0, 1.0, 100)
    seed, searched = score(answers(100, 50), list(losses)), score(answers(100, 60), list(losses + 1 + 0.1 * losses))
    parts = parts_of(claim(compared((seed,), (searched,))))
    assert parts["accuracy"].endswith(f"better {BEYOND}")
    assert parts["answer loss"].endswith(f"worse {BEYOND}")


def test_one_question_distinguishes_nothing() -> None:
    """`evaluate.limit: 1` is what people try first; one answer has no spread to speak of."""
    text = claim(compared((score([0.0], [3.0]),), (score([1.0], [0.1]),)))
    assert "better" not in text and "worse" not in text


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_task_without_choices_leaves_the_answer_loss_out(lacking: int) -> None:
    """A mean over some of the tasks would be taken for one over all."""
    losses: list[list[float] | None] = [[1.0, 2.0, 3.0, 4.0]] * 2
    losses[lacking] = None
    scores = tuple(score([1.0, 0.0, 1.0, 0.0], each, f"task-{number}") for number, each in enumerate(losses))
    text = claim(compared(scores, scores))
    assert list(parts_of(text)) == ["accuracy"]
    assert figures(parts_of(text)["accuracy"])[2] == 8
    assert "answer loss" not in text


@pytest.mark.parametrize("origin", ["uniform-4", "seed-mutual-information"])
def test_a_winner_that_the_search_did_not_find_is_named(origin: str) -> None:
    scores = (score(answers(50, 20)),)
    assert f"the winner is the control {origin}" in claim(compared(scores, scores, best_origin=origin))
    assert "control" not in claim(compared(scores, scores, best_origin="hyperopt"))


# The table and the report


@pytest.fixture
def whole() -> Results:
    """A finished run with every row, on two tasks."""
    plans = {
        "base": {"layers.0": 16, "layers.1": 16},
        "pruned": {"layers.0": 16, "layers.1": 16},
        "uniform 4-bit": {"layers.0": 4, "layers.1": 4},
        "uniform 8-bit": {"layers.0": 8, "layers.1": 8},
        SEED: SEED_PLAN,
        SEARCHED: PLAN,
    }
    candidates = [
        candidate(name, plan, 100_000_000 + 100_000 * number) for number, (name, plan) in enumerate(plans.items())
    ]
    scored = [*plans, "base (no fine-tune)", "pruned (no fine-tune)"]
    scores = {
        name: (score(answers(50, 10 + number)), score(answers(40, 30 - number), task="piqa"))
        for number, name in enumerate(scored)
    }
    return results_of(candidates, scores)


def test_a_row_is_the_mean_of_its_tasks(whole: Results) -> None:
    table = rows(whole)
    assert [row.name for row in table] == ["base", "pruned", "uniform 4-bit", "uniform 8-bit", SEED, SEARCHED]
    assert [row.plan for row in table] == ["FF", "FF", "44", "88", "48", "84"]
    first = table[0]
    assert first.accuracy == pytest.approx((10 / 50 + 30 / 40) / 2)
    variances = [0.2 * 0.8 / 49, 0.75 * 0.25 / 39]
    assert first.accuracy_stderr == pytest.approx(math.sqrt(sum(variances)) / 2)
    assert [row.measured_bytes for row in table] == [100_000_000 + 100_000 * number for number in range(6)]


def test_the_report_holds_every_row_the_claim_and_the_configuration(whole: Results) -> None:
    config = "output: runs/demo\nlora:\n  rank: 8\n"
    text = render(whole, "demo", config, {"python": "3.11.9", "torch": "2.13.0"})
    lines = text.splitlines()
    for row in rows(whole):
        assert "| " + " | ".join(cells(row)) + " |" in lines
    assert f"\n\n{claim(whole)}\n\n" in text
    assert f"```yaml\n{config}```" in text
    assert "- python: 3.11.9" in lines and "- torch: 2.13.0" in lines
    for name in ("base (no fine-tune)", "pruned (no fine-tune)"):
        line = next(line for line in lines if line.startswith(f"- {name}: "))
        for each in whole.evaluate.scores[name]:  # type: ignore[union-attr]
            told = f"{each.task} acc {each.value:.3f} +- {each.stderr:.3f} ({each.num_questions} questions)"
            assert told in line


def test_the_report_tells_how_search_and_pruning_ended(whole: Results) -> None:
    text = render(whole, "demo", "output: x\n", {})
    assert "16 trials, 7 finished, 8 stopped early, 1 failed" in text
    assert "Resumed with 3 trial(s)" in text
    assert "| 11 | 2.0625 | 0.0312 |" in text
    assert "| layers.0 | 0.5125 | 8 |" in text
    assert "| layers.1 | 0.2500 | 4 |" in text
    assert "target 20.00% of all parameters, achieved 19.84%" in text
    assert "150,000,000 -> 120,240,000 parameters, 300.0 -> 240.5 MB" in text
    assert "| 0 | 1 of 2 | 1 of 2 | 2 of 4 | 50.0% |" in text


def test_no_cell_of_the_table_breaks_it(whole: Results) -> None:
    lines = render(whole, "demo", "output: x\n", {}).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| row |"))
    table = lines[start : start + 8]
    assert len({line.count("|") for line in table}) == 1
    assert lines[start + 8] == ""
