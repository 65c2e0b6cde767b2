"""From rows to tokens: if this broke, people would train on the wrong words and be scored on rows they trained on."""

from __future__ import annotations

import csv
import json
import struct
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qpruner.config.schema import DataSource
from qpruner.data.encoding import (
    collate,
    encode,
    load_encoded,
    pack,
    packed_samples,
    row_lengths,
    row_samples,
    save_encoded,
)
from qpruner.data.sources import Example, check_disjoint, load_examples, normalized
from qpruner.errors import CorruptFile, UserError
from qpruner.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
ARC = {
    "question": "Which gas do plants take in?",
    "choices": {"text": ["oxygen", "carbon dioxide", "helium", "neon"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as Llama's: a text begins with the beginning-of-sequence token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def rows_file(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples_of(tmp_path: Path, rows: list[dict[str, Any]], **source: Any) -> list[Example]:
    return load_examples([DataSource(source=rows_file(tmp_path, rows), **source)], "data.train")


def predicted(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


# Rows


def test_an_instruction_row_with_and_without_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add them.", "input": "2 and 3", "output": "5"},
        {"instruction": "Name a colour.", "input": "", "output": "red"},
        {"instruction": "Name a fruit.", "input": None, "output": "plum"},
    ]
    assert examples_of(tmp_path, rows) == [
        Example("instruction", "Add them.", "2 and 3", "5"),
        Example("instruction", "Name a colour.", "", "red"),
        Example("instruction", "Name a fruit.", "", "plum"),
    ]


def test_an_answer_is_called_so_or_as_in_arc(tmp_path: Path) -> None:
    row = {"question": "Is it?", "choices": ["no", "yes"]}
    for name in ("answer", "answerKey"):
        (found,) = examples_of(tmp_path, [row | {name: 1}], format="multiple_choice")
        assert found.response == "yes"
    (found,) = examples_of(tmp_path, [row | {"answer": 0, "answerKey": "B"}], format="multiple_choice")
    assert found.response == "no", "our own name comes first"


def test_the_input_column_may_be_missing(tmp_path: Path) -> None:
    rows = [{"instruction": "Name a colour.", "output": "red"}]
    assert examples_of(tmp_path, rows) == [Example("instruction", "Name a colour.", "", "red")]


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"prompt": "Name a colour.", "completion": "red", "context": "warm"}]
    columns = {"instruction": "prompt", "output": "completion", "input": "context"}
    assert examples_of(tmp_path, rows, columns=columns) == [Example("instruction", "Name a colour.", "warm", "red")]


@pytest.mark.parametrize("value", [0, 7, 2.5, False])
def test_a_number_is_a_response(tmp_path: Path, value: float) -> None:
    """Sums have the answer 0 now and then."""
    rows = [{"instruction": "What is left?", "output": value}]
    assert examples_of(tmp_path, rows)[0].response == str(value)


def test_multiple_choice_in_the_layout_of_arc(tmp_path: Path) -> None:
    expected = Example("multiple_choice", ARC["question"], "", "carbon dioxide")
    assert examples_of(tmp_path, [ARC], format="multiple_choice") == [expected]


def test_labels_that_are_digits_are_labels(tmp_path: Path) -> None:
    """Some of ARC's rows are labelled 1 to 4: the key "1" is the first choice, not the second."""
    row = ARC | {"choices": {"text": ["a", "b", "c", "d"], "label": ["1", "2", "3", "4"]}, "answerKey": "1"}
    assert examples_of(tmp_path, [row], format="multiple_choice")[0].response == "a"


@pytest.mark.parametrize(("answer", "expected"), [(0, "first"), (1, "second"), ("1", "second"), ("B", "second")])
def test_multiple_choice_from_several_columns(tmp_path: Path, answer: int | str, expected: str) -> None:
    """PIQA's layout: two columns and a position counted from 0."""
    rows = [{"goal": "How?", "sol1": "first", "sol2": "second", "label": answer}]
    columns = {"question": "goal", "choices": ("sol1", "sol2"), "answer": "label"}
    found = examples_of(tmp_path, rows, format="multiple_choice", columns=columns)
    assert found == [Example("multiple_choice", "How?", "", expected)]


@pytest.mark.parametrize(("answer", "expected"), [(2, "12"), ("2", "12"), ("C", "12"), ("A", "10")])
def test_multiple_choice_from_a_list(tmp_path: Path, answer: int | str, expected: str) -> None:
    rows = [{"question": "How many?", "endings": [10, 11, 12], "answer": answer}]
    columns = {"choices": "endings", "answer": "answer"}
    assert examples_of(tmp_path, rows, format="multiple_choice", columns=columns)[0].response == expected


@pytest.mark.parametrize("answer", ["E", 4, -1, "", "carbon dioxide"])
def test_an_answer_that_is_no_choice_is_refused(tmp_path: Path, answer: int | str) -> None:
    with pytest.raises(UserError) as caught:
        examples_of(tmp_path, [ARC | {"answerKey": answer}], format="multiple_choice")
    assert "`data.train.0.columns.answer`" in str(caught.value)
    assert repr(answer) in str(caught.value)
    assert "A, B, C, D" in str(caught.value)


def test_a_text_file_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("The first line.\nThe second.\n")
    source = DataSource(source=str(tmp_path / "plain.txt"), format="text")
    found = load_examples([source], "data.train")
    assert found == [Example("text", "", "", "The first line."), Example("text", "", "", "The second.")]


def test_every_file_type_reads_the_same(tmp_path: Path) -> None:
    import datasets

    rows = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t")):
        lines = [separator.join(("instruction", "output")), *(separator.join(row.values()) for row in rows)]
        (tmp_path / name).write_text("\n".join(lines))
    expected = examples_of(tmp_path, rows)
    for name in ("rows.parquet", "rows.json", "rows.csv", "rows.tsv"):
        assert load_examples([DataSource(source=str(tmp_path / name))], "data.train") == expected


def test_the_cells_of_a_table_are_the_text_that_stands_there(tmp_path: Path) -> None:
    """Quotes, lines in cells and a byte order mark are a spreadsheet's; numbers, "NA" and empty cells stay text, also
    where ten thousand numbers stand above them."""
    cells = ["007", "1.50", "None", "NA", "", "two\nlines", 'a "word", quoted', *["1"] * 11_000, "nine"]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "answer"])
        table.writerows((f"Say {position}.", cell) for position, cell in enumerate(cells))
    columns = {"instruction": "prompt", "output": "answer"}
    found = load_examples([DataSource(source=str(tmp_path / "rows.csv"), columns=columns)], "data.train")
    assert [example.response for example in found] == cells


def test_a_table_may_have_columns_without_a_name(tmp_path: Path) -> None:
    """An index, as pandas writes it, or a comma at the end of every line."""
    (tmp_path / "rows.CSV").write_text(",instruction,output,\n0,Say it.,it,\n\n1,Say no.,no,\n")
    found = load_examples([DataSource(source=str(tmp_path / "rows.CSV"))], "data.train")
    assert [(example.prompt, example.response) for example in found] == [("Say it.", "it"), ("Say no.", "no")]


def test_a_table_with_a_column_a_choice_is_multiple_choice(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,a,b,right\nIs it?,no,yes,B\nIs it not?,1,2,0\n")
    columns: dict[str, str | tuple[str, ...]] = {"choices": ("a", "b"), "answer": "right"}
    source = DataSource(source=str(tmp_path / "rows.csv"), format="multiple_choice", columns=columns)
    assert [example.response for example in load_examples([source], "data.train")] == ["yes", "1"]


def test_limit_and_split_take_the_first_rows(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(10)]
    assert [example.response for example in examples_of(tmp_path, rows, limit=3)] == ["0", "1", "2"]
    assert [example.response for example in examples_of(tmp_path, rows, split="train[4:6]")] == ["4", "5"]
    assert len(examples_of(tmp_path, rows, limit=99)) == 10


def test_several_sources_are_joined_in_order(tmp_path: Path) -> None:
    first = rows_file(tmp_path, [{"text": "one"}], "a.jsonl")
    second = rows_file(tmp_path, [ARC], "b.jsonl")
    found = load_examples(
        [DataSource(source=first, format="text"), DataSource(source=second, format="multiple_choice")], "data.train"
    )
    assert [example.response for example in found] == ["one", "carbon dioxide"]


@pytest.mark.parametrize("split", ["train[5:9]", "test"])
def test_a_split_that_is_not_there_is_named(tmp_path: Path, split: str) -> None:
    source = DataSource(source=rows_file(tmp_path, [ARC], "a.jsonl"), format="multiple_choice", split=split)
    with pytest.raises(UserError, match=r"`data\.train\.0\.split`: ") as caught:
        load_examples([source], "data.train")
    assert split in str(caught.value) and "a.jsonl" in str(caught.value) and "name another part" in str(caught.value)


def test_missing_columns_are_told_with_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        examples_of(tmp_path, [{"prompt": "Say it.", "completion": "it"}])
    message = str(caught.value)
    assert "`data.train.0.columns.instruction`" in message
    assert "no column instruction" in message
    assert message.endswith("have prompt, completion; name yours with, for example, `columns: {instruction: prompt}`")
    table = tmp_path / "rows.csv"
    table.write_text("Say it.,it\nSay that.,that\n")
    with pytest.raises(UserError, match=r"Say it\., it, which the first line of the file says: it is the header"):
        load_examples([DataSource(source=str(table))], "data.train")


def test_a_mapping_to_a_column_that_is_not_there_is_refused_even_if_optional(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column context"):
        examples_of(tmp_path, [{"instruction": "a", "output": "b"}], columns={"input": "context"})


def test_a_mapping_of_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        examples_of(tmp_path, [{"text": "a"}], format="text", columns={"question": "text"})
    assert "names question; rows of format text have the columns text" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("rows.xlsx", "PK", "give a .jsonl, .json, .parquet, .csv, .tsv or .txt file"),
        ("torn.csv", "instruction,output\na,b\na,b,c\n", "line 3 has 3 cells, its header 2 (instruction, output)"),
        ("first.csv", "instruction,output\nSay hi.,Hello, there\nSay bye.,Bye\n", "line 2 has 3 cells, its header 2"),
        (
            "short.csv",
            "instruction,input,output\na,b\n",
            "line 2 has 2 cells, its header 3 (instruction, input, output): an empty cell has its ','",
        ),
        ("latin.csv", b"instruction,output\na,b\ncaf\xe9,b\n", "line 3 is no UTF-8: save the file as UTF-8"),
        ("open.tsv", 'instruction\toutput\na\t"b\nc\td\n', "line 2: unexpected end of data"),
        ("merged.tsv", 'instruction\toutput\na\t"b\nc\td\ne\tf" g\n', "a cell that begins with a double quote"),
        ("twice.csv", "instruction,output,output\na,b,c\n", "two of its columns are called 'output'"),
        ("parted.csv", "instruction;output\na;b\n", "in a .csv file commas separate the cells"),
        ("empty.csv", "\n\n", "no row under its header"),
        ("header.csv", "instruction,output\n", "no row under its header"),
        ("broken.jsonl", '{"instruction": "a", "outp', "line 1 is no JSON: Unterminated string"),
        (
            "second.jsonl",
            '{"instruction": "a", "output": "b"}\n\n{"output": }\n',
            "line 3 is no JSON: Expecting value at column 12",
        ),
        ("list.jsonl", '{"instruction": "a", "output": "b"}\n["a"]\n', "line 2 is no JSON object"),
        ("broken.parquet", "not parquet", "no rows can be read"),
    ],
)
def test_a_file_that_is_no_data_is_named(tmp_path: Path, name: str, content: str | bytes | None, told: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_examples([DataSource(source=str(path))], "data.validation")
    assert "`data.validation.0.source`" in str(caught.value)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


# Shared rows


@pytest.mark.parametrize(
    "same", ["which gas do plants take in", "Which gas do plants take in?!", "  Which  gas, do plants TAKE in ?"]
)
def test_punctuation_and_case_do_not_hide_a_shared_row(same: str) -> None:
    splits = {"data.train": [normalized("Which gas do plants take in?")], "evaluate.tasks": [normalized(same)]}
    with pytest.raises(UserError) as caught:
        check_disjoint(splits)
    assert "data.train and evaluate.tasks share 1 row," in str(caught.value)
    assert "which gas do plants take in" in str(caught.value)


def test_all_pairs_of_splits_are_looked_at() -> None:
    splits = {"a": ["one", "two"], "b": ["three"], "c": ["four", "three"]}
    with pytest.raises(UserError, match="b and c share 1"):
        check_disjoint(splits)
    check_disjoint({"a": ["one", "one"], "b": ["two"], "c": [""], "d": [""]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Which gas do plants take in?", "Which gas do plants give off?"),
        ("What is 7 + 5?", "What is 7 * 5?"),
        ("What is C++?", "What is C#?"),
        ("Что это?", "Кто это?"),
    ],
)
def test_different_questions_are_different_rows(one: str, other: str) -> None:
    check_disjoint({"train": [normalized(one)], "test": [normalized(other)]})


def test_an_instruction_counts_with_its_input_and_a_text_by_itself() -> None:
    add = [Example("instruction", "Add them.", context, "x").identity for context in ("2 and 3", "4 and 5")]
    assert add[0] != add[1]
    assert Example("text", "", "", "Some words.").identity == normalized("some words")
    question = [Example("multiple_choice", "Why?", "", response).identity for response in ("a", "b")]
    assert question[0] == question[1]


# Tokens


@pytest.mark.parametrize(
    ("example", "prompt", "response"),
    [
        (
            Example("multiple_choice", "Why?", "", "because"),
            "Question: Why?\nAnswer:",
            " because",
        ),
        (
            Example("instruction", "Name a colour.", "", "red"),
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nName a colour.\n\n### Response:\n",
            "red</s>",
        ),
        (
            Example("instruction", "Add them.", "2 and 3", "5"),
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n### Input:\n"
            "2 and 3\n\n### Response:\n",
            "5</s>",
        ),
    ],
)
def test_the_loss_is_on_the_response_and_on_nothing_else(
    tokenizer: PreTrainedTokenizerBase, example: Example, prompt: str, response: str
) -> None:
    row = encode([example], tokenizer, max_length=512)[0]
    num_prompt = len(tokenizer(prompt)["input_ids"])
    assert tokenizer.decode(row["input_ids"]) == prompt + response
    assert row["labels"][:num_prompt] == [IGNORED] * num_prompt
    assert row["labels"][num_prompt:] == row["input_ids"][num_prompt:]
    assert tokenizer.decode(predicted(row)) == response


def test_the_loss_may_be_on_everything(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode([Example("multiple_choice", "Why?", "", "because")], tokenizer, 512, response_only=False)[0]
    assert row["labels"] == row["input_ids"]


def test_text_has_no_prompt_to_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode([Example("text", "", "", "Just some words here.")], tokenizer, 512)[0]
    assert tokenizer.decode(row["input_ids"]) == "Just some words here."
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(
    ("example", "template"),
    [
        (Example("multiple_choice", "Why?", "", "because"), "alpaca"),
        (Example("instruction", "Name a colour.", "", "red"), "alpaca"),
        (Example("text", "", "", "Just some words."), "alpaca"),
        (Example("instruction", "Name a colour.", "", "red"), "chat"),
        (Example("multiple_choice", "Why?", "", "because"), "chat"),
    ],
)
def test_a_row_begins_with_one_beginning_of_sequence(
    with_bos: PreTrainedTokenizerBase, example: Example, template: str
) -> None:
    """Two of them, or one in the middle, is something the model never saw."""
    with_bos.chat_template = CHAT_TEMPLATE
    row = encode([example], with_bos, 512, template)[0]
    assert row["input_ids"][0] == with_bos.bos_token_id
    assert row["input_ids"].count(with_bos.bos_token_id) == 1


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_response_gets_no_space_that_only_a_text_of_its_own_gets(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    """Some tokenizers put a space before every text; lm-eval's prompt and answer are one text, and so must ours be."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer._tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.decode(tokenizer("red")["input_ids"]) == " red", "the tokenizer must be one of those"
    row = encode([Example("instruction", "Name a colour.", "", "red")], tokenizer, 512, template)[0]
    assert tokenizer.decode(predicted(row)) == "red</s>"


def test_a_token_across_the_border_is_one_as_in_lm_eval(tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt that ends in a space: the space belongs to the word after it wherever both are one text."""
    tokenizer.chat_template = "{{ messages[0]['content'] }} Answer: "
    prompt, response = "Name a gas. Answer: ", "oxygen"
    row = encode([Example("instruction", "Name a gas.", "", response)], tokenizer, 512, template="chat")[0]
    apart = tokenizer(prompt)["input_ids"] + tokenizer(f"{response}</s>")["input_ids"]
    assert row["input_ids"] == tokenizer(f"{prompt}{response}</s>")["input_ids"] != apart
    num_prompt = len(tokenizer(prompt)["input_ids"])
    assert row["labels"] == [IGNORED] * num_prompt + row["input_ids"][num_prompt:]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_tokenizer_without_an_end_of_sequence_writes_none(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Not the word None, which a model would learn to end its answers with."""
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token = None
    row = encode([Example("instruction", "Name a colour.", "", "red")], tokenizer, 512, template)[0]
    assert tokenizer.decode(predicted(row)) == "red"


@pytest.mark.parametrize("context", ["", "2 and 3"])
def test_the_chat_template_is_the_tokenizers_own(tokenizer: PreTrainedTokenizerBase, context: str) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    row = encode([Example("instruction", "Add them.", context, "5")], tokenizer, 512, template="chat")[0]
    asked = f"Add them.\n\n{context}" if context else "Add them."
    assert tokenizer.decode(row["input_ids"]) == f"<s>[user]{asked}[assistant]5</s>"
    assert tokenizer.decode(predicted(row)) == "5</s>"


def test_chat_without_a_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="this one has none"):
        encode([Example("instruction", "Add them.", "", "5")], tokenizer, 512, template="chat")


def test_long_rows_are_cut_and_rows_without_an_answer_left_are_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    short = Example("multiple_choice", "Why?", "", "because of the rain")
    long_prompt = Example("multiple_choice", "Why " * 200, "", "because")
    num_prompt = len(tokenizer("Question: Why?\nAnswer:")["input_ids"])
    whole = encode([short], tokenizer, 512)[0]
    cut = encode([short, long_prompt], tokenizer, num_prompt + 2)
    assert len(cut) == 1
    assert cut[0]["input_ids"] == whole["input_ids"][: num_prompt + 2]
    assert len(predicted(cut[0])) == 2
    with pytest.raises(UserError, match=f"`data.max_length` of {num_prompt} tokens"):
        encode([short], tokenizer, num_prompt)


def test_packing_keeps_every_token_and_predicts_none_across_rows() -> None:
    rows = [
        {
            "input_ids": list(range(start, start + length)),
            "labels": [IGNORED] * masked + list(range(start + masked, start + length)),
        }
        for start, length, masked in ((100, 7, 3), (200, 4, 0), (300, 9, 1))
    ]
    packed = pack(rows, 8)
    assert [len(row["input_ids"]) for row in packed] == [8, 8, 4]
    assert all(len(row["labels"]) == len(row["input_ids"]) for row in packed)
    ids = [token for row in packed for token in row["input_ids"]]
    labels = [label for row in packed for label in row["labels"]]
    assert ids == [token for row in rows for token in row["input_ids"]]
    # The first token of a row would be predicted from another row; all else is as it was.
    expected = [label for row in rows for label in [IGNORED, *row["labels"][1:]]]
    assert labels == expected
    assert {token for token, label in zip(ids, labels, strict=True) if label == IGNORED} == {100, 101, 102, 200, 300}


def test_a_chunk_without_a_token_to_predict_is_dropped() -> None:
    """The loss of a batch of such chunks is a division by zero, and one NaN ends a trial."""
    rows = [
        {"input_ids": [10, 11, 12, 13, 14, 15], "labels": [IGNORED] * 5 + [15]},
        {"input_ids": [20, 21, 22, 23, 24, 25], "labels": [IGNORED] * 6},
        {"input_ids": [30, 31, 32, 33], "labels": [IGNORED, IGNORED, IGNORED, 33]},
        {"input_ids": [40, 41, 42, 43], "labels": [IGNORED, 41, IGNORED, IGNORED]},
    ]
    # Chunks of 4: 10-13, 14 15 20 21, 22-25, 30-33, 40-43.
    assert pack(rows, 4) == [
        {"input_ids": [14, 15, 20, 21], "labels": [IGNORED, 15, IGNORED, IGNORED]},
        {"input_ids": [30, 31, 32, 33], "labels": [IGNORED, IGNORED, IGNORED, 33]},
        {"input_ids": [40, 41, 42, 43], "labels": [IGNORED, 41, IGNORED, IGNORED]},
    ]
    # Chunks of 5: that of 15 to 23 has its only label in the first place, where nothing comes before it.
    assert [chunk["input_ids"] for chunk in pack(rows, 5)] == [[33, 40, 41, 42, 43]]
    assert pack([rows[1]], 3) == []


def test_every_packed_chunk_has_a_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example("multiple_choice", "Why " * 30, "", "because"), Example("text", "", "", "Some words.")]
    packed = pack(encode(examples * 3, tokenizer, 512), 8)
    assert packed
    for chunk in packed:
        batch = collate([chunk], pad_id=1)
        shifted = batch["labels"][:, 1:].flatten()
        uniform = torch.zeros(len(shifted), len(tokenizer))
        assert torch.isfinite(torch.nn.functional.cross_entropy(uniform, shifted, ignore_index=IGNORED))


# Calibration samples


@pytest.mark.parametrize("take", [packed_samples, row_samples])
def test_calibration_predicts_responses_only(take: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of a prompt 45 % are the words of its template, which say nothing of the model's task."""
    rows = [Example("instruction", f"Name the colour of plum {number}.", "", f"purple {number}") for number in range(6)]
    samples = take(rows, tokenizer, 3, 160, "alpaca", True)
    words = tokenizer.decode([token for sample in samples for token in predicted(sample)])
    assert "purple" in words
    assert "Name the colour" not in words and "Instruction" not in words
    read = tokenizer.decode([token for sample in samples for token in sample["input_ids"]])
    assert "Instruction" in read, "prompts are read all the same"


def test_packed_samples_without_a_response_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Example("multiple_choice", "which gas do plants take in? " * 20, "", " carbon") for _ in range(4)]
    samples = packed_samples(rows, tokenizer, 4, 16, "alpaca", True)
    assert [len(sample["input_ids"]) for sample in samples] == [16] * 4
    assert all(label != IGNORED for sample in samples for label in predicted(sample))
    assert all(predicted({"labels": sample["labels"][1:]}) for sample in samples)
    with pytest.raises(UserError, match="make 4 with a token to predict"):
        packed_samples(rows, tokenizer, 5, 16, "alpaca", True)


@pytest.mark.parametrize("take", [packed_samples, row_samples])
def test_blank_lines_are_no_part_of_calibration_text(take: Any, with_bos: PreTrainedTokenizerBase) -> None:
    """Half the rows of WikiText are: each would be a beginning of sequence and nothing else."""
    rows = [Example("text", "", "", text) for text in ("", "Plants take in carbon dioxide.", "") * 4]
    samples = take(rows, with_bos, 2, 8, "alpaca", True)
    begins = [sample["input_ids"].count(with_bos.bos_token_id) for sample in samples]
    assert begins in ([1, 0], [1, 1]), "one for each row with words"


@pytest.mark.parametrize("take", [packed_samples, row_samples])
def test_every_token_of_calibration_text_is_predicted(take: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Example("text", "", "", "Plants take in carbon dioxide and give off oxygen. " * 4) for _ in range(4)]
    for sample in take(rows, tokenizer, 3, 24, "alpaca", True):
        assert sample["labels"] == sample["input_ids"] and len(sample["labels"]) == 24


def test_a_batch_is_padded_on_the_right_and_the_padding_is_not_learned() -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]}, {"input_ids": [9, 3], "labels": [9, 3]}]
    batch = collate(rows, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, 8], [9, 3, IGNORED, IGNORED]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_encoded_rows_survive_the_disk(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [9], "labels": [9]}]
    save_encoded(rows, tmp_path / "train")
    found = load_encoded(tmp_path / "train")
    assert list(found) == rows and len(found) == 2
    assert found[-1] == rows[1] and found[1:] == rows[1:] and found[::2] == rows[:1]
    assert found.lengths == row_lengths(rows) == [3, 1]


def test_loading_reads_no_row(tmp_path: Path) -> None:
    """Two lists of 200 numbers take 3.2 kB of Python's memory a row; a number for its length takes 40 bytes."""
    num_rows = 2000
    save_encoded([{"input_ids": [row] * 200, "labels": [row] * 200} for row in range(num_rows)], tmp_path / "train")
    load_encoded(tmp_path / "train")  # imports what it needs
    tracemalloc.start()
    try:
        rows = load_encoded(tmp_path / "train")
        assert rows[num_rows - 1]["input_ids"] == [num_rows - 1] * 200
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * num_rows


def test_a_row_that_ends_before_it_begins_is_damage(tmp_path: Path) -> None:
    """Without a list of digests beside the folder; followed, such an offset leads out of the file."""
    rows = [{"input_ids": [1] * 8, "labels": [1] * 8} for _ in range(4)]
    save_encoded(rows, tmp_path / "train")
    (tmp_path / "train.files.json").unlink()
    (file,) = (tmp_path / "train").glob("*.arrow")
    offsets = struct.pack("<5i", 0, 8, 16, 24, 32)
    content = file.read_bytes()
    assert content.count(offsets) == 2, "those of both columns"
    file.write_bytes(content.replace(offsets, struct.pack("<5i", 0, 8, 16, 7, 32)))
    with pytest.raises(CorruptFile, match="the encoded rows in"):
        load_encoded(tmp_path / "train")
