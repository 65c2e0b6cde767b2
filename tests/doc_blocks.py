"""Find the fenced code blocks of README, docs and the other pages of the project."""

import re
from dataclasses import dataclass

from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
]
FENCE = re.compile(r"^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page relative to the root, the line of its opening fence, its language
    and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def first(self) -> str:
        """Return the first line that is no comment, which identifies the block."""
        return next(
            (line for line in self.text.splitlines() if line.strip() and not line.startswith("#")),
            "",
        )

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """Return all fenced blocks, page by page."""
    return [
        Block(
            str(page.relative_to(ROOT)),
            text[: found.start()].count("\n") + 1,
            found["language"],
            found["text"],
        )
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for found in FENCE.finditer(text)
    ]
