"""The demo's own rows: what the numbers of the README rest on."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from itertools import combinations
from typing import Any

import pytest

from qpruner.config.schema import DataSource
from qpruner.data.sources import check_disjoint, load_examples, normalized

DATA = files("qpruner") / "demo" / "data"
SPLITS = ("train", "validation", "confirmation", "test")
LETTERS = ["A", "B", "C", "D"]


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict[str, Any]]]:
    return {split: rows_of(f"questions_{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def instructions() -> list[dict[str, Any]]:
    return rows_of("instructions.jsonl")


def test_there_are_enough_questions_in_every_split(questions: dict[str, list[dict[str, Any]]]) -> None:
    assert sum(map(len, questions.values())) >= 400
    assert len(questions["train"]) >= 200
    assert all(len(questions[split]) >= 90 for split in ("validation", "confirmation", "test"))


def test_no_instruction_or_question_is_without_words(
    questions: dict[str, list[dict[str, Any]]], instructions: list[dict[str, Any]]
) -> None:
    for row in (row for rows in questions.values() for row in rows):
        assert len(normalized(row["question"]).split()) >= 3, row
        assert all(text.strip() == text and text for text in row["choices"]["text"]), row
    for row in instructions:
        assert row["instruction"].strip(), row
        assert row["output"].strip(), row


def test_every_question_has_four_different_choices_and_one_answer(
    questions: dict[str, list[dict[str, Any]]],
) -> None:
    for row in (row for rows in questions.values() for row in rows):
        assert row["choices"]["label"] == LETTERS, row
        assert len(row["choices"]["text"]) == 4, row
        assert len({normalized(text) for text in row["choices"]["text"]}) == 4, row
        assert row["answerKey"] in LETTERS, row


@pytest.mark.parametrize("split", SPLITS)
def test_no_letter_is_a_better_guess_than_another(questions: dict[str, list[dict[str, Any]]], split: str) -> None:
    counts = Counter(row["answerKey"] for row in questions[split])
    for letter in LETTERS:
        assert 0.20 <= counts[letter] / len(questions[split]) <= 0.30, (split, letter, counts)


@pytest.mark.parametrize("split", SPLITS)
def test_length_does_not_give_the_answer_away(questions: dict[str, list[dict[str, Any]]], split: str) -> None:
    """Chance is 25 %: choosing the longest or the shortest choice must not be a strategy."""
    for pick in (max, min):
        right = sum(
            row["answerKey"] == LETTERS[texts.index(pick(texts, key=len))]
            for row in questions[split]
            for texts in [row["choices"]["text"]]
        )
        assert right / len(questions[split]) < 0.45, (split, pick.__name__)


def test_no_question_stands_twice(questions: dict[str, list[dict[str, Any]]]) -> None:
    counts = Counter(normalized(row["question"]) for rows in questions.values() for row in rows)
    assert [question for question, count in counts.items() if count > 1] == []
    identifiers = Counter(row["id"] for rows in questions.values() for row in rows)
    assert [identifier for identifier, count in identifiers.items() if count > 1] == []


def test_the_questions_are_not_made_from_a_few_patterns(questions: dict[str, list[dict[str, Any]]]) -> None:
    starts = Counter(" ".join(normalized(row["question"]).split()[:4]) for rows in questions.values() for row in rows)
    assert [(start, count) for start, count in starts.items() if count > 5] == []


def identities_of(
    questions: dict[str, list[dict[str, Any]]], instructions: list[dict[str, Any]]
) -> dict[str, list[str]]:
    identities = {split: [normalized(row["question"]) for row in rows] for split, rows in questions.items()}
    return identities | {"instructions": [normalized(f"{row['instruction']} {row['input']}") for row in instructions]}


def test_no_row_stands_in_two_splits(
    questions: dict[str, list[dict[str, Any]]], instructions: list[dict[str, Any]]
) -> None:
    identities = identities_of(questions, instructions)
    identities["train"] += identities.pop("instructions")
    check_disjoint(identities)
    # Not even with the words in another order.
    bags = {name: {tuple(sorted(text.split())) for text in texts} for name, texts in identities.items()}
    for one, other in combinations(bags, 2):
        assert bags[one] & bags[other] == set(), (one, other)


def test_no_training_question_is_an_instruction_too(
    questions: dict[str, list[dict[str, Any]]], instructions: list[dict[str, Any]]
) -> None:
    """Both are trained on together, so such a row would count twice."""
    identities = identities_of(questions, instructions)
    assert set(identities["train"]) & set(identities["instructions"]) == set()


def test_there_are_enough_instructions_and_each_is_its_own(instructions: list[dict[str, Any]]) -> None:
    assert len(instructions) >= 300
    counts = Counter(normalized(f"{row['instruction']} {row['input']}") for row in instructions)
    assert [text for text, count in counts.items() if count > 1] == []


def test_the_loader_reads_every_file_as_the_configurations_name_it(
    questions: dict[str, list[dict[str, Any]]], instructions: list[dict[str, Any]]
) -> None:
    for split, rows in questions.items():
        source = DataSource(source=f"package:qpruner/demo/data/questions_{split}.jsonl", format="multiple_choice")
        examples = load_examples([source], "data.train")
        answers = [row["choices"]["text"][LETTERS.index(row["answerKey"])] for row in rows]
        assert [example.response for example in examples] == answers
    found = load_examples([DataSource(source="package:qpruner/demo/data/instructions.jsonl")], "data.train")
    assert [example.response for example in found] == [row["output"] for row in instructions]
