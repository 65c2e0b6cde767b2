"""Plots of the search: score against bytes with the front, and the best so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.report.plots.chart import HALO, Chart, Spec, Values, by_word, quantity, tooltip
from qpruner.report.search_progress import bar, best_of, front_point, score, score_title
from qpruner.runs.records import SearchState, TrialRecord
from qpruner.search.choice import non_dominated

SEARCHED, CONTROL, GIVEN, STOPPED, FAILED = "searched", "control", "given plan", "stopped early", "failed"
COLORS = {
    SEARCHED: "var(--searched)",
    CONTROL: "var(--control)",
    GIVEN: "var(--text)",
    STOPPED: "var(--stopped)",
    FAILED: "var(--failed)",
}
SHAPES = {SEARCHED: "circle", CONTROL: "diamond", GIVEN: "square", STOPPED: "cross", FAILED: "triangle-down"}
REACH = 6.0
"""An axis of scores reaches as many times as far from the best as the median lies."""


@dataclass(frozen=True)
class Shown:
    """What plots of a search show: its trials, and the best one with a ring and a title."""

    search: SearchState
    trials: Sequence[TrialRecord]
    best: TrialRecord | None
    best_title: str

    @property
    def scored(self) -> list[TrialRecord]:
        """Every trial that was scored and is over."""
        return [trial for trial in self.trials if trial.rungs and trial.status != "running"]

    @property
    def score_title(self) -> str:
        """What the scores are called, with their unit."""
        return score_title(self.search) + (" (nats per token)" if self.search.metric == "loss" else "")

    def remarks(self, num_beyond: int) -> str:
        """Explain a winner that has not the best score, and scores that are drawn at the end of the axis."""
        text = " The winner was chosen on fresh rows, so another trial may have a better score."
        beyond = f" {num_beyond} far worse {'score is' if num_beyond == 1 else 'scores are'} drawn at the edge."
        return (text if self.best_title == "winner" else "") + (beyond if num_beyond else "")

    def point(self, trial: TrialRecord) -> Spec:
        """Return a trial at its last rung, as plots and tooltips show it."""
        return {
            "trial": trial.index,
            "origin": trial.origin,
            "kind": kind_of(trial),
            "plan": bar(trial),
            "megabytes": trial.plan_bytes / 1e6,
            "mean_bits": trial.mean_bits,
            "score": score(trial.rungs[-1], self.search.metric),
            "step": trial.rungs[-1].step,
            "best": trial == self.best,
        }


def kind_of(trial: TrialRecord) -> str:
    """Return what a trial is, in the legend's words."""
    if trial.status in ("stopped", "failed"):
        return {"stopped": STOPPED, "failed": FAILED}[trial.status]
    if trial.is_given:
        return GIVEN
    return CONTROL if trial.is_control else SEARCHED


def front(shown: Shown) -> Chart | None:
    """Draw score against bytes, with the front of the finished trials and the budget."""
    if not shown.scored:
        return None
    metric = shown.search.metric
    points = [shown.point(trial) for trial in shown.scored]
    scores, num_beyond = score_axis([point["score"] for point in points], shown.score_title, metric)
    place = {"x": quantity("megabytes", "size in MB", tickCount=6), "y": scores}
    finished = [trial for trial in shown.scored if trial.status == "finished"]
    best = [finished[at] for at in non_dominated([front_point(trial, metric) for trial in finished])]
    line = {"type": "line", "interpolate": "step-after", "color": "var(--muted)", "strokeWidth": 1.5}
    budget = {"type": "text", "angle": 270, "baseline": "top", "dy": 7, "y": {"expr": "height / 2"}}
    opacity = {"condition": {"param": "kinds", "value": 0.85}, "value": 0.1}
    layers = [
        {
            "data": {"values": [{"megabytes": shown.search.budget_bytes / 1e6, "text": "budget"}]},
            "encoding": {"x": place["x"]},
            "layer": [
                {"mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3]}},
                {"mark": budget, "encoding": {"text": {"field": "text"}}},
            ],
        },
        {"data": {"values": [shown.point(trial) for trial in best]}, "mark": line, "encoding": place},
        {
            "params": [{"name": "kinds", "select": {"type": "point", "fields": ["kind"]}, "bind": "legend"}],
            "mark": {"type": "point", "filled": True, "size": 75},
            "encoding": place | _by_kind(points) | _details(shown) | {"opacity": opacity},
        },
        *_ring(shown, points, place),
    ]
    return Chart(
        "pareto",
        "Score against size",
        "Every trial by its plan's bytes and its last score. The step line joins finished trials that none of fewer or "
        f"equal bytes beats. A cross was stopped early, so its score is of fewer steps.{shown.remarks(num_beyond)}",
        {"height": 340, "data": {"values": points}, "layer": layers},
        "Point at a trial to see its plan; click in the legend to single out a kind.",
    )


def best_so_far(shown: Shown) -> Chart | None:
    """Draw the best score so far, trial by trial."""
    points = [shown.point(trial) for trial in shown.scored if trial.status == "finished"]
    if not points:
        return None
    metric = shown.search.metric
    scores, num_beyond = score_axis([point["score"] for point in points], shown.score_title, metric)
    lines: Values = []
    for kind in (SEARCHED, CONTROL):
        best: TrialRecord | None = None
        for trial in (each for each in shown.trials if each.is_over):  # of one that was stopped the best stays
            if kind_of(trial) == kind:
                best = best_of([trial] if best is None else [best, trial], metric)
            if best:
                lines.append({"trial": trial.index, "kind": kind, "score": score(best.rungs[-1], metric)})
    place = {"x": quantity("trial", "trial, in order of suggestion", format="d", tickMinStep=1), "y": scores}
    line = {"type": "line", "interpolate": "step-after", "strokeWidth": 2.5}
    point = {"type": "point", "filled": True, "size": 45, "opacity": 0.75}
    kinds = _by_kind(points)
    layers = [
        {"data": {"values": lines}, "mark": line, "encoding": place | {"color": kinds["color"]}},
        {"mark": point, "encoding": place | kinds | _details(shown)},
        *_ring(shown, points, place),
    ]
    return Chart(
        "progress",
        "Best so far",
        "Lines: the best score of searched plans and of controls after each trial. Points: the finished trials."
        f"{shown.remarks(num_beyond)}",
        {"height": 260, "data": {"values": points}, "layer": layers},
    )


def score_axis(scores: Sequence[float], title: str, metric: str) -> tuple[Spec, int]:
    """Encode the field `score`, on an axis that ends before scores that would press the others together.

    Returns:
        The encoding, and how many scores lie beyond the axis; they are drawn at its end.
    """
    sign = -1 if metric == "accuracy" else 1
    costs = sorted(sign * score for score in scores)
    best, reach = costs[0], REACH * (statistics.median(costs) - costs[0])
    near = [cost for cost in costs if cost <= best + reach] if reach else costs
    axis = quantity("score", title)
    if near[-1] - best >= (costs[-1] - best) / 2:  # there is room for all
        return axis, 0
    end = near[-1] + 0.06 * (near[-1] - best)
    domain = sorted((sign * best, sign * end))
    return axis | {"scale": {"zero": False, "domain": domain, "clamp": True}}, len(costs) - len(near)


def _ring(shown: Shown, points: Values, place: Spec) -> list[Spec]:
    """Mark the best trial and name it, on the side where the plot has room, where it is among the points."""
    if not any(point["best"] for point in points):
        return []
    is_best = [{"filter": "datum.best"}]
    ring = {"type": "point", "filled": False, "size": 330, "strokeWidth": 2.5, "color": "var(--text)"}
    is_right = f"scale('x', datum.{place['x']['field']}) > width / 2"
    sides = {"align": {"expr": f"{is_right} ? 'right' : 'left'"}, "dx": {"expr": f"{is_right} ? -15 : 15"}}
    label = {"type": "text", "fontWeight": "bold"} | sides
    text = place | {"text": {"value": shown.best_title}}
    return [
        {"transform": is_best, "mark": ring, "encoding": place},
        {"transform": is_best, "layer": [{"mark": label | HALO}, {"mark": label}], "encoding": text},
    ]


def _by_kind(values: Values) -> Spec:
    there = {value["kind"] for value in values}
    color, shape = ({kind: each for kind, each in found.items() if kind in there} for found in (COLORS, SHAPES))
    return {"color": by_word("kind", color), "shape": by_word("kind", shape)}


def _details(shown: Shown) -> Spec:
    figures = {"megabytes": "MB|.2f", "mean_bits": "mean bits|.2f", "score": f"{shown.score_title}|.4f"}
    fields = tooltip(trial="trial", origin="from", kind="kind", plan="plan", **figures, step="at step")
    return {"tooltip": fields}
