"""The parts of a report (paragraph, list, table, code, section), which `html` and `markdown` render."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qpruner.report.plots.chart import Chart

NUMBER = re.compile(r"[-+]?\d[\d.,]*([ %].{0,40})?|-|")
"""A number with a unit or an interval, not a sentence that begins with a number."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; text between backticks is code."""

    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Items:
    """A bullet list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; `report.html` hides a table with a `summary` until the reader clicks on the summary."""

    caption: str
    headings: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    summary: str = ""
    is_on_page_only: bool = False

    @property
    def are_numbers(self) -> list[bool]:
        """Whether each column holds only numbers, which are then right-aligned."""
        columns = zip(*self.rows, strict=True) if self.rows else [("",)] * len(self.headings)
        return [all(NUMBER.fullmatch(cell) for cell in column) for column in columns]

    def without_empty_columns(self) -> Table:
        """Drop the columns in which every cell is `-`."""
        kept = [column for column in range(len(self.headings)) if any(row[column] != "-" for row in self.rows)]
        rows = [tuple(row[column] for column in kept) for row in self.rows]
        return replace(self, headings=tuple(self.headings[column] for column in kept), rows=rows)


@dataclass(frozen=True)
class Code:
    """A block of code; `report.html` hides a block with a `summary` until the reader clicks on the summary."""

    text: str
    language: str = ""
    summary: str = ""


Part = Paragraph | Items | Table | Code | Chart


@dataclass(frozen=True)
class Section:
    """A section of the report: a heading and the parts below it."""

    name: str
    heading: str
    parts: list[Part]
