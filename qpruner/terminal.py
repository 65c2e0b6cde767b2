"""The terminal's view of a run: lines for stages, a progress bar for long ones where stdout is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from qpruner import events

PLAIN_WIDTH = 120


class Terminal:
    """Prints events; `NO_COLOR` is honoured by rich.

    Args:
        quiet: Print results only.
    """

    def __init__(self, quiet: bool) -> None:
        # Where nobody sees a window's edge, lines and tables are not folded at 80 columns.
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        self._console = Console(highlight=False, soft_wrap=True, width=width)
        self._quiet = quiet
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def emit(self, event: events.Event) -> None:
        """Show one event."""
        if self._quiet:
            return
        match event:
            case events.StageStarted(stage, detail):
                self._line(f"[{stage}] {detail} ...")
            case events.StageFinished(stage, seconds, figures):
                self._end_bar(stage)
                self._line(f"[{stage}] done in {seconds:.1f} s: {figures}")
            case events.StageSkipped(stage, figures):
                self._line(f"[{stage}] already recorded: {figures}")
            case events.Message(stage, text):
                self._line(f"[{stage}] {text}")
            case events.Progress(stage, done, total, detail):
                self._advance(stage, done, total, detail)

    def table(self, headings: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        """Print a table of the result."""
        table = Table(*headings)
        for row in body:
            table.add_row(*row)
        self._console.print(table)

    def say(self, text: str) -> None:
        """Print a line of the result."""
        self._line(text)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _advance(self, stage: str, done: int, total: int, detail: str) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._bars[stage], completed=done, total=total, description=f"{stage} {detail}".strip())

    def _end_bar(self, stage: str) -> None:
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))
