"""Print the events of a run: one line each and, on a terminal, a live view below them.

The live view shows the stages, the progress within a stage, and the search. The log is
`qpruner.log` in the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click
from rich import progress
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from qpruner.plans.plan import PrecisionPlan, cut_title, plan_of
from qpruner.quantization.formats import format_of
from qpruner.report import content
from qpruner.report.content import Cell, Paragraph, Part
from qpruner.runs import events
from qpruner.runs.records import SearchState, TrialRecord
from qpruner.search import progress as trials_now
from qpruner.search.progress import event_line, score_title
from qpruner.wording import duration

SILENCE_SECONDS = 30.0
"""Without a live view, a count is printed after this many seconds without output."""
REFRESHES_PER_SECOND = 2
PACE_SECONDS = 600.0
"""The time left is estimated from the steps of the last 10 minutes: one step of a large model may
take a minute."""
LINES_ABOVE = 10  # approximate number of lines of the live view above the list of running trials
FOLDED: Any = {"no_wrap": False, "overflow": "fold"}
"""Options of rich that wrap text in a narrow window; without them a live view cuts the text off."""


class Terminal:
    """Prints the events of a run to stdout or stderr; with `quiet` it prints results only."""

    def __init__(self, quiet: bool, stderr: bool = False) -> None:
        console = Console(highlight=False, emoji=False, soft_wrap=True, stderr=stderr)
        self._console = console
        # With `FORCE_COLOR` rich alone would take a pipe for a terminal.
        can_move_cursor = console.file.isatty() and console.is_terminal
        self._is_plain = not can_move_cursor or console.is_dumb_terminal
        self._quiet = quiet
        self._bars: dict[str, progress.TaskID] = {}
        self._stages: dict[str, float | str] = {}
        self._last_line = time.monotonic()
        self._search: SearchState | None = None
        self._trials: dict[int, TrialRecord] = {}
        self._steps: Mapping[int, int] = {}
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=console,
            speed_estimate_period=PACE_SECONDS,
        )
        self._live: Live | None = None
        if not (self._is_plain or quiet):
            self._live = Live(
                get_renderable=self._view,
                console=console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )

    def __enter__(self) -> Terminal:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def emit(self, event: events.Event) -> None:
        """Show one event; print messages that belong to no stage to stderr, even with `quiet`."""
        if isinstance(event, events.Message) and event.stage == events.COMMAND:
            click.echo(event_line(event, 0), err=True)
            return
        if not self._quiet:
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
                self._search = search
                self._trials = {trial.index: trial for trial in event.trials}
            case events.SlotsFound(slots) if self._search:
                self._search = self._search.model_copy(update={"slots": slots})
            case events.TrialChanged(trial, is_withdrawn=True):
                self._trials.pop(trial.index, None)
            case events.TrialChanged(trial):
                self._trials[trial.index] = trial
            case events.StepsSeen(steps):
                self._steps = steps

        # The live view already shows the rungs of a running trial.
        if self._live and isinstance(event, events.TrialChanged) and not event.trial.is_over:
            return
        line = event_line(event, self._search.steps if self._search else 0)
        if line:
            self.say(line)

    def table(self, headings: Sequence[str], body: Sequence[Sequence[Cell]]) -> None:
        """Print a table; in a pipe each row is one line, so that `grep` and `awk` work."""
        if self._is_plain:
            rows = [[" ".join(str(cell).splitlines()) for cell in row] for row in (headings, *body)]
            widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
            for cells in rows:
                self.say("  ".join(map(set_cell_size, cells, widths)).rstrip())
            return

        columns = [Column(Text(heading), overflow="fold") for heading in headings]
        table = Table(*columns, box=None, padding=(0, 2, 0, 0))
        for row in body:
            table.add_row(*map(_rendered, row))
        self._console.print(table)

    def show(self, parts: Iterable[Part]) -> None:
        """Print paragraphs and tables; plots are in the report only."""
        for part in parts:
            if isinstance(part, Paragraph):
                self.say(part.text, is_prose=True)
            elif isinstance(part, content.Table):
                self.say(f"{part.caption}:")
                self.table(part.headings, part.rows)

    def say(self, text: str, is_prose: bool = False) -> None:
        """Print a line; on a terminal, prose is wrapped between words."""
        self._last_line = time.monotonic()
        self._console.print(text, markup=False, soft_wrap=self._is_plain or not is_prose)

    def _advance(self, stage: str, done: int, total: int, detail: str) -> None:
        if stage != "search" or detail:  # the view of the search already counts trials
            bar = self._bar(stage, done, total)
            self._progress.update(bar, completed=done, description=f"{stage} {detail}".strip())
        if not self._live and time.monotonic() - self._last_line >= SILENCE_SECONDS:
            self.say(f"[{stage}] {detail or 'done'}: {done} of {total}")

    def _bar(self, stage: str, done: int, total: int) -> progress.TaskID:
        """Return the bar of a stage, a new one if it begins to count something else.

        A stage may count several things in turn: each gets a bar with its own pace and total.
        """
        for task in self._progress.tasks:
            if task.id == self._bars.get(stage):
                if task.total == total and task.completed < done:
                    return task.id
                self._progress.remove_task(task.id)
                break
        self._bars[stage] = self._progress.add_task(stage, total=total)
        return self._bars[stage]

    def _end(self, stage: str, outcome: str) -> None:
        self._stages[stage] = outcome
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))
        if stage == "search":
            self._search = None

    def _view(self) -> RenderableType:
        """Render the live view; rich cuts off the lines below the window."""
        now = time.monotonic()
        stages = []
        for stage, outcome in tuple(self._stages.items()):
            if not isinstance(outcome, str):
                outcome = f"running, {duration(now - outcome)}"
            stages.append(f"{stage} {outcome}")
        headline = Text(" | ".join(stages), style="bold", **FOLDED)
        parts: list[RenderableType] = [headline, self._progress]
        if self._search and "search" in self._stages:
            num_listed = max(1, self._console.size.height - LINES_ABOVE)
            trials = tuple(self._trials.values())
            parts += _search_view(self._search, trials, self._steps, num_listed)
        return Group(*parts)


def _search_view(
    search: SearchState, trials: Sequence[TrialRecord], steps: Mapping[int, int], num_listed: int
) -> Iterator[RenderableType]:
    """Render a search: counts, time left, the best trials and the running trials."""
    now = trials_now.search_progress(search, trials)
    for line, best in trials_now.search_lines(search, now):
        if best:
            yield Text(f"{line}  ", **FOLDED).append(_bars(plan_of(best)))
        else:
            yield Text(line, **FOLDED)
    if not now.running:
        return

    names = ("trial", "from", "cut", "bytes", "step", score_title(search))
    figures = [Column(name, no_wrap=True) for name in names]
    table = Table(*figures, Column("plan", overflow="fold"), box=None, header_style="dim")
    for trial in now.running[:num_listed]:
        step = steps.get(trial.index, 0)
        score = "-"
        if trial.rungs:
            last = trial.rungs[-1]
            step = max(last.step, step)
            value = f"{last.value(search.metric):.4f}"
            score = trials_now.score_with_step(value, last.step, step)
        table.add_row(
            str(trial.index),
            trial.origin,
            cut_title(trial.cut),
            f"{trial.plan_bytes / 1e6:.1f} MB",
            f"{step}/{search.steps}",
            score,
            _bars(plan_of(trial)),
        )
    if len(now.running) > num_listed:
        table.caption = f"and {len(now.running) - num_listed} more"
    yield table


def _rendered(cell: Cell) -> Text:
    return _bars(cell) if isinstance(cell, PrecisionPlan) else Text(str(cell))


def _bars(plan: PrecisionPlan) -> Text:
    """Render a plan: the letter of every group's format on the format's colour."""
    text = Text()
    for name, groups in plan.runs:
        shown = format_of(name)
        text.append(shown.letter * len(groups), f"{shown.ink} on {shown.colour}")
    return text
