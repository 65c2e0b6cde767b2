"""The demo's data are sound: the numbers in the README depend on them."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from conftest import demo_rows

from qpruner.data.sources import normalized

SPLITS = ("train", "validation", "confirmation", "test")
LETTERS = ["A", "B", "C", "D"]
QUESTIONS: dict[str, list[dict[str, Any]]] = {split: demo_rows(f"questions_{split}.jsonl") for split in SPLITS}
EVERY_QUESTION = [row for rows in QUESTIONS.values() for row in rows]
INSTRUCTIONS = demo_rows("instructions.jsonl")


def repeated(texts: list[str], most: int = 1) -> list[str]:
    return [text for text, count in Counter(texts).items() if count > most]


def test_every_row_has_words_and_one_answer() -> None:
    assert len(QUESTIONS["train"]) >= 200 and len(INSTRUCTIONS) >= 300
    assert all(len(rows) >= 90 for rows in QUESTIONS.values())
    for row in EVERY_QUESTION:
        assert len(normalized(row["question"]).split()) >= 3, row
        texts = row["choices"]["text"]
        assert all(text and text.strip() == text for text in texts), row
        assert row["choices"]["label"] == LETTERS and row["answerKey"] in LETTERS, row
        assert len(texts) == len({normalized(text) for text in texts}) == 4, row
    assert all(row["instruction"].strip() and row["output"].strip() for row in INSTRUCTIONS)


@pytest.mark.parametrize("split", SPLITS)
def test_letter_and_length_do_not_reveal_the_answer(split: str) -> None:
    rows = QUESTIONS[split]
    counts = Counter(row["answerKey"] for row in rows)
    assert all(0.20 <= counts[letter] / len(rows) <= 0.30 for letter in LETTERS), counts
    for pick in (max, min):
        texts = [row["choices"]["text"] for row in rows]
        guessed = [LETTERS[each.index(pick(each, key=len))] for each in texts]
        right = sum(row["answerKey"] == letter for row, letter in zip(rows, guessed, strict=True))
        assert right / len(rows) < 0.45, pick.__name__


def test_no_row_is_repeated() -> None:
    asked = [normalized(f"{row['instruction']} {row['input']}") for row in INSTRUCTIONS]
    identities = {split: [normalized(row["question"]) for row in rows] for split, rows in QUESTIONS.items()}
    identities["train"] += asked
    assert not repeated([text for texts in identities.values() for text in texts])
    assert not repeated([row["id"] for row in EVERY_QUESTION])
    # No question repeats the words of another split in another order.
    bags = {name: {tuple(sorted(text.split())) for text in texts} for name, texts in identities.items()}
    for one, other in combinations(bags, 2):
        assert bags[one] & bags[other] == set(), (one, other)
    beginnings = [" ".join(normalized(row["question"]).split()[:4]) for row in EVERY_QUESTION]
    assert not repeated(beginnings, most=5), "questions are not made from a few patterns"
