"""Rows: where they come from, how they become prompts and responses, and how those become tokens.

Three row formats: `instruction` (instruction, input, output), `multiple_choice` (question, choices, answer; ARC's
layout is understood) and `text`. A multiple-choice row is written as lm-eval writes ARC, "Question: ...\\nAnswer: ...",
so that training, validation loss and lm-eval accuracy speak of the same thing.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from qpruner.config.schema import DataSource
from qpruner.errors import CorruptFile, UserError, together
from qpruner.runs.storage import fetch, retry_storage, writing_folder
from qpruner.wording import counted

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""torch's cross entropy leaves these positions out."""

COLUMNS = {
    "instruction": ("instruction", "input", "output"),
    "multiple_choice": ("question", "choices", "answer"),
    "text": ("text",),
}
OPTIONAL_COLUMNS = {"input"}
IMPORTANCE_KEYS = ("calibration.num_samples", "calibration.max_length")
SENSITIVITY_KEYS = ("calibration.num_sensitivity_samples", "data.max_length")
"""How many rows are asked for, and how long each may be."""
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
"""Suffixes of the files that are read, and what datasets calls what they hold."""
OTHER_SUFFIXES = {".xlsx", ".gz", ".zip", ".arrow", ".yaml", ".yml"}
"""Files that are not read; without them a relative path would be looked for on the hub."""
LARGEST_CELL = 2**30
"""Characters; Python's own limit is 131072, less than a long text."""
ALSO_CALLED = {"answer": "answerKey"}
"""Columns that ARC and data like it call otherwise."""

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford Alpaca, with and without an input."""


@dataclass(frozen=True)
class Example:
    """One row. `prompt` is the bare question or instruction, by which rows are told apart.

    Attributes:
        format: The row format it came from.
        prompt: Question or instruction; empty for text.
        context: An instruction's input.
        response: What the model should write.
    """

    format: str
    prompt: str
    context: str
    response: str

    @property
    def identity(self) -> str:
        """What makes two rows the same row: the words of prompt and context, or of the text."""
        return normalized(f"{self.prompt} {self.context}" if self.prompt else self.response)


def normalized(text: str) -> str:
    """Lower-case words and signs, so that spacing and punctuation do not hide a shared row, and 7 + 5 is not 7 * 5."""
    return " ".join(re.findall(r"[^\W_]+|-(?=\d)|[+*/=<>#%$^&|~\u20ac\u00a3\u00d7\u00f7]", text.lower()))


def load_examples(sources: Sequence[DataSource], key: str) -> list[Example]:
    """Read rows and map their columns.

    Args:
        sources: Where the rows are.
        key: The config key of `sources`, for errors.

    Raises:
        UserError: For missing files and columns (the ones there are get listed), of every source; for no rows at all.
    """
    read = together(*(partial(_examples_of, source, f"{key}.{index}") for index, source in enumerate(sources)))
    examples = [example for rows in read for example in rows]
    if not examples:
        raise UserError(f"`{key}` has no rows: name a source that has some, or raise its `limit`")
    return examples


def _examples_of(source: DataSource, key: str) -> list[Example]:
    return [_to_example(row, source, key) for row in _read_rows(source, key)]


def check_disjoint(splits: Mapping[str, Iterable[str]]) -> None:
    """Refuse a row that stands in two splits.

    Args:
        splits: Name of the split -> identities of its rows (`Example.identity` or `normalized` text).

    Raises:
        UserError: Naming both splits, how many rows they share and one of them.
    """
    seen: list[tuple[str, set[str]]] = []
    for name, identities in splits.items():
        rows = {identity for identity in identities if identity}
        for other, other_rows in seen:
            shared = rows & other_rows
            if shared:
                raise UserError(
                    f"{other} and {name} share {counted(len(shared), 'row')}, such as {min(shared)[:90]!r}; training, "
                    "validation, confirmation and test data must not overlap: take other rows or another split"
                )
        seen.append((name, rows))


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str = "alpaca",
    response_only: bool = True,
) -> list[dict[str, list[int]]]:
    """Token ids and labels of each row, cut at `max_length` tokens; rows without a token to predict are dropped.

    Returns:
        One ``{"input_ids": ..., "labels": ...}`` a row; labels are -100 on the prompt when `response_only`.

    Raises:
        UserError: If no row has a response token left within `max_length`.
    """
    encoded = list(_encoded(examples, tokenizer, max_length, template, response_only))
    if not encoded:
        raise UserError(f"`data.max_length` of {max_length} tokens leaves no row a token to predict: make it longer")
    return encoded


def shuffled(examples: Iterable[Example], seed: int) -> list[Example]:
    """The rows in the order in which calibration takes them."""
    rows = list(examples)
    random.Random(seed).shuffle(rows)
    return rows


def row_samples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    template: str,
    response_only: bool,
    keys: tuple[str, str] = IMPORTANCE_KEYS,
) -> list[dict[str, list[int]]]:
    """The first `count` rows that have a token to predict, cut at `length` tokens.

    Args:
        examples: The rows.
        tokenizer: The model's.
        count: How many are asked for.
        length: Tokens a row may have.
        template: How instructions are written.
        response_only: Label the response only, not the prompt.
        keys: The config keys of `count` and `length`, for errors.

    Raises:
        UserError: If fewer have one.
    """
    samples = list(itertools.islice(_encoded(examples, tokenizer, length, template, response_only), count))
    if len(samples) < count:
        asked, limit = keys
        raise UserError(
            f"`{asked}` asks for {counted(count, 'row')}, but only {len(samples)} of the calibration rows have a token "
            f"to predict within {length} tokens (`{limit}`): ask for fewer, give more rows or make it longer"
        )
    return samples


def _encoded(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str,
    response_only: bool,
) -> Iterator[dict[str, list[int]]]:
    for example in examples:
        ids, labels = _labelled(example, tokenizer, template, response_only)
        if _has_label(labels[:max_length]):
            yield {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _labelled(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str, response_only: bool
) -> tuple[list[int], list[int]]:
    """A row's token ids and labels; with `response_only` the prompt has none."""
    ids, prompt_length = _tokens(example, tokenizer, template)
    masked = prompt_length if response_only else 0
    return ids, [IGNORED_LABEL] * masked + ids[masked:]


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], int]:
    """A row's token ids, and how many of them are its prompt's."""
    prompt, response = _render(example, tokenizer, template)
    special = example.format != "instruction" or template != "chat"
    # Together and cut where the prompt ends, as lm-eval does: some tokenizers put a space before a lone response.
    prompt_length = len(tokenizer(prompt, add_special_tokens=special)["input_ids"]) if prompt else 0
    return tokenizer(prompt + response, add_special_tokens=special)["input_ids"], prompt_length


def pack(rows: Sequence[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """Concatenate encoded rows into chunks of `length` tokens; chunks without a token to predict are dropped."""
    ids = [token for row in rows for token in row["input_ids"]]
    # The first label of a row would be predicted from the row before it.
    labels = [label for row in rows for label in (IGNORED_LABEL, *row["labels"][1:])]
    chunks = [
        {"input_ids": ids[start : start + length], "labels": labels[start : start + length]}
        for start in range(0, len(ids), length)
    ]
    return [chunk for chunk in chunks if _has_label(chunk["labels"])]


def packed_samples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    template: str,
    response_only: bool,
) -> list[dict[str, list[int]]]:
    """`count` samples of exactly `length` tokens, cut from the rows joined together; those without a token to predict
    are left out.

    Args:
        examples: The rows, of which as many are read as that takes.
        tokenizer: The model's.
        count: How many samples are asked for.
        length: Tokens of each.
        template: How instructions are written.
        response_only: Label responses only, not prompts.

    Raises:
        UserError: If the rows make fewer.
    """
    rows = (_labelled(example, tokenizer, template, response_only) for example in examples)
    samples = list(itertools.islice(_whole_samples(rows, length), count))
    if len(samples) < count:
        fewer = f"ask for at most {len(samples)}, " if samples else ""
        raise UserError(
            f"`calibration.num_samples` asks for {counted(count, 'sample')} of {length} tokens "
            f"(`calibration.max_length`), but the calibration rows make {len(samples)} with a token to predict, since "
            f"`calibration.packing` cuts samples from the rows joined together: {fewer}make `calibration.max_length` "
            "shorter, give more rows, or set `calibration.packing: false`, which takes a row for a sample"
        )
    return samples


def _whole_samples(rows: Iterable[tuple[list[int], list[int]]], length: int) -> Iterator[dict[str, list[int]]]:
    """Token ids and labels of rows, one after the other, in samples of `length` tokens that have one to predict; rows
    without one, such as the blank lines of a text, are left out."""
    ids: list[int] = []
    labels: list[int] = []
    for row_ids, row_labels in rows:
        if not _has_label(row_labels):
            continue
        ids += row_ids
        labels += row_labels
        while len(ids) >= length:
            if _has_label(labels[:length]):
                yield {"input_ids": ids[:length], "labels": labels[:length]}
            ids, labels = ids[length:], labels[length:]


def text_windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, list[int]]]:
    """Texts, joined by blank lines, in windows of `length` tokens, every token but a window's first to be predicted."""
    ids: list[int] = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [{"input_ids": part, "labels": part} for part in parts if len(part) > 1]


def load_token_ids(path: Path, vocabulary_size: int) -> list[dict[str, list[int]]]:
    """Samples given as token ids: a JSON file with a list of lists.

    Raises:
        UserError: If the file is none, or an id is outside the vocabulary.
    """
    key = "`calibration.token_ids`"
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read as JSON: {error}; write it anew or name another") from error
    is_list = isinstance(samples, list) and samples and all(isinstance(sample, list) for sample in samples)
    if not is_list:
        raise UserError(f"{key}: {path} must hold a list of lists of token ids, such as [[1, 306, 4658], [1, 910]]")
    for position, sample in enumerate(samples):
        wrong = [token for token in sample if type(token) is not int or not 0 <= token < vocabulary_size]
        if wrong:
            raise UserError(
                f"{key}: sample {position} of {path} has {wrong[0]!r}, but a token id is a whole number from 0 to "
                f"{vocabulary_size - 1} for this model"
            )
        if len(sample) < 2:
            raise UserError(
                f"{key}: sample {position} of {path} has {counted(len(sample), 'token')}; two at least are needed: "
                "leave it out"
            )
    return [{"input_ids": sample, "labels": sample} for sample in samples]


def _has_label(labels: Sequence[int]) -> bool:
    """Whether any token is predicted; the first one of a row never is."""
    return any(label != IGNORED_LABEL for label in labels[1:])


def collate(rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> dict[str, Any]:
    """Right-pad rows to one batch: ``input_ids``, ``attention_mask``, ``labels``, each ``(batch, seq)`` int64."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Any:
        return torch.tensor([list(row[name]) + [fill] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", pad_id),
        "attention_mask": torch.tensor(mask),
        "labels": padded("labels", IGNORED_LABEL),
    }


def _read_rows(source: DataSource, key: str) -> list[dict[str, Any]]:
    import datasets

    from qpruner.models.loading import resolve_source

    datasets.disable_progress_bars()
    path = resolve_source(source.source, f"{key}.source")
    suffix = Path(path).suffix.lower()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what fails is told by the error below
    try:
        if suffix in BUILDERS:
            if not Path(path).is_file():
                raise UserError(f"`{key}.source`: file {path} does not exist; name a data file or a hub id")
            if not Path(path).stat().st_size:
                raise UserError(f"`{key}.source`: file {path} is empty; name another")
            options = _as_written(Path(path), suffix) if BUILDERS[suffix] == "csv" else {}
            rows = datasets.load_dataset(BUILDERS[suffix], data_files=path, split=source.split, **options)
        elif path.startswith((".", "/")) or Path(path).exists() or suffix in OTHER_SUFFIXES:
            *others, last = BUILDERS
            raise UserError(
                f"`{key}.source`: {path} is no data file; give a {', '.join(others)} or {last} file, or a hub id"
            )
        else:
            rows = datasets.load_dataset(path, source.subset, split=source.split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many types for files that cannot be parsed and hubs out of reach
        reason = (suffix == ".jsonl" and _line_without_row(Path(path))) or cause_of(error)
        if "corresponds to no data" in reason or reason.startswith("Unknown split"):
            raise UserError(
                f"`{key}.split`: {source.split} takes no rows of {source.source!r} ({reason}): name another part of it"
            ) from error
        raise UserError(
            f"`{key}.source`: no rows can be read from {source.source!r}: {reason}; mend it or name another"
        ) from error
    _check_columns(rows.column_names, source, key)
    count = len(rows) if source.limit is None else min(source.limit, len(rows))
    return [dict(row) for row in rows.select(range(count))]


def _as_written(path: Path, suffix: str) -> dict[str, Any]:
    """For datasets: every cell is the text that stands there. Left to itself pandas makes numbers of 007 and 1.50, and
    holes of "None" and "NA"; a column whose first 10,000 cells are numbers then refuses the word that follows.

    Raises:
        ValueError: For a file of which pandas would make other rows than it has, without a word: rows of more or fewer
            cells than the header names, quotes that are left open, two columns of one name.
    """
    import datasets

    separator = "\t" if suffix == ".tsv" else ","
    header = _header_of_whole_table(path, separator)
    # What pandas calls a column without a name.
    names = [name or f"Unnamed: {position}" for position, name in enumerate(header)]
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _header_of_whole_table(path: Path, separator: str) -> list[str]:
    """The first line's cells, where every other line has as many."""
    csv.field_size_limit(LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(file, delimiter=separator, strict=True)
        header: list[str] = []
        num_rows, begins = 0, 1
        try:
            for row in table:
                if row and header and len(row) != len(header):
                    remedy = f"a cell that holds {separator!r} stands in double quotes"
                    if len(row) < len(header):
                        remedy = f"an empty cell has its {separator!r}, too"
                    raise ValueError(
                        f"line {table.line_num} has {counted(len(row), 'cell')}, its header {len(header)} "
                        f"({', '.join(header)}): {remedy}"
                    )
                num_rows += bool(row and header)
                header, begins = header or row, table.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"line {begins}: {error}: a cell that begins with a double quote ends with one, and those "
                "in it are doubled"
            ) from None
        except UnicodeDecodeError:
            raise ValueError(_line_without_utf8(path)) from None
    if separator == "," and len(header) == 1 and ";" in header[0]:
        raise ValueError("its header is one cell with semicolons: in a .csv file commas part the cells")
    if twice := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
        raise ValueError(f"two of its columns are called {twice[0]!r}")
    if not num_rows:
        raise ValueError("it has no row under its header")
    return header


def cause_of(error: Exception) -> str:
    """Why rows cannot be loaded, in a line; datasets itself only says that generating the data set failed."""
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


def _line_without_utf8(path: Path) -> str:
    """The first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number} is no UTF-8: save the file as UTF-8"
    return "it is no UTF-8: save it as UTF-8"


def _line_without_row(path: Path) -> str | None:
    """The first line of a file that is no JSON object; None where all are. The readers count from the line's block."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                return f"line {number} is no JSON: {error.msg} at column {error.colno}"
            except UnicodeDecodeError:
                return f"line {number} is no UTF-8"
            if not isinstance(row, dict):
                return f"line {number} is no JSON object"
    return None


def _check_columns(available: Sequence[str], source: DataSource, key: str) -> None:
    """Refuse a mapping of unknown columns, or to columns that the data lack."""
    ours = COLUMNS[source.format]
    unknown = sorted(set(source.columns) - set(ours))
    if unknown:
        raise UserError(
            f"`{key}.columns` names {', '.join(unknown)}; rows of format {source.format} have the columns "
            f"{', '.join(ours)}"
        )
    for column in ours:
        theirs = _mapped(source, column, available)
        if len(theirs) > 1 and column != "choices":
            raise UserError(f"`{key}.columns.{column}` must name one column, got {', '.join(theirs)}")
        missing = [name for name in theirs if name not in available]
        if missing and not (column in OPTIONAL_COLUMNS and column not in source.columns):
            raise UserError(
                f"`{key}.columns.{column}`: the data have no column {', '.join(missing)}; "
                f"they have {', '.join(available)}{_where_named(source)}; name yours with, for example, "
                f"`columns: {{{column}: {available[0]}}}`"
            )


def _where_named(source: DataSource) -> str:
    """Where columns are named that look like none, as those of a file without a header do."""
    is_table = BUILDERS.get(Path(source.source).suffix.lower()) == "csv"
    return ", which the first line of the file says: it is the header" if is_table else ""


def _mapped(source: DataSource, column: str, available: Collection[str]) -> tuple[str, ...]:
    other = ALSO_CALLED.get(column, column)
    value = source.columns.get(column, column if column in available or other not in available else other)
    return (value,) if isinstance(value, str) else tuple(value)


def _to_example(row: dict[str, Any], source: DataSource, key: str) -> Example:
    def value(column: str) -> str:
        found = row.get(_mapped(source, column, row)[0])
        return "" if found is None else str(found)

    if source.format == "text":
        return Example("text", "", "", value("text"))
    if source.format == "instruction":
        return Example("instruction", value("instruction"), value("input"), value("output"))
    columns = _mapped(source, "choices", row)
    if len(columns) == 1 and not isinstance(row[columns[0]], (list, dict)):
        raise UserError(
            f"`{key}.columns.choices`: column {columns[0]} must hold a list of choices, got {row[columns[0]]!r:.60}; "
            "where each choice has a column, give a list of columns"
        )
    choices, labels = _choices(row, columns)
    answer = row[_mapped(source, "answer", row)[0]]
    if isinstance(answer, str) and answer in labels:
        index = labels.index(answer)
    elif str(answer).isdigit() and int(answer) < len(choices):
        index = int(answer)
    else:
        asked = value("question")[:90]
        raise UserError(
            f"`{key}.columns.answer`: {answer!r} is neither one of the labels {', '.join(labels)} nor a position "
            f"from 0 to {len(choices) - 1}; the question is {asked!r}"
        )
    return Example("multiple_choice", value("question"), "", choices[index])


def _choices(row: dict[str, Any], columns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Texts and labels of the choices: several columns, a list, or ARC's {text, label}."""
    if len(columns) > 1:
        texts = [str(row[column]) for column in columns]
    elif isinstance(row[columns[0]], dict):
        return list(row[columns[0]]["text"]), list(row[columns[0]]["label"])
    else:
        texts = [str(text) for text in row[columns[0]]]
    return texts, [chr(ord("A") + position) for position in range(len(texts))]


def _render(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """Prompt and response as the model sees them."""
    if example.format == "text":
        return "", example.response
    if example.format == "multiple_choice":
        return f"Question: {example.prompt}\nAnswer:", f" {example.response}"
    if template == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                "`data.template: chat` needs a tokenizer with a chat template; this one has none: use alpaca"
            )
        content = f"{example.prompt}\n\n{example.context}" if example.context else example.prompt
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(prompt), f"{example.response}{tokenizer.eos_token or ''}"
    return alpaca_prompt(example.prompt, example.context), f"{example.response}{tokenizer.eos_token or ''}"


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """An instruction, and its input where it has one, in the prompt of Stanford Alpaca."""
    return ALPACA.format(
        context=", paired with an input that provides further context" if context else "",
        instruction=instruction,
        input=f"### Input:\n{context}\n\n" if context else "",
    )


def save_encoded(rows: Sequence[Mapping[str, list[int]]], folder: Path) -> None:
    """Write encoded rows as an Arrow folder, which every trial maps into memory instead of encoding again."""
    import datasets

    datasets.disable_progress_bars()
    encoded = datasets.Dataset.from_list([dict(row) for row in rows])
    with writing_folder(folder) as here:
        retry_storage(lambda: encoded.save_to_disk(here), here)


def load_confirmation(data: Path, part: Literal["choose", "judge"]) -> list[dict[str, list[int]]]:
    """Every other confirmation row: those that choose the winner, or those that judge it in the claim; the rows that
    made a choice would flatter it."""
    return load_encoded(data / "confirmation")[("choose", "judge").index(part) :: 2]


def load_encoded(folder: Path) -> EncodedRows:
    """Map what `save_encoded` wrote into memory.

    Raises:
        CorruptFile: If the folder is damaged; reading a row later raises nothing.
    """
    import datasets

    try:
        return retry_storage(lambda: EncodedRows(datasets.load_from_disk(str(fetch(folder)))), folder, was_there=True)
    except (OSError, ValueError, KeyError, AttributeError, NotImplementedError) as error:  # pyarrow's are among them
        raise CorruptFile(f"the encoded rows in {folder} cannot be read: {error}", folder) from error


class EncodedRows(Sequence[dict[str, list[int]]]):
    """Encoded rows in an Arrow file that is mapped into memory: a row is read when it is asked for.

    A slice is a list of rows.

    Attributes:
        lengths: Tokens of each row, from Arrow's offsets; no row is read for them.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        from pyarrow.compute import list_value_length

        rows.data.validate(full=True)  # offsets that a damaged file has wrong would be followed anywhere
        self._rows = rows
        self.lengths: list[int] = list_value_length(rows.data["input_ids"]).to_pylist()

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> dict[str, list[int]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, list[int]]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, list[int]] | list[dict[str, list[int]]]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return cast("dict[str, list[int]]", self._rows[index])


def row_lengths(rows: Sequence[Mapping[str, list[int]]]) -> list[int]:
    """Tokens of each row."""
    return rows.lengths if isinstance(rows, EncodedRows) else [len(row["input_ids"]) for row in rows]
