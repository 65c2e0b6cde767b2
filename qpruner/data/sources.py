"""Read rows from data files and from the hub, and map their columns to those of a row format.

`COLUMNS` lists the columns of each format.
"""

import csv
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qpruner.config.schema import DataSource
from qpruner.errors import UserError, first_line, together
from qpruner.wording import counted

COLUMNS = {
    "instruction": ("instruction", "input", "output"),
    "multiple_choice": ("question", "choices", "answer"),
    "text": ("text",),
}
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
"""Suffixes of supported data files, and the builders of `datasets` that read them."""
OTHER_SUFFIXES = {".tsv", ".xlsx", ".gz", ".zip", ".arrow", ".yaml", ".yml"}
"""Suffixes of unsupported files; a relative path with such a suffix is refused instead of looked up
on the hub."""
SPLIT_REFUSALS = (
    "Unknown split",
    "corresponds to no data",
    "Unrecognized instruction",
    "Percent slice",
    "Split name",
)
"""Parts of the messages with which datasets (5.2) refuses a split."""


@dataclass(frozen=True)
class Example:
    """Hold a row: `prompt` is its question or instruction, `context` the input of an instruction.

    A row of text has a `response` only.
    """

    format: str
    prompt: str
    context: str
    response: str

    @property
    def identity(self) -> str:
        """Return the normalized prompt and context, or text.

        Two rows with the same identity count as duplicates.
        """
        return normalized(f"{self.prompt} {self.context}" if self.prompt else self.response)


def normalized(text: str) -> str:
    """Lower the case and drop punctuation and extra spaces.

    Operators stay, because 7 + 5 is not 7 * 5.
    """
    return " ".join(
        re.findall(r"[^\W_]+|-(?=\d)|[+*/=<>#%$^&|~\u20ac\u00a3\u00d7\u00f7]", text.lower())
    )


def load_examples(sources: Sequence[DataSource], key: str) -> list[Example]:
    """Read the rows of all sources under the configuration key `key`, and map their columns."""
    reads = [
        partial(_examples_of, source, f"{key}.{index}") for index, source in enumerate(sources)
    ]
    examples = list(itertools.chain(*together(*reads)))
    if not examples:
        raise UserError(
            f"`{key}` has no rows: name a source with rows, or raise the `limit` of one"
        )
    return examples


def check_disjoint(splits: Mapping[str, Iterable[str]]) -> None:
    """Raise `UserError` if two splits share a row.

    `splits` maps names to the `Example.identity` values of their rows.
    """
    checked: list[tuple[str, set[str]]] = []
    for name, identities in splits.items():
        rows = {identity for identity in identities if identity}
        for other, other_rows in checked:
            shared = rows & other_rows
            if shared:
                raise UserError(
                    f"{other} and {name} share {counted(len(shared), 'row')}, such as "
                    f"{min(shared)[:90]!r}; they must not overlap: select other rows or another "
                    "split"
                )
        checked.append((name, rows))


def _examples_of(source: DataSource, key: str) -> list[Example]:
    import datasets

    from qpruner.models.loading import resolve_source

    datasets.disable_progress_bars()
    path = resolve_source(source.source, f"{key}.source")
    suffix = Path(path).suffix.lower()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # the error below reports the failure
    try:
        if suffix in BUILDERS:
            rows = _read_file(Path(path), source.split, key)
        elif path.startswith((".", "/")) or Path(path).exists() or suffix in OTHER_SUFFIXES:
            raise UserError(
                f"`{key}.source`: {path} is not a data file; give a {', '.join(BUILDERS)} file or "
                "a hub id"
            )
        else:
            rows = datasets.load_dataset(path, source.subset, split=source.split)
    except UserError:
        raise
    # datasets raises many types for unreadable files and unreachable hubs.
    except Exception as error:
        reason = _line_without_row(Path(path)) if suffix == ".jsonl" else None
        reason = reason or first_line(error.__cause__ or error)
        if any(words in reason for words in SPLIT_REFUSALS):
            raise UserError(
                f"`{key}.split`: {source.split!r} selects no rows of {source.source!r} "
                f"({reason}); name a split of it, such as `train[:100]`"
            ) from error
        raise UserError(
            f"`{key}.source`: no rows can be read from {source.source!r}: {reason}; correct the "
            "source or name another"
        ) from error

    _check_columns(rows.column_names, source, key)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    return [_to_example(dict(row), source, key) for row in rows]


def _read_file(path: Path, split: str, key: str) -> Any:
    import datasets

    if not path.is_file():
        raise UserError(f"`{key}.source`: file {path} does not exist; name a data file or a hub id")
    if not path.stat().st_size:
        raise UserError(f"`{key}.source`: file {path} is empty; name another file")
    builder = BUILDERS[path.suffix.lower()]
    options: dict[str, Any] = {}
    if builder == "csv":
        # Every cell is text: pandas would read `007` as the number 7, and `null` or `NA` as an
        # empty cell.
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        text = datasets.Value("string")
        options["features"] = datasets.Features(dict.fromkeys(columns, text))
        options["keep_default_na"] = False
    return datasets.load_dataset(builder, data_files=str(path), split=split, **options)


def _line_without_row(path: Path) -> str | None:
    """Describe the first line that is not a JSON object; `datasets` reports wrong line numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
            except ValueError as error:  # includes text that is not UTF-8
                return f"line {number} is not JSON: {error}"
    return None


def _check_columns(available: Sequence[str], source: DataSource, key: str) -> None:
    """Raise `UserError` if `source.columns` names a column that the row format or the data lack.

    `available` lists the columns of the data.
    """
    known = COLUMNS[source.format]
    unknown = sorted(set(source.columns) - set(known))
    if unknown:
        raise UserError(
            f"`{key}.columns` has the keys {', '.join(unknown)}, but format {source.format} knows "
            f"the keys {', '.join(known)}"
        )
    for column in known:
        mapped = _mapped(source, column, available)
        if len(mapped) > 1 and column != "choices":
            raise UserError(
                f"`{key}.columns.{column}` must name one column, got {', '.join(mapped)}"
            )
        missing = [name for name in mapped if name not in available]
        is_optional = column == "input" and column not in source.columns
        if missing and not is_optional:
            raise UserError(
                f"`{key}.columns.{column}`: the data have no column {', '.join(missing)}, only "
                f"{', '.join(available)}; name one of them, such as `columns: {{{column}: "
                f"{available[0]}}}`"
            )


def _mapped(source: DataSource, column: str, available: Collection[str]) -> tuple[str, ...]:
    """Return the columns of the data that a column of the row format is made of."""
    default = column
    if column == "answer" and column not in available and "answerKey" in available:
        default = "answerKey"  # the name in ARC
    named = source.columns.get(column, default)
    return named if isinstance(named, tuple) else (named,)


def _to_example(row: dict[str, Any], source: DataSource, key: str) -> Example:
    def value(column: str) -> str:
        cell = row.get(_mapped(source, column, row)[0])
        return "" if cell is None else str(cell)

    if source.format == "text":
        return Example("text", "", "", value("text"))
    if source.format == "instruction":
        return Example("instruction", value("instruction"), value("input"), value("output"))
    columns = _mapped(source, "choices", row)
    cells = row[columns[0]] if len(columns) == 1 else [row[column] for column in columns]
    if isinstance(cells, dict):  # ARC's `{text, label}`
        choices = list(cells["text"])
        labels = list(cells["label"])
    elif isinstance(cells, list):
        choices = [str(text) for text in cells]
        labels = [chr(ord("A") + position) for position in range(len(cells))]
    else:
        raise UserError(
            f"`{key}.columns.choices`: column {columns[0]} must hold a list of choices, got "
            f"{cells!r:.60}; if each choice has its own column, list these columns"
        )
    answer = row[_mapped(source, "answer", row)[0]]
    if isinstance(answer, str) and answer in labels:
        index = labels.index(answer)
    elif str(answer).isdigit() and int(answer) < len(choices):
        index = int(answer)
    else:
        raise UserError(
            f"`{key}.columns.answer`: {answer!r} is none of the labels {', '.join(labels)} and no "
            f"position from 0 to {len(choices) - 1}; correct the row {value('question')[:90]!r}"
        )
    return Example("multiple_choice", value("question"), "", choices[index])
