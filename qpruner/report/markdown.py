"""Renders `report.md` and other Markdown, for example for GitHub and TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qpruner.report.content import Code, Items, Paragraph, Part, Section, Table
from qpruner.report.plots.chart import Chart
from qpruner.report.snapshot import Snapshot


def render(run: Snapshot, listed: Sequence[Section], pictures: str) -> str:
    """Render `report.md` from its sections; `pictures` is the relative path of the folder with the plots' PNG files."""
    blocks = [f"# qpruner: {prose(run.name)}", prose(run.standing), *filter(None, [run.missing])]
    for section in listed:
        blocks += [f"## {section.heading}", *parts_text(section.parts, pictures)]
    return "\n\n".join(blocks) + "\n"


def parts_text(parts: Iterable[Part], pictures: str = "") -> list[str]:
    """Render parts as Markdown blocks, to be joined by empty lines; plots need `pictures`, the folder of PNG files."""
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
        case Code(text, language, summary):
            # The fence must be longer than any run of backticks in the text.
            fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
            return [*([f"{summary}:"] if summary else []), f"{fence}{language}\n{text.rstrip()}\n{fence}"]
    return []


def pipe_table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Render a table, with the cells' text escaped."""
    lines = [[_inline(cell).replace("|", "\\|") for cell in row] for row in (headings, *body)]
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|" + "---|" * len(headings), *others])


def prose(text: str) -> str:
    """Escape a paragraph, so that text between backticks is code and everything else is plain text."""
    # Lists, headings, rules and quotations are marked at the start of a paragraph only.
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+](?:\s|$)|--|#|>))", r"\1\\", _inline(text).strip())


def code(text: str) -> str:
    """Render text as inline code; backticks in it become apostrophes."""
    return "`" + text.replace("`", "'") + "`"


def _inline(text: str) -> str:
    parts = re.split(r"(?<!`)(`[^`\n]+`)(?!`)", text)
    for index in range(0, len(parts), 2):  # the text outside code; an underscore inside a word needs no escape
        marked = re.sub(r"[\\`*~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", parts[index])
        parts[index] = marked.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(parts).replace("\n", " ")
