"""Plots of the search: score against bytes with the Pareto front, and the best score so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.report import search_progress
from qpruner.report.finalists import formats_text
from qpruner.report.plots.chart import HALO, Chart, Spec, Values, by_word, quantity, tooltip
from qpruner.report.search_progress import cost, plan_text, score, score_title
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
"""Length of a score axis, in multiples of the distance from the best to the median score."""
LINE = {"type": "line", "interpolate": "step-after"}


@dataclass(frozen=True)
class Shown:
    """The data of a search's plots: its trials, and the best trial, which gets a ring and a label."""

    search: SearchState
    trials: Sequence[TrialRecord]
    best: TrialRecord | None
    best_title: str

    @property
    def scored(self) -> list[TrialRecord]:
        """The trials that are over and have a score."""
        return [trial for trial in self.trials if trial.rungs and trial.is_over]

    @property
    def score_title(self) -> str:
        """The title of the score axis, with the unit if there is one."""
        return score_title(self.search) + (" (nats per token)" if self.search.metric == "loss" else "")

    @property
    def remarks(self) -> str:
        """Sentences that explain outliers at the axis's end, and trials with better scores than the winner."""
        edge = " Scores far worse than the rest are drawn at the edge."
        fresh = " The winner was chosen on fresh rows, so another trial may have a better score."
        return edge + (fresh if self.best_title == "winner" else "")

    def point(self, trial: TrialRecord) -> Spec:
        """Return the fields that plots and tooltips show of a trial, with the score of its last rung."""
        return {
            "trial": trial.index,
            "origin": trial.origin,
            "kind": kind_of(trial),
            "plan": plan_text(trial),
            "formats": formats_text(trial.plan),
            "megabytes": trial.plan_bytes / 1e6,
            "mean_bits": trial.mean_bits,
            "score": score(trial.rungs[-1], self.search.metric),
            "step": trial.rungs[-1].step,
            "best": trial == self.best,
        }


def kind_of(trial: TrialRecord) -> str:
    """Return a trial's legend: `stopped early`, `failed`, `given plan`, `control` (needs no search) or `searched`."""
    if trial.status in ("stopped", "failed"):
        return STOPPED if trial.status == "stopped" else FAILED
    if trial.is_given:
        return GIVEN
    return CONTROL if trial.is_control else SEARCHED


def front(shown: Shown) -> Chart | None:
    """Draw score against bytes, the Pareto front of the finished trials and the budget; None without scored trials."""
    points = [shown.point(trial) for trial in shown.scored]
    if not points:
        return None
    place = {"x": quantity("megabytes", "size in MB", tickCount=6), "y": _score_axis(shown, points)}
    finished = [trial for trial in shown.scored if trial.status == "finished"]
    costs = [(trial.plan_bytes, cost(trial.rungs[-1], shown.search.metric)) for trial in finished]
    best = [shown.point(finished[at]) for at in non_dominated(costs)]
    rule = {"mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3]}}
    label = {"type": "text", "angle": 270, "baseline": "top", "dy": 7, "y": {"expr": "height / 2"}}
    named = {"mark": label, "encoding": {"text": {"field": "text"}}}
    budget = {"values": [{"megabytes": shown.search.budget_bytes / 1e6, "text": "budget"}]}
    layers = [
        {"data": budget, "encoding": {"x": place["x"]}, "layer": [rule, named]},
        {"data": {"values": best}, "mark": LINE | {"color": "var(--muted)", "strokeWidth": 1.5}, "encoding": place},
        *_points(shown, points, place),
    ]
    layers[2]["params"] = [{"name": "kinds", "select": {"type": "point", "fields": ["kind"]}, "bind": "legend"}]
    layers[2]["encoding"]["opacity"] = {"condition": {"param": "kinds", "value": 0.85}, "value": 0.1}
    return Chart(
        "pareto",
        "Score against size",
        "Every trial by its plan's bytes and its last score; controls may exceed the budget. The step line joins the "
        "finished trials that no trial of fewer or equal bytes beats. A cross is a trial that was stopped early: its "
        "score is after fewer steps."
        f"{shown.remarks}",
        {"height": 340, "data": {"values": points}, "layer": layers},
        "Point at a trial to see its plan; click in the legend to single out a kind.",
    )


def best_so_far(shown: Shown) -> Chart | None:
    """Draw the best score so far, trial by trial; None without finished trials."""
    points = [shown.point(trial) for trial in shown.scored if trial.status == "finished"]
    if not points:
        return None
    lines = [*_best_line(shown, SEARCHED), *_best_line(shown, CONTROL)]
    x = quantity("trial", "trial, in order of suggestion", format="d", tickMinStep=1)
    place = {"x": x, "y": _score_axis(shown, points)}
    marks = _points(shown, points, place)
    color = {"color": marks[0]["encoding"]["color"]}
    layers = [{"data": {"values": lines}, "mark": LINE | {"strokeWidth": 2.5}, "encoding": place | color}, *marks]
    return Chart(
        "progress",
        "Best so far",
        "Lines: the best score of searched plans and of controls after each trial. Points: the finished trials."
        f"{shown.remarks}",
        {"height": 260, "data": {"values": points}, "layer": layers},
    )


def _best_line(shown: Shown, kind: str) -> Values:
    over = [trial for trial in shown.trials if trial.is_over]  # a stopped trial leaves the best score as it is
    curve = search_progress.best_so_far(
        over, shown.search.metric, lambda trial: kind_of(trial) == kind and search_progress.fits(trial, shown.search)
    )
    found = zip(over, curve, strict=True)
    return [{"trial": trial.index, "kind": kind, "score": value} for trial, value in found if value is not None]


def _score_axis(shown: Shown, points: Values) -> Spec:
    """Encode the score on an axis that ends before the outliers, which are drawn at the axis's end."""
    sign = -1 if shown.search.metric == "accuracy" else 1
    costs = sorted(sign * point["score"] for point in points)
    best, reach = costs[0], REACH * (statistics.median(costs) - costs[0])
    near = [cost for cost in costs if cost <= best + reach] if reach else costs
    axis = quantity("score", shown.score_title)
    if near[-1] - best >= (costs[-1] - best) / 2:  # all scores fit
        return axis
    end = near[-1] + 0.06 * (near[-1] - best)
    return axis | {"scale": {"zero": False, "domain": sorted((sign * best, sign * end)), "clamp": True}}


def _points(shown: Shown, points: Values, place: Spec) -> list[Spec]:
    """Draw every trial in the colour and shape of its kind, and around the best trial a ring with a label."""
    there = {point["kind"] for point in points}
    color, shape = ({kind: each for kind, each in found.items() if kind in there} for found in (COLORS, SHAPES))
    figures = {"megabytes": "MB|.2f", "mean_bits": "mean bits|.2f", "score": f"{shown.score_title}|.4f"}
    details = tooltip(
        trial="trial", origin="from", kind="kind", plan="plan", formats="formats", **figures, step="at step"
    )
    kinds = {"color": by_word("kind", color), "shape": by_word("kind", shape), "tooltip": details}
    marks: list[Spec] = [{"mark": {"type": "point", "filled": True, "size": 60}, "encoding": place | kinds}]
    if any(point["best"] for point in points):
        is_best = [{"filter": "datum.best"}]
        ring = {"type": "point", "filled": False, "size": 330, "strokeWidth": 2.5, "color": "var(--text)"}
        is_right = f"scale('x', datum.{place['x']['field']}) > width / 2"
        sides = {"align": {"expr": f"{is_right} ? 'right' : 'left'"}, "dx": {"expr": f"{is_right} ? -15 : 15"}}
        label = {"type": "text", "fontWeight": "bold"} | sides
        text = place | {"text": {"value": shown.best_title}}
        marks.append({"transform": is_best, "mark": ring, "encoding": place})
        marks.append({"transform": is_best, "layer": [{"mark": label | HALO}, {"mark": label}], "encoding": text})
    return marks
