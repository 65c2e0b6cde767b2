"""The search as a terminal shows it while it runs: trials under way, the best so far, the controls, the time left."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from qpruner import events
from qpruner.records import SearchState, TrialRecord
from qpruner.report.lines import duration
from qpruner.report.standing import FIGURES, Standing, bar, control_name, score, standing
from qpruner.wording import counted

COLORS = {"4": "cyan", "8": "yellow", "F": "magenta"}
FOLDED: Any = {"no_wrap": False, "overflow": "fold"}
"""Of text that goes on in the next line where a window is narrow: a live part cannot be widened to read the rest."""
MOST_ROWS = 20
"""Trials under way that are listed; a cluster may run more than a window has lines."""


class SearchView:
    """Follows a search's events; rich draws what `__rich__` returns.

    Args:
        planned: What the search is about, with the trials there are.
    """

    def __init__(self, planned: events.SearchPlanned) -> None:
        self._search: SearchState = planned.search
        self._trials = {trial.index: trial for trial in planned.trials}
        self._steps: Mapping[int, int] = {}

    def listen(self, event: events.Event) -> None:
        """Take one event in."""
        match event:
            case events.SlotsFound(slots):
                self._search = self._search.model_copy(update={"slots": slots})
            case events.TrialChanged(trial):
                self._trials[trial.index] = trial
            case events.StepsSeen(steps):
                self._steps = steps
            case events.TrialWithdrawn(index):
                del self._trials[index]

    def __rich__(self) -> RenderableType:
        now = standing(self._search, tuple(self._trials.values()))
        return Group(
            _counts(now, self._search), *_best(now, self._search), _table(now.running, self._search, self._steps)
        )


def colored(trial: TrialRecord) -> Text:
    """The plan, one character a group, a colour a bit-width."""
    text = Text(**FOLDED)
    for character, alike in itertools.groupby(bar(trial)):
        text.append("".join(alike), COLORS[character])
    return text


def _counts(now: Standing, search: SearchState) -> Text:
    over = ", ".join(f"{now.count(status)} {status}" for status in ("finished", "stopped", "failed"))
    busy = f"{len(now.running)} running"
    if search.slots is not None:
        # What has no slot waits for a machine that an autoscaler may start.
        num_waiting = max(0, len(now.running) - search.slots)
        busy = f"{len(now.running) - num_waiting} of {counted(search.slots, 'slot')} busy"
        busy += f", {num_waiting} waiting for one" if num_waiting else ""
    left = "" if now.seconds_left is None else f"; about {duration(now.seconds_left)} left"
    return Text(f"{len(now.trials)} of {counted(search.max_trials, 'trial')}: {over}; {busy}{left}", **FOLDED)


def _best(now: Standing, search: SearchState) -> list[Text]:
    lines = []
    for trial in (now.best, now.best_control):
        if trial:
            name = control_name(trial) if trial.is_control else "best so far"
            reached = f"{FIGURES[search.metric]} {score(trial.rungs[-1], search.metric):.4f}"
            size = f"{trial.plan_bytes / 1e6:.1f} MB"
            line = Text(f"{name:<12}  {reached}, trial {trial.index} ({trial.origin}), {size}  ", **FOLDED)
            lines.append(line.append_text(colored(trial)))
    return lines


def _table(running: list[TrialRecord], search: SearchState, steps: Mapping[int, int]) -> Table:
    figures = [Column(heading, no_wrap=True) for heading in ("trial", "from", "bytes", "step", FIGURES[search.metric])]
    table = Table(*figures, Column("plan", overflow="fold"), box=None, header_style="dim")
    for trial in running[:MOST_ROWS]:
        last = trial.rungs[-1] if trial.rungs else None
        table.add_row(
            str(trial.index),
            trial.origin,
            f"{trial.plan_bytes / 1e6:.1f} MB",
            f"{max(last.step if last else 0, steps.get(trial.index, 0))}/{search.steps}",
            f"{score(last, search.metric):.4f}" if last else "-",
            colored(trial),
        )
    if len(running) > MOST_ROWS:
        table.caption = f"and {len(running) - MOST_ROWS} more"
    return table
