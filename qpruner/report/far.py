"""Where a plot of scores ends, so that one plan far worse than all others does not press these into a line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qpruner.records import TrialRecord
from qpruner.report.standing import cost, score
from qpruner.wording import counted

REACH = 6.0
"""A plot reaches as many times as far from the best finished trial as their median lies."""
MARGIN = 0.06
"""Of the plot's height, between the worst trial that is shown to scale and its edge."""
ARROWS = {"loss": "\u2191", "accuracy": "\u2193"}
"""To where a trial at the edge lies, by metric."""
MOST_NAMED = 5
"""Trials beyond the edge whose scores a caption tells."""


def edge_of(trials: Sequence[TrialRecord], metric: str) -> float | None:
    """The score at which what is far worse is drawn; None where all trials fit.

    Args:
        trials: Those of a plot; each was scored.
        metric: `loss` or `accuracy`.
    """
    finished = [cost(trial.rungs[-1], metric) for trial in trials if trial.status == "finished"]
    if not finished:
        return None
    best, middle = min(finished), statistics.median(finished)
    costs = [cost(trial.rungs[-1], metric) for trial in trials]
    near = [each for each in costs if each <= best + REACH * (middle - best)]
    if middle == best or len(near) == len(costs):
        return None
    edge = max(near) + MARGIN * (max(near) - min(near))
    return -edge if metric == "accuracy" else edge


def is_far(trial: TrialRecord, metric: str, edge: float | None) -> bool:
    """Whether a scored trial lies beyond the edge."""
    if edge is None:
        return False
    found = score(trial.rungs[-1], metric)
    return found < edge if metric == "accuracy" else found > edge


def told_far(trials: Sequence[TrialRecord], metric: str, edge: float | None) -> str:
    """Which trials lie beyond the edge, in a sentence; empty where none does."""
    far = [trial for trial in trials if is_far(trial, metric, edge)]
    if not far:
        return ""
    named = [f"{trial.index} ({trial.origin}) {score(trial.rungs[-1], metric):.4f}" for trial in far[:MOST_NAMED]]
    more = [counted(len(far) - MOST_NAMED, "more trial")] if len(far) > MOST_NAMED else []
    return f"Far off, drawn at the edge with an arrow: trial {', '.join([*named, *more])}."
