"""The live view of a search: trials under way, the best so far, the controls, the time left."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from qpruner.report.search_progress import (
    SearchProgress,
    bar,
    control_name,
    score,
    score_title,
    score_with_step,
    search_progress,
)
from qpruner.runs import events
from qpruner.runs.records import SearchState, TrialRecord
from qpruner.wording import counted, duration

COLORS = {"4": "cyan", "8": "yellow", "F": "magenta"}
WIDTHS = {"4": 4, "8": 8, "F": 16}
FOLDED: Any = {"no_wrap": False, "overflow": "fold"}
"""Of text that goes on in the next line where a window is narrow: a live part cannot be widened to read the rest."""


class SearchView:
    """Follows a search's events; rich draws it in the height that it gives, or in that of the window.

    Args:
        planned: What the search is about, with the trials there are.
    """

    def __init__(self, planned: events.SearchPlanned) -> None:
        self._search: SearchState = planned.search
        self._trials = {trial.index: trial for trial in planned.trials}
        self._steps: Mapping[int, int] = {}

    def listen(self, event: events.Event) -> None:
        """Update the view by one event."""
        match event:
            case events.SlotsFound(slots):
                self._search = self._search.model_copy(update={"slots": slots})
            case events.TrialChanged(trial):
                self._trials[trial.index] = trial
            case events.StepsSeen(steps):
                self._steps = steps
            case events.TrialWithdrawn(index):
                del self._trials[index]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = search_progress(self._search, tuple(self._trials.values()))
        above = Group(_counts(now, self._search), *_best(now, self._search))
        yield above
        height = options.size.height if options.height is None else options.height
        num_lines = height - len(console.render_lines(above, options.reset_height()))
        num_listed = _num_listed(len(now.running), num_lines)
        if num_listed:
            yield _table(now.running, num_listed, self._search, self._steps)


class PlanBar:
    """A plan as one line at any width: a character a group, a colour a bit-width.

    Where it has less room a character stands for several groups, and the number of groups follows.

    Args:
        trial: Whose plan it is.
    """

    def __init__(self, trial: TrialRecord) -> None:
        self._groups = bar(trial)

    def __len__(self) -> int:
        return len(self._groups)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, len(self)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.within(options.max_width)

    def within(self, width: int) -> Text:
        """Render the bar in at most so many columns."""
        if len(self) <= width:
            return _colored(self._groups)
        number = f" (of {len(self)})"
        shown = _shortened(self._groups, max(1, width - len(number)))
        return _colored(shown).append(number, "dim")


def _shortened(groups: str, num_cells: int) -> str:
    """Cells whose bits are the mean of their groups', rounded to a width that the plan has.

    What rounding takes from a cell the next one gets, so that the mean stays: the most frequent width would hide the
    others of a plan that gives more bits to the same projection of every block.
    """
    levels = sorted(set(groups), key=WIDTHS.__getitem__)
    edges = [cell * len(groups) // num_cells for cell in range(num_cells + 1)]
    cells, left_over = "", 0.0
    for begin, end in itertools.pairwise(edges):
        wanted = left_over + sum(WIDTHS[group] for group in groups[begin:end]) / (end - begin)
        cells += min(levels, key=lambda level: abs(WIDTHS[level] - wanted))
        left_over = wanted - WIDTHS[cells[-1]]
    return cells


def _colored(groups: str) -> Text:
    text = Text(no_wrap=True, overflow="crop")
    for character, alike in itertools.groupby(groups):
        text.append("".join(alike), COLORS[character])
    return text


def _num_listed(num_running: int, num_lines: int) -> int:
    """Count the running trials that a table of so many lines lists, beside its heading and a last line."""
    return num_running if num_running < num_lines else max(0, num_lines - 2)


def _counts(now: SearchProgress, search: SearchState) -> Text:
    over = ", ".join(f"{now.count(status)} {status}" for status in ("finished", "stopped", "failed"))
    busy = f"{len(now.running)} running"
    if search.slots is not None:
        # What has no slot waits for a machine that an autoscaler may start.
        num_waiting = max(0, len(now.running) - search.slots)
        busy = f"{len(now.running) - num_waiting} of {counted(search.slots, 'slot')} busy"
        busy += f", {num_waiting} waiting for one" if num_waiting else ""
    left = "" if now.seconds_left is None else f"; about {duration(now.seconds_left)} left"
    return Text(f"{len(now.trials)} of {counted(search.max_trials, 'trial')}: {over}; {busy}{left}", **FOLDED)


def _best(now: SearchProgress, search: SearchState) -> list[_Reached]:
    return [_Reached(trial, search) for trial in (now.best, now.best_control) if trial]


class _Reached:
    """What a finished trial reached, and its plan."""

    def __init__(self, trial: TrialRecord, search: SearchState) -> None:
        name = control_name(trial) if trial.is_control else "best so far"
        reached = f"{score_title(search)} {score(trial.rungs[-1], search.metric):.4f}"
        size = f"{trial.plan_bytes / 1e6:.1f} MB"
        self._text = f"{name:<12}  {reached}, trial {trial.index} ({trial.origin}), {size}"
        self._plan = PlanBar(trial)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - len(self._text) - 2
        is_beside = room >= len(self._plan)
        yield Text(f"{self._text}  " if is_beside else self._text, end="" if is_beside else "\n", **FOLDED)
        yield self._plan.within(room if is_beside else options.max_width)


def _table(running: list[TrialRecord], num_listed: int, search: SearchState, steps: Mapping[int, int]) -> Table:
    headings = ("trial", "from", "bytes", "step", score_title(search))
    figures = [Column(heading, no_wrap=True) for heading in headings]
    table = Table(*figures, "plan", box=None, header_style="dim")
    for trial in running[:num_listed]:
        last = trial.rungs[-1] if trial.rungs else None
        step = max(last.step if last else 0, steps.get(trial.index, 0))
        table.add_row(
            str(trial.index),
            trial.origin,
            f"{trial.plan_bytes / 1e6:.1f} MB",
            f"{step}/{search.steps}",
            score_with_step(f"{score(last, search.metric):.4f}", last.step, step) if last else "-",
            PlanBar(trial),
        )
    if len(running) > num_listed:
        table.caption = f"and {len(running) - num_listed} more"
    return table
