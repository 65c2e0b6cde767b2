"""Plots of the search: score against bytes with the front, best so far, rungs, workers in use, plans by score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.plans.pareto import non_dominated
from qpruner.plans.plan import PrecisionPlan
from qpruner.report.plots.budget_axis import beyond_text, budget_axis, score_axis
from qpruner.report.plots.chart import (
    HALO,
    Chart,
    Spec,
    Values,
    beside_point,
    by_bits,
    by_word,
    quantity,
    tooltip,
)
from qpruner.report.search_progress import best_of, cost, front_point, score
from qpruner.report.worker_intervals import WorkerInterval, without_pauses
from qpruner.runs.records import SearchState, TrialRecord

SEARCHED, CONTROL, GIVEN, STOPPED, FAILED = "searched", "control", "given plan", "stopped early", "failed"
FINISHED = (SEARCHED, CONTROL, GIVEN)
COLORS = {
    SEARCHED: "var(--searched)",
    CONTROL: "var(--control)",
    GIVEN: "var(--text)",
    STOPPED: "var(--stopped)",
    FAILED: "var(--failed)",
}
SHAPES = {SEARCHED: "circle", CONTROL: "diamond", GIVEN: "square", STOPPED: "cross", FAILED: "triangle-down"}
MANY_SECONDS = 240
"""Beyond them an axis of time counts minutes."""
MOST_PLANS = 40
"""Plans that the bit map shows: the best ones."""
IN_ORDER = quantity("trial", "trial, in order of suggestion", format="d", tickMinStep=1)


@dataclass(frozen=True)
class Shown:
    """What plots of a search show: its trials, and the best one with a ring and a title.

    Where fresh rows chose the best trial (`is_chosen`), another one may have a better score.
    """

    search: SearchState
    trials: Sequence[TrialRecord]
    best: TrialRecord | None
    best_title: str
    is_chosen: bool
    score_title: str

    @property
    def scored(self) -> list[TrialRecord]:
        """Every trial that was scored and is over."""
        return [trial for trial in self.trials if trial.rungs and trial.status != "running"]

    @property
    def choice(self) -> str:
        """A remark that the winner need not have the best score, if so."""
        text = " The winner was chosen on fresh rows, so another trial may have a better score."
        return text if self.is_chosen else ""

    def point(self, trial: TrialRecord) -> Spec:
        """Return a trial at its last rung, as plots and tooltips show it."""
        return {
            "trial": trial.index,
            "origin": trial.origin,
            "kind": kind_of(trial),
            "plan": str(PrecisionPlan.from_dict(trial.plan)),
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
    budget, metric = shown.search.budget_bytes / 1e6, shown.search.metric
    points = [shown.point(trial) for trial in shown.scored]
    for point in points:
        point["distance"] = point["megabytes"] - budget
    scores, num_beyond = score_axis([point["score"] for point in points], shown.score_title, metric)
    place = {"x": budget_axis([point["megabytes"] for point in points], budget), "y": scores}
    finished = [trial for trial in shown.scored if trial.status == "finished"]
    best = [finished[at] for at in non_dominated([front_point(trial, metric) for trial in finished])]
    steps = [{"distance": each.plan_bytes / 1e6 - budget, "score": score(each.rungs[-1], metric)} for each in best]
    line = {"type": "line", "interpolate": "step-after", "color": "var(--muted)", "strokeWidth": 1.5}
    details = tooltip(
        trial="trial",
        origin="from",
        kind="kind",
        plan="plan",
        megabytes="MB|.2f",
        mean_bits="mean bits|.2f",
        score=f"{shown.score_title}|.4f",
        step="at step",
    )
    opacity = {"condition": {"param": "kinds", "value": 0.85}, "value": 0.1}
    layers = [
        _budget_line(place["x"]),
        {"data": {"values": steps}, "mark": line, "encoding": place},
        {
            "params": [{"name": "kinds", "select": {"type": "point", "fields": ["kind"]}, "bind": "legend"}],
            "mark": {"type": "point", "filled": True, "size": 75},
            "encoding": place | _by_kind(points) | {"opacity": opacity, "tooltip": details},
        },
        *_ring(shown, points, place),
    ]
    return Chart(
        "pareto",
        "search",
        "Score against size",
        "Every trial by its plan's bytes and its last score. The step line joins finished trials that none of fewer or "
        "equal bytes beats. A cross was stopped early, so its score is of fewer steps."
        f"{shown.choice}{beyond_text(num_beyond)}",
        {"height": 340, "data": {"values": points}, "layer": layers},
        "Point at a trial to see its plan; click in the legend to single out a kind.",
    )


def _budget_line(x: Spec) -> Spec:
    text = {"type": "text", "angle": 270, "baseline": "top", "dy": 7, "y": {"expr": "height / 2"}}
    return {
        "data": {"values": [{"distance": 0, "text": "budget"}]},
        "encoding": {"x": x},
        "layer": [
            {"mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3]}},
            {"mark": text, "encoding": {"text": {"field": "text"}}},
        ],
    }


def best_so_far(shown: Shown) -> Chart | None:
    """Draw the best score so far, trial by trial."""
    points = [shown.point(trial) for trial in shown.scored if kind_of(trial) in FINISHED]
    if not points:
        return None
    metric = shown.search.metric
    scores, num_beyond = score_axis([point["score"] for point in points], shown.score_title, metric)
    over = [trial for trial in shown.trials if trial.is_over]
    lines: Values = []
    for kind in (SEARCHED, CONTROL):
        best: TrialRecord | None = None
        for trial in over:  # also those that were stopped: the best stays what it was
            if kind_of(trial) == kind:
                best = best_of([trial] if best is None else [best, trial], metric)
            if best:
                lines.append({"trial": trial.index, "kind": kind, "score": score(best.rungs[-1], metric)})
    place = {"x": IN_ORDER, "y": scores}
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
        "search",
        "Best so far",
        "Lines: the best score of searched plans and of controls after each trial. Points: the finished trials."
        f"{shown.choice}{beyond_text(num_beyond)}",
        {"height": 260, "data": {"values": points}, "layer": layers},
    )


def rungs(shown: Shown) -> Chart | None:
    """Draw every trial from rung to rung."""
    values: Values = []
    for trial in shown.trials:
        about = {"trial": trial.index, "origin": trial.origin, "kind": kind_of(trial)}
        values += [about | {"step": each.step, "score": score(each, shown.search.metric)} for each in trial.rungs]
    steps = sorted({each["step"] for each in values})
    if len(steps) < 2:
        return None
    scores, num_beyond = score_axis([each["score"] for each in values], shown.score_title, shown.search.metric)
    kinds, faint = _by_kind(values), max(0.12, min(0.6, 12 / len(shown.trials)))
    place = {"x": quantity("step", "optimizer step", format="d", values=steps), "y": scores}
    place["x"] |= {"scale": {"type": "log", "base": 2}}
    of_trial = place | {"detail": {"field": "trial"}, "color": kinds["color"]}
    point = {"type": "point", "filled": True, "size": 30, "opacity": min(1.0, 2 * faint)}
    layers = [
        {"mark": {"type": "line", "opacity": faint}, "encoding": of_trial},
        {"mark": point, "encoding": of_trial | {"shape": kinds["shape"]} | _details(shown)},
    ]
    return Chart(
        "rungs",
        "search",
        "From rung to rung",
        f"Each trial's score at the rungs; a line that ends early was stopped there.{beyond_text(num_beyond)}",
        {"height": 260, "data": {"values": values}, "layer": layers},
    )


def timeline(intervals: Sequence[WorkerInterval], trials: Sequence[TrialRecord]) -> Chart:
    """Draw which slot had a trial when, without the pauses between sessions."""
    worked, by_index = without_pauses(intervals), {trial.index: trial for trial in trials}
    unit, seconds = ("minute", 60) if any(each.end > MANY_SECONDS for each in worked) else ("second", 1)
    bars, ends = Values(), list[float]()
    for _, start, end, index in worked:
        slot = next((number for number, free in enumerate(ends) if free <= start), len(ends))
        ends[slot : slot + 1] = [end]
        trial, span = by_index[index], {"start": start / seconds, "end": end / seconds}
        bars.append({"trial": index, "origin": trial.origin, "kind": kind_of(trial), "slot": slot + 1, **span})
    busy = sum(each.end - each.start for each in worked) / (len(ends) * max(ends))
    sessions = len({each.session for each in worked})
    cut = f" The search went on over {sessions} sessions; the time between them is cut out of axis and percentage."
    moments = {"start": f"from {unit}|.1f", "end": f"to {unit}|.1f"}
    return Chart(
        "timeline",
        "cost",
        "Slots in use during the search",
        "Each bar is a worker's time on a trial of this search; the fine-tunes after it are not shown. Slots ever in "
        f"use: {len(ends)}; they had a trial {busy:.0%} of the time.{cut if sessions > 1 else ''}",
        {
            "height": 22 * len(ends),
            "data": {"values": bars},
            "mark": {"type": "bar", "stroke": "var(--page)"},
            "encoding": {
                "x": quantity("start", f"{unit}s of searching since the first trial", zero=True, tickCount=8),
                "x2": {"field": "end"},
                "y": {"field": "slot", "type": "ordinal", "axis": {"title": "slot"}},
                "color": _by_kind(bars)["color"],
                "tooltip": tooltip(trial="trial", origin="from", kind="kind", **moments),
            },
        },
    )


def plans_by_score(shown: Shown) -> Chart:
    """Draw a map of bits, a row a trial and a column a group, the best score on top."""
    metric = shown.search.metric
    # Finished ones first: a score at an earlier rung does not compare.
    ranked = sorted(
        shown.scored, key=lambda each: (each.status != "finished", cost(each.rungs[-1], metric), each.index)
    )
    values: Values = []
    for trial in ranked[:MOST_PLANS]:
        star = "*" if trial.status == "stopped" else ""
        title = f", {shown.best_title}" if trial == shown.best and shown.is_chosen else ""
        name = f"{trial.index} {trial.origin}{title}  {score(trial.rungs[-1], metric):.4f}{star}"
        values += [{"trial": name, "group": group, "bits": bits} for group, bits in trial.plan.items()]
    groups = {"sort": list(ranked[0].plan), "axis": {"title": None, "labelAngle": -90, "labelOverlap": True}}
    rows = {"sort": None, "axis": {"title": None, "labelLimit": 260}}
    bits = by_bits(sorted({each["bits"] for each in values}), "bits") | {"legend": {"title": "bits"}}
    return Chart(
        "plans",
        "search",
        "Plans by score",
        "Best on top; * was stopped early.",
        {
            "title": f"plans by {shown.score_title}, best on top (* stopped early)",
            "height": {"step": 17},
            "data": {"values": values},
            "mark": {"type": "rect", "stroke": "var(--page)"},
            "encoding": {
                "x": {"field": "group", "type": "nominal", **groups},
                "y": {"field": "trial", "type": "nominal", **rows},
                "color": bits,
            },
        },
    )


def _ring(shown: Shown, points: Values, place: Spec) -> list[Spec]:
    """Mark the best trial and name it, where it is among the points."""
    if not any(point["best"] for point in points):
        return []
    is_best = [{"filter": "datum.best"}]
    ring = {"type": "point", "filled": False, "size": 330, "strokeWidth": 2.5, "color": "var(--text)"}
    label = {"type": "text", "fontWeight": "bold"} | beside_point(place["x"]["field"], 15, len(shown.best_title))
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
    return {"tooltip": tooltip(trial="trial", origin="from", kind="kind", score=f"{shown.score_title}|.4f")}
