"""The terminal's view of a run: a line for each event and, on a terminal, a live part below them.

The live part shows the stages, the steps inside one, and the search. The log is in the run folder (`qpruner.log`).
"""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Sequence
from types import TracebackType

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from qpruner.cli.search_view import FOLDED, SearchView
from qpruner.report.search_progress import event_line
from qpruner.runs import events
from qpruner.wording import duration

SILENCE_SECONDS = 30.0
"""Without a live part, a line reports progress after this long without any other."""
REFRESHES_PER_SECOND = 2
PACE_SECONDS = 600.0
"""Window of the pace that the time left follows: one step of a large model may take a minute."""
LONGEST_FIGURE = 24
"""Characters of a cell that a table never breaks; columns with longer ones are text, and fold."""
LEAST_TEXT = 12
"""Characters that a column of text keeps when it folds."""


def can_redraw(console: Console) -> bool:
    """Whether a console is a terminal that moves its cursor, whatever `FORCE_COLOR` makes rich believe of a pipe."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


class Terminal:
    """Prints events, to stderr on request; a quiet one prints results only."""

    def __init__(self, quiet: bool, stderr: bool = False) -> None:
        self._console = Console(highlight=False, emoji=False, soft_wrap=True, stderr=stderr)
        self._is_plain = not can_redraw(self._console)
        self._quiet = quiet
        self._bars: dict[str, TaskID] = {}
        self._stages: dict[str, float | str] = {}
        self._counts: dict[str, str] = {}
        self._steps = 0
        self._last_line, self._is_cut = time.monotonic(), False
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._search: SearchView | None = None
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _TimeTaken(),
            _TimeLeft(),
            console=self._console,
            speed_estimate_period=PACE_SECONDS,
        )
        self._live: Live | None = None
        if not (self._is_plain or quiet):
            self._live = Live(
                get_renderable=self._view,
                console=self._console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )

    def __enter__(self) -> Terminal:
        if self._live:
            self._live.start()
        elif not self._quiet:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:  # what is printed from here on stays last
            self._closed.set()
        if self._live:
            self._live.stop()

    def emit(self, event: events.Event) -> None:
        """Show one event; messages about the command itself go to stderr, of a quiet terminal, too."""
        if isinstance(event, events.Message) and event.stage == events.COMMAND:
            click.echo(event_line(event, self._steps), err=True)
            return
        if self._quiet:
            return
        with self._lock:
            if self._is_cut:
                raise SystemExit(1)
            self._show(event)

    def _show(self, event: events.Event) -> None:
        match event:
            case events.StageStarted(stage):
                self._stages[stage] = time.monotonic()
            case events.StageFinished(stage, seconds):
                self._end(stage, duration(seconds))
            case events.StageSkipped(stage):
                self._end(stage, "recorded")
            case events.TableMade(headings, body):
                self.table(headings, body)
            case events.Progress(stage, done, total, detail):
                self._advance(stage, done, total, detail)
            case events.SearchPlanned(search):
                self._search, self._steps = SearchView(event), search.steps
        line = event_line(event, self._steps)
        # The live part shows rungs.
        is_shown = self._live and isinstance(event, events.TrialChanged) and not event.trial.is_over
        if line and not is_shown:
            self._line(line)
        if self._search:
            self._search.listen(event)

    def table(self, headings: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        """Print a table of the result; in a pipe a row is one whole line, for `grep` and `awk`."""
        columns = [_Column(heading, cells) for heading, *cells in zip(headings, *body, strict=True)]
        if self._is_plain:
            for cells in zip(*(column.padded() for column in columns), strict=True):
                self._line("  ".join(cells).rstrip())
            return
        for part in _fitting(columns, self._console.width):
            table = Table()
            for column in part:
                table.add_column(column.folded_heading, no_wrap=not column.is_text, overflow="fold")
            for row in zip(*(column.cells for column in part), strict=True):
                table.add_row(*map(Text, row))
            self._console.print(table)

    def say(self, text: str) -> None:
        """Print a line of the result."""
        self._line(text)

    def prose(self, text: str) -> None:
        """Print sentences of the result, broken between words on a terminal."""
        self._line(text, is_prose=not self._is_plain)

    def _line(self, text: str, is_prose: bool = False) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, markup=False, soft_wrap=not is_prose)

    def _advance(self, stage: str, done: int, total: int, detail: str) -> None:
        before = next((task for task in self._progress.tasks if task.id == self._bars.get(stage)), None)
        if before and (before.total != total or before.completed >= done):
            # A stage counts one thing after another: each has a pace and an end of its own.
            self._progress.remove_task(before.id)
            before = None
        if before is None:
            counts_trials = stage == "search" and not detail
            self._bars[stage] = self._progress.add_task(stage, total=total, counts_trials=counts_trials)
        self._progress.update(self._bars[stage], completed=done, description=f"{stage} {detail}".strip())
        count = f"{detail or 'done'}: {done} of {total}"
        if self._is_plain and self._is_silent():
            self._line(f"[{stage}] {count}")
        if done < total:
            self._counts[stage] = count
        else:
            self._counts.pop(stage, None)

    def _is_silent(self) -> bool:
        return time.monotonic() - self._last_line >= SILENCE_SECONDS

    def _break_silence(self) -> None:
        """Report the stages under way whenever nothing was printed for long."""
        while not self._closed.wait(max(SILENCE_SECONDS / 30, 0.05)):
            with self._lock:
                if not self._closed.is_set() and self._is_silent():
                    try:
                        self._report_stages()
                    except SystemExit:  # rich found the pipe closed; to end is for the command's own thread
                        self._is_cut = True

    def _report_stages(self) -> None:
        for stage in {**self._stages, **self._counts}:  # what export and talk do begins with no event
            began, count = self._stages.get(stage), self._counts.get(stage, "running")
            if not isinstance(began, str):
                taken = f", {duration(time.monotonic() - began)}" if began else ""
                self._line(f"[{stage}] {count}{taken}")

    def _end(self, stage: str, outcome: str) -> None:
        self._stages[stage] = outcome
        self._counts.pop(stage, None)
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))
        if stage == "search":
            self._search = None

    def _view(self) -> RenderableType:
        """Render the live part."""
        now = time.monotonic()
        stages = [
            f"{stage} {outcome}" if isinstance(outcome, str) else f"{stage} running, {duration(now - outcome)}"
            for stage, outcome in tuple(self._stages.items())
        ]
        above = Group(Text(" | ".join(stages), style="bold", **FOLDED), self._progress)
        return _Stacked(above, self._search) if self._search and "search" in self._stages else above


class _Stacked:
    """The search below the rest of the live part, in the lines that are left of the window."""

    def __init__(self, above: RenderableType, search: SearchView) -> None:
        self._above, self._search = above, search

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._above, options.reset_height(), pad=False)
        for line in lines:
            yield from (*line, Segment.line())
        yield from console.render(self._search, options.update_height(max(0, options.size.height - len(lines))))


class _TimeTaken(TimeElapsedColumn):
    """The time taken; none for a search's trials, whose stage shows it above."""

    def render(self, task: Task) -> Text:
        return Text() if task.fields["counts_trials"] else super().render(task)


class _TimeLeft(TimeRemainingColumn):
    """The time left; none for a search's trials, whose own view shows it."""

    def render(self, task: Task) -> Text:
        return Text() if task.fields["counts_trials"] else Text.assemble(super().render(task), " left")


class _Column:
    """A column of a table."""

    def __init__(self, heading: str, cells: Sequence[str]) -> None:
        self.heading, self.cells = heading, cells
        self._width = max(map(cell_len, (*heading.split(), *cells)), default=0)
        self.is_text = self._width > LONGEST_FIGURE

    @property
    def folded_heading(self) -> Text:
        """The heading, folded to the width of the cells or its longest word."""
        return Text("\n".join(textwrap.wrap(self.heading, max(self._width, 1), break_long_words=False)))

    @property
    def least_width(self) -> int:
        """Characters that the column takes at least, with its border."""
        return 3 + (LEAST_TEXT if self.is_text else self._width)

    def padded(self) -> list[str]:
        """Return heading and cells, each in one line and equally wide."""
        lines = [" ".join(text.splitlines()) for text in (self.heading, *self.cells)]
        width = max(map(cell_len, lines))
        return [set_cell_size(line, width) for line in lines]


def _fitting(columns: Sequence[_Column], width: int) -> list[list[_Column]]:
    """Split the columns into as many tables as the width needs; each begins with the first column."""
    parts = [list(columns[:1])]
    for column in columns[1:]:
        if 1 + sum(each.least_width for each in (*parts[-1], column)) > width and len(parts[-1]) > 1:
            parts.append([columns[0]])
        parts[-1].append(column)
    return parts
