"""Turn rows into prompts and responses, and these into tokens and labels.

A multiple-choice row has the text of an ARC question in lm-eval: training, loss and accuracy
measure the same task.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.config.schema import RunConfig
from qpruner.data.sources import Example
from qpruner.errors import CorruptFile, UserError
from qpruner.runs.records import CONFIRMATION, SELECTION, VALIDATION, ScoredRows
from qpruner.runs.storage import fetch, retry_storage, writing_folder
from qpruner.wording import counted

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase as Tokenizer

Row = dict[str, list[int]]  # `input_ids` and `labels` of a sample
Labelled = tuple[list[int], list[int]]  # token ids and labels of a row before it is cut
IGNORED_LABEL = -100  # label of tokens that are excluded from the loss, as in torch's cross entropy
PREAMBLE = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately "
    "completes the request.\n\n"
)
ALPACA = "### Instruction:\n{instruction}\n\n{input}### Response:\n"
"""Stanford Alpaca's prompt; alpaca-lora's `alpaca_short` leaves out the preamble."""


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int,
    template: str = "alpaca",
    response_only: bool = True,
) -> list[Row]:
    """Tokenize rows and cut them at `max_length` tokens.

    Labels are the response or, without `response_only`, all tokens. Rows without a labelled token
    are dropped; raise `UserError` if none is left.
    """
    labelled = (_labelled(example, tokenizer, template, response_only) for example in examples)
    encoded = list(_cut(labelled, max_length))
    if not encoded:
        raise UserError(
            f"`data.max_length` of {max_length} tokens leaves no labelled token in any row: raise "
            "it"
        )
    return encoded


def importance_samples(
    config: RunConfig, examples: Sequence[Example], tokenizer: Tokenizer
) -> list[Row]:
    """Make the samples for measuring importance from shuffled rows, packed or not."""
    return _calibration_samples(
        config,
        examples,
        tokenizer,
        count_key="calibration.num_samples",
        length_key="calibration.max_length",
        response_only=config.data.response_only,
        packing=config.calibration.packing,
    )


def sensitivity_samples(
    config: RunConfig, examples: Sequence[Example], tokenizer: Tokenizer
) -> list[Row]:
    """Make the samples that show how much a group's format changes the loss.

    These are shuffled rows with labels on their responses.
    """
    return _calibration_samples(
        config,
        examples,
        tokenizer,
        count_key="calibration.num_sensitivity_samples",
        length_key="data.max_length",
        response_only=True,
        packing=False,
    )


def _calibration_samples(
    config: RunConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    count_key: str,
    length_key: str,
    response_only: bool,
    packing: bool,
) -> list[Row]:
    """Make samples from shuffled rows, each with a labelled token.

    The keys `count_key` and `length_key` of the configuration give their number and length. Raise
    `UserError` if the rows give too few samples.
    """
    count, length = attrgetter(count_key, length_key)(config)
    shuffled = list(examples)
    random.Random(config.seed).shuffle(shuffled)
    template = config.data.template
    rows = (_labelled(example, tokenizer, template, response_only) for example in shuffled)
    samples = _joined(rows, length) if packing else _cut(rows, length)
    taken = list(itertools.islice(samples, count))
    if len(taken) < count:
        remedy = "shorter, or set `calibration.packing: false`" if packing else "longer"
        raise UserError(
            f"`{count_key}` asks for {counted(count, 'sample')} of {length} tokens, but the "
            f"calibration rows give only {len(taken)} with a labelled token: ask for fewer, add "
            f"rows, or make `{length_key}` {remedy}"
        )
    return taken


def _joined(rows: Iterable[Labelled], length: int) -> Iterator[Row]:
    """Concatenate the rows that have a labelled token, and cut them into equally long samples."""
    ids: list[int] = []
    labels: list[int] = []
    for row_ids, row_labels in rows:
        if _has_label(row_labels):
            ids += row_ids
            labels += row_labels
        while len(ids) >= length:
            yield from _cut([(ids, labels)], length)
            ids = ids[length:]
            labels = labels[length:]


def _cut(rows: Iterable[Labelled], length: int) -> Iterator[Row]:
    for ids, labels in rows:
        if _has_label(labels[:length]):
            yield {"input_ids": ids[:length], "labels": labels[:length]}


def _labelled(
    example: Example, tokenizer: Tokenizer, template: str, response_only: bool
) -> Labelled:
    """Return token ids and labels of a row; with `response_only` its prompt has no labels."""
    prompt, response = _render(example, tokenizer, template)
    # A chat template writes the special tokens itself.
    special = example.format != "instruction" or template != "chat"
    # Prompt and response are tokenized as one text, as in lm-eval: some tokenizers add a space
    # before a separate response.
    ids: list[int] = tokenizer(prompt + response, add_special_tokens=special)["input_ids"]
    prompt_length = 0
    if prompt and response_only:
        prompt_length = len(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    return ids, [IGNORED_LABEL] * prompt_length + ids[prompt_length:]


def _render(example: Example, tokenizer: Tokenizer, template: str) -> tuple[str, str]:
    """Return the texts of prompt and response in the template of the row's format."""
    if example.format == "text":
        return "", example.response
    if example.format == "multiple_choice":
        return f"Question: {example.prompt}\nAnswer:", f" {example.response}"
    response = f"{example.response}{tokenizer.eos_token or ''}"
    if template != "chat":
        is_short = template == "alpaca_short"
        return alpaca_prompt(example.prompt, example.context, is_short), response
    if not tokenizer.chat_template:
        raise UserError(
            "`data.template: chat` needs a tokenizer with a chat template, but got none: set "
            "`alpaca`"
        )
    content = example.prompt
    if example.context:
        content += f"\n\n{example.context}"
    messages = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(prompt), response


def alpaca_prompt(instruction: str, context: str = "", is_short: bool = False) -> str:
    """Return the Alpaca prompt of an instruction and its optional input."""
    return (ALPACA if is_short else PREAMBLE + ALPACA).format(
        context=", paired with an input that provides further context" if context else "",
        instruction=instruction,
        input=f"### Input:\n{context}\n\n" if context else "",
    )


def pack(rows: Sequence[Row], length: int) -> list[Row]:
    """Concatenate encoded rows and cut them into chunks of `length` tokens.

    Chunks without a labelled token are dropped.
    """
    ids = [token for row in rows for token in row["input_ids"]]
    # The first token of a row has no label: it would be predicted from the previous row.
    labels = [label for row in rows for label in (IGNORED_LABEL, *row["labels"][1:])]
    chunks = [
        (ids[start : start + length], labels[start : start + length])
        for start in range(0, len(ids), length)
    ]
    return list(_cut(chunks, length))


def text_windows(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> list[Row]:
    """Join texts with blank lines and cut windows of `length` tokens.

    All tokens of a window but its first are predicted.
    """
    text = "\n\n".join(texts)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [{"input_ids": window, "labels": window} for window in windows if len(window) > 1]


def _has_label(labels: Sequence[int]) -> bool:
    """Return True if any token but the first has a label; the first token is never predicted."""
    return any(label != IGNORED_LABEL for label in labels[1:])


def collate(rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> dict[str, Any]:
    """Pad rows on the right to a batch of tensors.

    The tensors `input_ids`, `attention_mask` and `labels` are int64 ``(batch, seq)``.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(sequences: Iterable[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([ids + [filler] * (longest - len(ids)) for ids in sequences])

    return {
        "input_ids": padded((row["input_ids"] for row in rows), pad_id),
        "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
        "labels": padded((row["labels"] for row in rows), IGNORED_LABEL),
    }


def save_encoded(rows: Sequence[Mapping[str, list[int]]], folder: Path) -> None:
    """Save encoded rows to a folder in Arrow format, which can be memory-mapped."""
    import datasets

    datasets.disable_progress_bars()
    encoded = datasets.Dataset.from_list([dict(row) for row in rows])
    with writing_folder(folder) as here:
        retry_storage(lambda: encoded.save_to_disk(here), here)


UNREADABLE = (OSError, ValueError, KeyError, AttributeError, NotImplementedError)
"""What pyarrow raises for damaged files."""


def load_encoded(folder: Path) -> EncodedRows:
    """Memory-map the rows that `save_encoded` wrote; raise `CorruptFile` if any part is damaged."""
    import datasets

    try:
        return retry_storage(
            lambda: EncodedRows(datasets.load_from_disk(str(fetch(folder)))), folder, was_there=True
        )
    except UNREADABLE as error:
        raise CorruptFile(
            f"the encoded rows in {folder} cannot be read: {error}", folder
        ) from error


def load_scored(data: Path, name: ScoredRows) -> list[Row]:
    """Load the validation rows, or one half of the confirmation rows.

    No trial is scored on either half: one selects the winner, the other judges it.
    """
    rows: list[Row]
    if name == VALIDATION:
        rows = load_encoded(data / "validation")[:]
    else:
        first = (SELECTION, CONFIRMATION).index(name)
        rows = load_encoded(data / "confirmation")[first::2]
    return rows


class EncodedRows(Sequence[Row]):
    """Read encoded rows from a memory-mapped Arrow file.

    An index reads one row; a slice returns a list of rows.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        from pyarrow.compute import list_value_length

        rows.data.validate(full=True)  # wrong offsets in a damaged file could point outside of it
        self._rows = rows
        lengths = list_value_length(rows.data["input_ids"])  # reads no tokens
        self.lengths: list[int] = lengths.to_pylist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return self._rows[index]


def row_lengths(rows: Sequence[Mapping[str, list[int]]]) -> list[int]:
    """Return the number of tokens of each row."""
    if isinstance(rows, EncodedRows):
        return rows.lengths
    return [len(row["input_ids"]) for row in rows]
