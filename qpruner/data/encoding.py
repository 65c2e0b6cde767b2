"""Turn rows into prompts and responses, and those into tokens and labels.

A multiple-choice row is written as lm-eval writes ARC, so that training, validation loss and lm-eval accuracy measure
the same thing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from qpruner.config.schema import RunConfig
from qpruner.data.sources import Example
from qpruner.errors import CorruptFile, UserError
from qpruner.runs.storage import fetch, retry_storage, writing_folder
from qpruner.wording import counted

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase as Tokenizer

Row = dict[str, list[int]]
"""`input_ids` and `labels` of one sample."""
IGNORED_LABEL = -100
"""Label of a token without a loss, as in torch's cross entropy."""
ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford Alpaca."""


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int,
    template: str = "alpaca",
    response_only: bool = True,
) -> list[Row]:
    """Tokenize rows, cut at `max_length` tokens; rows without a token to predict are dropped.

    With `response_only`, the prompt's labels are -100.
    """
    rows = (_labelled(example, tokenizer, template, response_only) for example in examples)
    encoded = list(_cut(rows, max_length))
    if not encoded:
        raise UserError(f"`data.max_length` of {max_length} tokens leaves no row a token to predict: make it longer")
    return encoded


def importance_samples(
    config: RunConfig, examples: Sequence[Example], vocabulary_size: int, tokenizer: Tokenizer
) -> list[Row]:
    """Make the samples that importance is measured on: given token ids, or packed samples or rows in shuffled order."""
    settings, keys = config.calibration, ("calibration.num_samples", "calibration.max_length")
    if settings.token_ids:
        return load_token_ids(Path(settings.token_ids), vocabulary_size)
    return _calibration_samples(config, examples, tokenizer, *keys, config.data.response_only, settings.packing)


def sensitivity_samples(config: RunConfig, examples: Sequence[Example], tokenizer: Tokenizer) -> list[Row]:
    """Make the samples of sensitivities: they are about the target task, whatever importance is measured on."""
    keys = ("calibration.num_sensitivity_samples", "data.max_length")
    return _calibration_samples(config, examples, tokenizer, *keys, response_only=True, packing=False)


def _calibration_samples(
    config: RunConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    number: str,
    limit: str,
    response_only: bool,
    packing: bool,
) -> list[Row]:
    """Take the first samples of the shuffled rows that have a token to predict, as many and as long as two keys say."""
    count, length = (attrgetter(key)(config) for key in (number, limit))
    taken = list(examples)
    random.Random(config.seed).shuffle(taken)
    rows = (_labelled(example, tokenizer, config.data.template, response_only) for example in taken)
    samples = list(itertools.islice(_joined(rows, length) if packing else _cut(rows, length), count))
    if len(samples) < count:
        shape, remedy = "at most", "longer"
        if packing:
            shape, remedy = "exactly", "shorter, or set `calibration.packing: false`, which takes a row for a sample"
        raise UserError(
            f"`{number}` asks for {counted(count, 'sample')} of {shape} {length} tokens (`{limit}`), but the "
            f"calibration rows make {len(samples)} with a token to predict: ask for fewer, give more rows, or make "
            f"`{limit}` {remedy}"
        )
    return samples


def _joined(rows: Iterable[tuple[list[int], list[int]]], length: int) -> Iterator[Row]:
    """Join rows and cut them; rows without a token to predict, such as blank lines, are left out."""
    ids, labels = list[int](), list[int]()
    for row_ids, row_labels in rows:
        if _has_label(row_labels):
            ids, labels = ids + row_ids, labels + row_labels
        while len(ids) >= length:
            yield from _cut([(ids, labels)], length)
            ids, labels = ids[length:], labels[length:]


def _cut(rows: Iterable[tuple[list[int], list[int]]], length: int) -> Iterator[Row]:
    for ids, labels in rows:
        if _has_label(labels[:length]):
            yield {"input_ids": ids[:length], "labels": labels[:length]}


def _labelled(
    example: Example, tokenizer: Tokenizer, template: str, response_only: bool
) -> tuple[list[int], list[int]]:
    """Tokenize a row; with `response_only` the prompt has no labels."""
    prompt, response = _render(example, tokenizer, template)
    # A chat template writes its own special tokens.
    special = example.format != "instruction" or template != "chat"
    # Tokenized together and split where the prompt ends, as lm-eval does: some tokenizers put a space before a lone
    # response.
    ids: list[int] = tokenizer(prompt + response, add_special_tokens=special)["input_ids"]
    prompt_length = len(tokenizer(prompt, add_special_tokens=special)["input_ids"]) if prompt and response_only else 0
    return ids, [IGNORED_LABEL] * prompt_length + ids[prompt_length:]


def _render(example: Example, tokenizer: Tokenizer, template: str) -> tuple[str, str]:
    """Write prompt and response as the model reads them."""
    if example.format == "text":
        return "", example.response
    if example.format == "multiple_choice":
        return f"Question: {example.prompt}\nAnswer:", f" {example.response}"
    response = f"{example.response}{tokenizer.eos_token or ''}"
    if template == "alpaca":
        return alpaca_prompt(example.prompt, example.context), response
    if not tokenizer.chat_template:
        raise UserError("`data.template: chat` needs a tokenizer with a chat template; this one has none: use alpaca")
    content = f"{example.prompt}\n\n{example.context}" if example.context else example.prompt
    messages = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), response


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Write an instruction, with its input if it has one, as the prompt of Stanford Alpaca."""
    return ALPACA.format(
        context=", paired with an input that provides further context" if context else "",
        instruction=instruction,
        input=f"### Input:\n{context}\n\n" if context else "",
    )


def pack(rows: Sequence[Row], length: int) -> list[Row]:
    """Concatenate encoded rows into chunks of `length` tokens; chunks without a token to predict are dropped."""
    ids = [token for row in rows for token in row["input_ids"]]
    # The first label of a row would be predicted from the row before it.
    labels = [label for row in rows for label in (IGNORED_LABEL, *row["labels"][1:])]
    chunks = ((ids[start : start + length], labels[start : start + length]) for start in range(0, len(ids), length))
    return list(_cut(chunks, length))


def text_windows(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> list[Row]:
    """Join texts by blank lines and cut windows of `length` tokens; all but a window's first token are predicted."""
    ids: list[int] = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [{"input_ids": part, "labels": part} for part in parts if len(part) > 1]


def load_token_ids(path: Path, vocabulary_size: int) -> list[Row]:
    """Read samples given as token ids: a JSON file with a list of lists."""
    token: Any = Annotated[int, Field(strict=True, ge=0, lt=vocabulary_size)]
    sample: Any = Annotated[list[token], Field(min_length=2)]
    try:
        samples = TypeAdapter(Annotated[list[sample], Field(min_length=1)]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"`calibration.token_ids`: {path} cannot be read: {error}; name another file") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"[{index}]" for index in problem["loc"])
        raise UserError(
            f"`calibration.token_ids`: {path}{place} is {problem['input']!r:.60}: {problem['msg']}; "
            "it must hold lists of two token ids or more, such as [[1, 306, 4658], [1, 910]], each a whole number from "
            f"0 to {vocabulary_size - 1} for this model"
        ) from error
    return [{"input_ids": each, "labels": each} for each in samples]


def _has_label(labels: Sequence[int]) -> bool:
    """Whether any token is predicted; the first one of a row never is."""
    return any(label != IGNORED_LABEL for label in labels[1:])


def collate(rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> dict[str, Any]:
    """Right-pad rows to one batch: ``input_ids``, ``attention_mask``, ``labels``, each ``(batch, seq)`` int64."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(parts: Iterable[Sequence[int]], fill: int) -> Any:
        return torch.tensor([[*part, *[fill] * (longest - len(part))] for part in parts])

    return {
        "input_ids": padded((row["input_ids"] for row in rows), pad_id),
        "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
        "labels": padded((row["labels"] for row in rows), IGNORED_LABEL),
    }


def save_encoded(rows: Sequence[Mapping[str, list[int]]], folder: Path) -> None:
    """Write encoded rows as an Arrow folder, which trials map into memory."""
    import datasets

    datasets.disable_progress_bars()
    encoded = datasets.Dataset.from_list([dict(row) for row in rows])
    with writing_folder(folder) as here:
        retry_storage(lambda: encoded.save_to_disk(here), here)


def load_encoded(folder: Path) -> EncodedRows:
    """Map what `save_encoded` wrote into memory; damage is found here, reading a row later raises nothing."""
    import datasets

    try:
        return retry_storage(lambda: EncodedRows(datasets.load_from_disk(str(fetch(folder)))), folder, was_there=True)
    except (OSError, ValueError, KeyError, AttributeError, NotImplementedError) as error:  # pyarrow's are among them
        raise CorruptFile(f"the encoded rows in {folder} cannot be read: {error}", folder) from error


def load_confirmation(data: Path, part: Literal["choose", "judge"]) -> list[Row]:
    """Load the half of the confirmation rows that chooses the winner, or the half that judges it in the claim.

    The rows that chose would flatter the winner.
    """
    half: list[Row] = load_encoded(data / "confirmation")[("choose", "judge").index(part) :: 2]
    return half


class EncodedRows(Sequence[Row]):
    """Encoded rows in a memory-mapped Arrow file; a row is read when it is indexed, and a slice is a list of rows."""

    def __init__(self, rows: datasets.Dataset) -> None:
        from pyarrow.compute import list_value_length

        rows.data.validate(full=True)  # wrong offsets of a damaged file would be followed anywhere
        self._rows = rows
        self.lengths: list[int] = list_value_length(rows.data["input_ids"]).to_pylist()  # without reading a row

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return self._rows[index]


def row_lengths(rows: Sequence[Mapping[str, list[int]]]) -> list[int]:
    """Count the tokens of each row."""
    return rows.lengths if isinstance(rows, EncodedRows) else [len(row["input_ids"]) for row in rows]
