"""The pieces that a report is made of, which `html` and `markdown` render."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qpruner.report.plots.chart import Chart

NUMBER = re.compile(r"[-+]?\d[\d.,]*([ %].*)?|-|")


@dataclass(frozen=True)
class Paragraph:
    """Text, in which words in backticks are code."""

    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Items:
    """A list of texts."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; with a `summary` the page folds it under that text."""

    caption: str
    headings: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    summary: str = ""
    is_on_page_only: bool = False

    @property
    def are_numbers(self) -> list[bool]:
        """Whether a column has figures, which stand right-aligned."""
        columns = zip(*self.rows, strict=True) if self.rows else [("",)] * len(self.headings)
        return [all(NUMBER.fullmatch(cell) for cell in column) for column in columns]

    def without_empty_columns(self) -> Table:
        """Drop the columns in which no row has a figure."""
        kept = [column for column in range(len(self.headings)) if any(row[column] != "-" for row in self.rows)]
        rows = [tuple(row[column] for column in kept) for row in self.rows]
        return replace(self, headings=tuple(self.headings[column] for column in kept), rows=rows)


@dataclass(frozen=True)
class Code:
    """A text as it is; with a `summary` the page folds it."""

    text: str
    language: str = ""
    summary: str = ""


Part = Paragraph | Items | Table | Code | Chart


@dataclass(frozen=True)
class Section:
    """A part of the report under a heading."""

    name: str
    heading: str
    parts: list[Part]
