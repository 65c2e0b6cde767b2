"""The parts of a report and their Markdown.

A part is a paragraph, a list, a table, code or a section. `html` renders the page.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qpruner.plans.plan import PrecisionPlan
from qpruner.report.plots.chart import Chart
from qpruner.report.snapshot import Snapshot
from qpruner.report.statistics import Difference

NUMBER = re.compile(r"[-+]?\d[\d.,]*([ %].{0,40})?|-|")
"""A number with a unit or an interval, not a sentence that begins with a number."""
BAR_WIDTH = 15  # characters of an interval that is drawn without graphics


@dataclass(frozen=True)
class ComparedCell:
    """A cell with another model's figure and the winner's difference from it.

    The difference is drawn with its 95 % interval. For figures without an interval, `times` is the
    winner's figure as a multiple of this one.
    """

    figure: str
    times: str = ""
    difference: Difference | None = None

    @property
    def in_words(self) -> str:
        """The cell with the figures of its interval."""
        remark = self.difference.text if self.difference else self.times
        return f"{self.figure} ({remark})" if remark else self.figure

    def __str__(self) -> str:
        """Draw the interval in plain characters.

        `|` is no difference and `o` the mean; to the right is better.
        """
        bar = self.difference.bar if self.difference else None
        if bar is None:
            return f"{self.figure}  {self.times}"
        middle = BAR_WIDTH // 2
        # An interval that excludes zero must not touch the middle.
        low, mean, high = (
            middle + int(math.copysign(max(1, round(abs(share) * middle)), share)) for share in bar
        )
        line = [" "] * low + ["-"] * (high + 1 - low) + [" "] * (BAR_WIDTH - high - 1)
        line[middle] = "|"
        line[mean] = "o"
        return f"{self.figure}  [{''.join(line)}]"


Cell = str | PrecisionPlan | ComparedCell
"""Text, a plan (drawn as a bar, or written with a letter per group), or a comparison."""


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
    """A table with a caption."""

    caption: str
    headings: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    is_on_page_only: bool = False

    @property
    def are_numbers(self) -> list[bool]:
        """Whether each column holds only numbers, which are then right-aligned."""
        if not self.rows:
            return [False] * len(self.headings)
        return [
            all(isinstance(cell, str) and NUMBER.fullmatch(cell) for cell in column)
            for column in zip(*self.rows, strict=True)
        ]

    def without_empty_columns(self) -> Table:
        """Drop the columns in which every cell is `-`."""
        columns = zip(*self.rows, strict=True)
        is_kept = [any(cell != "-" for cell in column) for column in columns]
        headings = tuple(itertools.compress(self.headings, is_kept))
        return replace(
            self,
            headings=headings,
            rows=[tuple(itertools.compress(row, is_kept)) for row in self.rows],
        )


@dataclass(frozen=True)
class Code:
    """A block of code."""

    text: str
    language: str = ""


Part = Paragraph | Items | Table | Code | Chart


@dataclass(frozen=True)
class Section:
    """A section of the report: a heading and the parts below it."""

    name: str
    heading: str
    parts: list[Part]


# ---- Markdown, for example for GitHub and TensorBoard


def report_md(run: Snapshot, listed: Sequence[Section], pictures: str) -> str:
    """Render `report.md` from its sections.

    `pictures` is the relative path of the folder with the plots' PNG files.
    """
    blocks = [f"# qpruner: {prose(run.name)}", prose(run.standing)]
    if run.missing:
        blocks.append(run.missing)
    for section in listed:
        blocks.append(f"## {section.heading}")
        blocks += markdown(section.parts, pictures)
    return "\n\n".join(blocks) + "\n"


def markdown(parts: Iterable[Part], pictures: str = "") -> list[str]:
    """Render parts as Markdown blocks, which are to be joined by empty lines.

    Plots are links to PNG files in the folder `pictures`.
    """
    return [block for part in parts for block in _part(part, pictures)]


def _part(part: Part, pictures: str) -> list[str]:
    match part:
        case Paragraph(text):
            return [prose(text)]
        case Items(items):
            return ["\n".join(f"- {prose(item)}" for item in items)]
        case Table() if not part.is_on_page_only:
            return [f"{prose(part.caption)}:", pipe_table(part.headings, part.rows)]
        case Chart():
            title = prose(part.title)
            return [f"![{title}]({pictures}/{part.name}.png)", f"{title}. {prose(part.caption)}"]
        case Code(text, language):
            # The fence must be longer than any run of backticks in the text.
            fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
            return [f"{fence}{language}\n{text.rstrip()}\n{fence}"]
    return []


def pipe_table(headings: Sequence[str], body: Sequence[Sequence[Cell]]) -> str:
    """Render a table, with the cells' text escaped."""
    first, *others = (f"| {' | '.join(map(_table_cell, row))} |" for row in (headings, *body))
    return "\n".join([first, "|" + "---|" * len(headings), *others])


def _table_cell(cell: Cell) -> str:
    text = cell.in_words if isinstance(cell, ComparedCell) else str(cell)
    return _inline(text).replace("|", "\\|")


def prose(text: str) -> str:
    """Escape a paragraph so that text between backticks is code and everything else plain text."""
    # Lists, headings, rules and quotations are marked at the start of a paragraph only.
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+](?:\s|$)|--|#|>))", r"\1\\", _inline(text).strip())


def code(text: str) -> str:
    """Render text as inline code; backticks in it become apostrophes."""
    return "`" + text.replace("`", "'") + "`"


def _inline(text: str) -> str:
    parts = re.split(r"(?<!`)(`[^`\n]+`)(?!`)", text)
    # the text outside code; an underscore inside a word needs no escape
    for index in range(0, len(parts), 2):
        marked = re.sub(r"[\\`*~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", parts[index])
        parts[index] = marked.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(parts).replace("\n", " ")
