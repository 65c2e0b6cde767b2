"""Where a plot of scores ends, so that one plan far from all others does not press these into a line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.report.search_progress import cost, score
from qpruner.runs.records import TrialRecord
from qpruner.wording import counted

REACH = 6.0
"""A plot reaches as many times as far from the best finished trial as their median lies."""
LEAST_HEIGHT = 0.5
"""A plot ends before what lies further only where all trials that are near would else have less of its height."""
MARGIN = 0.06
"""Of the plot's height, between the worst trial that is shown to scale and its edge."""
ARROWS = {"loss": "\u2191", "accuracy": "\u2193"}
"""To where a trial at the edge lies, by metric."""
MOST_NAMED = 5
"""Trials beyond the edge whose scores a caption tells, of each kind."""


@dataclass(frozen=True)
class Edge:
    """Where a plot ends.

    Attributes:
        metric: `loss` or `accuracy`.
        score: At which whatever lies beyond it is drawn; None where all fit.
        every_rung: Whether the plot has trials at every rung, not at their last ones alone.
    """

    metric: str
    score: float | None = None
    every_rung: bool = False

    def is_beyond(self, found: float) -> bool:
        """Whether a score lies beyond what the plot reaches."""
        if self.score is None:
            return False
        return found < self.score if self.metric == "accuracy" else found > self.score

    def place(self, found: float) -> float:
        """Where a score is drawn."""
        return self.score if self.score is not None and self.is_beyond(found) else found

    def far_score(self, trial: TrialRecord) -> float | None:
        """The last of a trial's scores that lies beyond the edge; None where none does."""
        shown = trial.rungs if self.every_rung else trial.rungs[-1:]
        far = [found for rung in shown if self.is_beyond(found := score(rung, self.metric))]
        return far[-1] if far else None

    def told(self, trials: Sequence[TrialRecord]) -> str:
        """Which trials lie beyond the edge, in sentences; empty where none does.

        A last score beside those of finished trials may be of fewer steps, and be no worse than theirs were there.
        """
        worse, early = list[str](), list[str]()
        for trial in trials:
            found = self.far_score(trial)
            if found is not None and (self.every_rung or trial.status == "finished"):
                worse.append(f"{trial.index} ({trial.origin}) {found:.4f}")
            elif found is not None:
                early.append(f"{trial.index} ({trial.origin}) {found:.4f} at step {trial.rungs[-1].step}")
        told = {
            "Far worse, drawn at the edge with an arrow": worse,
            "Of fewer steps, so not comparable, drawn at the edge with an arrow": early,
        }
        return " ".join(f"{what}: trial {_listed(named)}." for what, named in told.items() if named)


def _listed(named: Sequence[str]) -> str:
    more = [counted(len(named) - MOST_NAMED, "more trial")] if len(named) > MOST_NAMED else []
    return ", ".join([*named[:MOST_NAMED], *more])


def edge_of(trials: Sequence[TrialRecord], metric: str) -> Edge:
    """The edge of a plot of trials at their last rungs.

    Args:
        trials: Those of the plot; each was scored.
        metric: `loss` or `accuracy`.
    """
    finished = [cost(trial.rungs[-1], metric) for trial in trials if trial.status == "finished"]
    costs = [cost(trial.rungs[-1], metric) for trial in trials]
    return Edge(metric, _end(costs, _near(costs, finished), metric))


def edge_of_rungs(trials: Sequence[TrialRecord], metric: str) -> Edge:
    """The edge of a plot of trials at every rung, of which those of one step compare."""
    by_step: dict[int, list[float]] = {}
    for trial in trials:
        for rung in trial.rungs:
            by_step.setdefault(rung.step, []).append(cost(rung, metric))
    near = [each for costs in by_step.values() for each in _near(costs, costs)]
    every = [each for costs in by_step.values() for each in costs]
    return Edge(metric, _end(every, near, metric), every_rung=True)


def _near(costs: Sequence[float], compared: Sequence[float]) -> list[float]:
    """The costs that lie at most `REACH` times as far from the best of those compared as their median does."""
    if not compared:
        return list(costs)
    best, middle = min(compared), statistics.median(compared)
    return [each for each in costs if middle == best or each <= best + REACH * (middle - best)]


def _end(costs: Sequence[float], near: Sequence[float], metric: str) -> float | None:
    """The score a margin beyond what is near; None where there is room for all."""
    if not near:
        return None
    height = max(near) - min(near)
    if height >= LEAST_HEIGHT * (max(costs) - min(near)):
        return None
    end = max(near) + MARGIN * height
    return -end if metric == "accuracy" else end
