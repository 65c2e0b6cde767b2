"""Rows become tokens as in lm-eval, with labels on the response."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import Raw

from qpruner.config.load import validate_config
from qpruner.data.encoding import (
    alpaca_prompt,
    collate,
    encode,
    importance_samples,
    load_encoded,
    pack,
    row_lengths,
    save_encoded,
)
from qpruner.data.sources import Example
from qpruner.errors import CorruptFile, UserError
from qpruner.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHOICE = Example("multiple_choice", "Why?", "", "because")
COLOUR = Example("instruction", "Name a colour.", "", "red")
SUM = Example("instruction", "Add them.", "2 and 3", "5")
TEXT = Example("text", "", "", "Just some words here.")


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    found = load_tokenizer(str(tiny_model))
    found.chat_template = CHAT_TEMPLATE
    return found


@pytest.fixture
def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer like Llama's, which begins each text with a beginning-of-sequence token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def predicted(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def test_the_alpaca_prompt_is_that_of_stanford() -> None:
    assert alpaca_prompt("Add them.", "2 and 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd them.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("example", "template", "prompt", "response"),
    [
        (CHOICE, "alpaca", "Question: Why?\nAnswer:", " because"),
        (COLOUR, "alpaca", alpaca_prompt("Name a colour."), "red</s>"),
        (SUM, "alpaca", alpaca_prompt("Add them.", "2 and 3"), "5</s>"),
        (
            SUM,
            "alpaca_short",
            "### Instruction:\nAdd them.\n\n### Input:\n2 and 3\n\n### Response:\n",
            "5</s>",
        ),
        (COLOUR, "chat", "<s>[user]Name a colour.[assistant]", "red</s>"),
        (SUM, "chat", "<s>[user]Add them.\n\n2 and 3[assistant]", "5</s>"),
        (TEXT, "alpaca", "", "Just some words here."),
    ],
)
def test_the_loss_is_on_the_response(
    tokenizer: Tokenizer, example: Example, template: str, prompt: str, response: str
) -> None:
    row = encode([example], tokenizer, 512, template)[0]
    num_prompt = len(tokenizer(prompt)["input_ids"]) if prompt else 0
    assert tokenizer.decode(row["input_ids"]) == prompt + response
    assert row["labels"] == [IGNORED] * num_prompt + row["input_ids"][num_prompt:]
    assert tokenizer.decode(predicted(row)) == response
    everything = encode([example], tokenizer, 512, template, response_only=False)[0]
    assert everything["labels"] == everything["input_ids"] == row["input_ids"]


@pytest.mark.parametrize("example", [CHOICE, COLOUR, TEXT])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_row_has_one_beginning_of_sequence(
    with_bos: Tokenizer, example: Example, template: str
) -> None:
    ids = encode([example], with_bos, 512, template)[0]["input_ids"]
    assert ids[0] == with_bos.bos_token_id
    assert ids.count(with_bos.bos_token_id) == 1


def test_prompt_and_response_are_tokenized_together(tokenizer: Tokenizer) -> None:
    """If the prompt ends in a space, tokenizing it with the response merges the space into the next
    word."""
    tokenizer.chat_template = "{{ messages[0]['content'] }} Answer: "
    prompt = "Name a gas. Answer: "
    response = "oxygen"
    row = encode(
        [Example("instruction", "Name a gas.", "", response)], tokenizer, 512, template="chat"
    )[0]
    apart = tokenizer(prompt)["input_ids"] + tokenizer(f"{response}</s>")["input_ids"]
    assert row["input_ids"] == tokenizer(f"{prompt}{response}</s>")["input_ids"] != apart
    num_prompt = len(tokenizer(prompt)["input_ids"])
    assert row["labels"] == [IGNORED] * num_prompt + row["input_ids"][num_prompt:]


def test_chat_without_a_template_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = tokenizer.eos_token = None
    # No end token is added.
    assert tokenizer.decode(predicted(encode([COLOUR], tokenizer, 512)[0])) == "red"
    with pytest.raises(UserError, match="got none: set `alpaca`"):
        encode([SUM], tokenizer, 512, template="chat")


def test_long_rows_are_cut_or_dropped(tokenizer: Tokenizer) -> None:
    short = Example("multiple_choice", "Why?", "", "because of the rain")
    long_prompt = Example("multiple_choice", "Why " * 200, "", "because")
    length = len(tokenizer("Question: Why?\nAnswer:")["input_ids"]) + 2
    [cut] = encode([short, long_prompt], tokenizer, length)
    assert cut["input_ids"] == encode([short], tokenizer, 512)[0]["input_ids"][:length]
    assert len(predicted(cut)) == 2
    with pytest.raises(UserError, match=f"`data.max_length` of {length - 2} tokens"):
        encode([short], tokenizer, length - 2)


def test_a_chunk_without_a_labelled_token_is_dropped() -> None:
    """A batch of such chunks would have a NaN loss (division by zero), and the trial would fail."""
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
    # The first token of a row is not predicted from the previous row.
    plain = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    assert pack(plain, 8) == [{"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORED, 2, 3, IGNORED, 5]}]


@pytest.mark.parametrize("packing", [True, False])
def test_calibration_text_skips_blank_lines(
    packing: bool, tiny_raw: Raw, with_bos: Tokenizer
) -> None:
    """Half the rows of WikiText are blank; each would be a sample of only a beginning-of-sequence
    token."""
    rows = [
        Example("text", "", "", text) for text in ("", "Plants take in carbon dioxide.", "") * 4
    ]
    config = validate_config(
        tiny_raw | {"calibration": {"num_samples": 2, "max_length": 8, "packing": packing}}
    )
    samples = importance_samples(config, rows, with_bos)
    begins = [sample["input_ids"].count(with_bos.bos_token_id) for sample in samples]
    # Each row with text has one.
    assert begins in ([1, 0], [1, 1])
    # Every token is predicted.
    assert all(sample["labels"] == sample["input_ids"] for sample in samples)


def test_a_batch_is_padded_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]},
        {"input_ids": [9, 3], "labels": [9, 3]},
    ]
    assert {name: tensor.tolist() for name, tensor in collate(rows, pad_id=1).items()} == {
        "input_ids": [[5, 6, 7, 8], [9, 3, 1, 1]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[IGNORED, IGNORED, 7, 8], [9, 3, IGNORED, IGNORED]],
    }


def test_saved_rows_are_read_back_one_by_one(tmp_path: Path) -> None:
    """Wrong offsets are detected as damage even without a list of digests; they could point outside
    of the file."""
    rows = [{"input_ids": [1] * 8, "labels": [1] * 8} for _ in range(3)]
    rows.append({"input_ids": [5, 6, 7, 8, 9, 4, 3, 2], "labels": [IGNORED, 6, 7, 8, 9, 4, 3, 2]})
    save_encoded(rows, tmp_path / "train")
    found = load_encoded(tmp_path / "train")
    assert list(found) == rows
    assert len(found) == 4
    assert found[-1] == rows[3]
    assert found[1:] == rows[1:]
    assert found[::2] == rows[::2]
    assert found.lengths == row_lengths(rows) == [8] * 4
    (tmp_path / "train.files.json").unlink()
    [file] = (tmp_path / "train").glob("*.arrow")
    offsets = struct.pack("<5i", 0, 8, 16, 24, 32)
    content = file.read_bytes()
    # There is one in each of the two columns.
    assert content.count(offsets) == 2
    file.write_bytes(content.replace(offsets, struct.pack("<5i", 0, 8, 16, 7, 32)))
    with pytest.raises(CorruptFile, match="the encoded rows in"):
        load_encoded(tmp_path / "train")
