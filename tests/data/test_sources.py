"""Rows have the right columns, defects of files are named, and training rows are not used for
scoring."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Raw, assert_has

from qpruner.config.schema import DataSource
from qpruner.data.sources import Example, check_disjoint, load_examples, normalized
from qpruner.errors import UserError

ARC = {
    "question": "Which gas do plants take in?",
    "choices": {
        "text": ["oxygen", "carbon dioxide", "helium", "neon"],
        "label": ["A", "B", "C", "D"],
    },
    "answerKey": "B",
}
RENAMED = {"instruction": "do", "input": "in", "output": "out"}
PIQA = {"question": "goal", "choices": ("sol1", "sol2"), "answer": "label"}


def examples_of(tmp_path: Path, rows: list[Raw], **source: Any) -> list[Example]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return examples_in(tmp_path / "rows.jsonl", **source)


def examples_in(path: Path, **source: Any) -> list[Example]:
    return load_examples([DataSource(source=str(path), **source)], "data.train")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"instruction": "Add.", "input": "2 and 3", "output": "5"}, {}, ("Add.", "2 and 3", "5")),
        (
            {"instruction": "Name one.", "input": None, "output": "red"},
            {},
            ("Name one.", "", "red"),
        ),
        ({"instruction": "What is left?", "output": 0}, {}, ("What is left?", "", "0")),
        ({"instruction": "Is it?", "output": False}, {}, ("Is it?", "", "False")),
        ({"do": "Name one.", "in": "x", "out": "red"}, RENAMED, ("Name one.", "x", "red")),
        (ARC, {}, "carbon dioxide"),
        # With labels 1 to 4 the answer "1" is the first choice, not the position 1.
        (ARC | {"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"}, {}, "a"),
        ({"question": "Is it?", "choices": ["no", "yes"], "answer": 0, "answerKey": "B"}, {}, "no"),
        ({"goal": "How?", "sol1": "first", "sol2": "second", "label": 1}, PIQA, "second"),
        ({"goal": "How?", "sol1": "first", "sol2": "second", "label": "0"}, PIQA, "first"),
        (
            {"question": "How many?", "endings": [10, 11, 12], "answer": "C"},
            {"choices": "endings"},
            "12",
        ),
    ],
)
def test_rows_of_known_layouts(tmp_path: Path, row: Raw, columns: Raw, expected: Any) -> None:
    """An instruction row has prompt, input and output; of a multiple-choice row only the answer is
    trained on."""
    if isinstance(expected, tuple):
        assert examples_of(tmp_path, [row], columns=columns) == [Example("instruction", *expected)]
        return
    [found] = examples_of(tmp_path, [row], format="multiple_choice", columns=columns)
    assert_has(found, format="multiple_choice", response=expected)


@pytest.mark.parametrize("answer", ["E", 4, -1, "", "carbon dioxide"])
def test_an_answer_that_is_no_choice_is_refused(tmp_path: Path, answer: int | str) -> None:
    with pytest.raises(
        UserError, match=rf"`data\.train\.0\.columns\.answer`: {answer!r} is .*A, B, C, D"
    ):
        examples_of(tmp_path, [ARC | {"answerKey": answer}], format="multiple_choice")


def test_every_file_type_reads_the_same(tmp_path: Path) -> None:
    import datasets

    rows = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text('instruction,output\nSay 0.,0\n"Say 1.",1\nSay 2.,2\n')
    expected = examples_of(tmp_path, rows)
    for name in ("rows.parquet", "rows.json", "rows.csv"):
        assert examples_in(tmp_path / name) == expected
    (tmp_path / "plain.txt").write_text("The first line.\nThe second.\n")
    found = examples_in(tmp_path / "plain.txt", format="text")
    assert [each.response for each in found] == ["The first line.", "The second."]


def test_a_cell_of_a_csv_file_stays_the_text_that_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        'instruction,output\nWho is it?,007\n"Yes, or no?",null\n"Two\nlines",\nWhat is left?,NA\n'
    )
    assert [(each.prompt, each.response) for each in examples_in(path)] == [
        ("Who is it?", "007"),
        ("Yes, or no?", "null"),
        ("Two\nlines", ""),
        ("What is left?", "NA"),
    ]


def test_limit_and_split_select_rows(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(10)]
    assert [example.response for example in examples_of(tmp_path, rows, limit=3)] == ["0", "1", "2"]
    assert [example.response for example in examples_of(tmp_path, rows, split="train[4:6]")] == [
        "4",
        "5",
    ]
    assert len(examples_of(tmp_path, rows, limit=99)) == 10
    for split in ("train[10:12]", "tran", "train[:5"):
        message = f"`data.train.0.split`: {split!r} selects no rows of '{tmp_path}/rows.jsonl' ("
        with pytest.raises(
            UserError, match=rf"^{re.escape(message)}.*; name a split of it, such as `train\["
        ):
            examples_of(tmp_path, rows, split=split)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.tsv",
            "instruction\toutput\na\tb\n",
            "not a data file; give a .jsonl, .json, .parquet, .csv, .txt file",
        ),
        ("empty.csv", "\n", "no rows can be read"),
        ("bytes.csv", b"instruction,output\n\xff\xfe,b\n", "no rows can be read"),
        (
            "other.jsonl",
            '{"prompt": "a"}\n',
            "the data have no column instruction, only prompt; name",
        ),
        (
            "broken.jsonl",
            '{"instruction": "a"}\n\n{"output": }\n',
            "line 3 is not JSON: Expecting value",
        ),
        (
            "list.jsonl",
            '{"instruction": "a", "output": "b"}\n["a"]\n',
            "line 2 is not a JSON object",
        ),
        ("broken.parquet", "not parquet", "no rows can be read"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"`data\.train\.0\.") as caught:
        examples_in(path)
    assert message in str(caught.value)


def test_a_row_in_two_splits_is_refused() -> None:
    """Rows that differ only in case, spacing or punctuation count as the same row."""
    gas = normalized("Which gas do plants take in?")
    again = normalized(" which  Gas, do plants TAKE in")
    splits = {"a": ["one"], "data.train": [gas, ""], "evaluate.tasks": [again, ""]}
    with pytest.raises(
        UserError,
        match=r"data\.train and evaluate\.tasks share 1 row,.*which gas do plants take in",
    ):
        check_disjoint(splits)
    for one, other in (
        ("Which gas do plants take in?", "Which gas do plants give off?"),
        ("What is 7 + 5?", "What is 7 * 5?"),
        ("What is C++?", "What is C#?"),
        ("Что это?", "Кто это?"),
    ):
        check_disjoint({"train": [normalized(one)], "test": [normalized(other)]})


def test_the_identity_of_a_row() -> None:
    add = [
        Example("instruction", "Add them.", context, "x").identity
        for context in ("2 and 3", "4 and 5")
    ]
    assert add[0] != add[1]
    assert Example("text", "", "", "Some words.").identity == normalized("some words")
    question = [
        Example("multiple_choice", "Why?", "", response).identity for response in ("a", "b")
    ]
    assert question[0] == question[1]
