"""The demo's data are sound: the numbers in the README depend on them."""

from collections import Counter
from itertools import combinations

from conftest import Raw, demo_rows

from qpruner.data.sources import normalized

SPLITS = ("train", "validation", "confirmation", "test")
QUESTIONS: dict[str, list[Raw]] = {split: demo_rows(f"questions_{split}.jsonl") for split in SPLITS}
INSTRUCTIONS = [*demo_rows("instructions.jsonl"), *demo_rows("instructions_confirmation.jsonl")]


def test_letter_and_length_do_not_reveal_the_answer() -> None:
    for rows in QUESTIONS.values():
        assert len(rows) >= 90
        assert all(len({normalized(text) for text in row["choices"]["text"]}) == 4 for row in rows)
        counts = Counter(row["answerKey"] for row in rows)
        assert all(0.20 <= counts[letter] / len(rows) <= 0.30 for letter in "ABCD"), counts
        for pick in (max, min):
            texts = [row["choices"]["text"] for row in rows]
            guessed = ["ABCD"[each.index(pick(each, key=len))] for each in texts]
            right = sum(
                row["answerKey"] == letter for row, letter in zip(rows, guessed, strict=True)
            )
            assert right / len(rows) < 0.45, pick.__name__


def test_no_row_is_repeated() -> None:
    identities = {
        split: [normalized(row["question"]) for row in rows] for split, rows in QUESTIONS.items()
    }
    identities["train"] += [
        normalized(f"{row['instruction']} {row['input']}") for row in INSTRUCTIONS
    ]
    every = [text for texts in identities.values() for text in texts]
    assert len(every) == len(set(every))
    # No question repeats the words of another split in another order.
    bags = {
        name: {tuple(sorted(text.split())) for text in texts} for name, texts in identities.items()
    }
    for one, other in combinations(bags, 2):
        assert bags[one] & bags[other] == set(), (one, other)
