"""Plots a search: score against bytes, the trials coloured by their cut."""

import itertools
import statistics
from collections.abc import Sequence

from qpruner.plans.plan import cut_title, formats_text, plan_of
from qpruner.report.plots.chart import HALO, Chart, Spec, Values, by_word, quantity, tooltip
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import TrialRecord
from qpruner.search.choice import non_dominated
from qpruner.search.progress import score_title
from qpruner.search.roles import control_title

SEARCHED = "searched"
CONTROL = "control"
GIVEN = "given plan"
STOPPED = "stopped early"
FAILED = "failed"
SHAPES = {
    SEARCHED: "circle",
    CONTROL: "diamond",
    GIVEN: "square",
    STOPPED: "cross",
    FAILED: "triangle-down",
}
CUT_COLORS = ("#4477aa", "#ee6677", "#228833", "#b8860b", "#aa3377", "#0f9d9d")
"""Colours of the cuts, the least pruned first, which light and dark pages show well."""
HEIGHT, NAME_WIDTH = 300, 0.3  # pixels; a share of the width, of which a name takes less
REACH = (
    6.0  # length of the score axis, in multiples of the distance from the best to the median score
)


def score_by_bytes(run: Snapshot) -> Chart | None:
    """Draw score against bytes, the Pareto front of the finished trials and the budget.

    Returns None if no trial is scored.
    """
    scored = [trial for trial in run.trials if trial.rungs and trial.is_over]
    if not scored or not run.state.search:
        return None
    unit = " (nats per token)" if run.metric == "loss" else ""
    title = f"{score_title(run.state.search)}{unit}"
    winner = run.best_trial
    points = [_point(run, trial, trial is winner) for trial in scored]
    place = {
        "x": quantity("megabytes", "size in MB", tickCount=6),
        "y": _score_axis(run.metric, title, points),
    }
    _space_names(points, place["y"]["scale"].get("domain") or [point["score"] for point in points])
    finished = [trial for trial in scored if trial.status == "finished"]
    costs = [(trial.plan_bytes, trial.rungs[-1].cost(run.metric)) for trial in finished]
    best = [_point(run, finished[at], finished[at] is winner) for at in non_dominated(costs)]
    rule = {"mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3]}}
    label = {"type": "text", "angle": 270, "baseline": "top", "dy": 7, "y": {"expr": "height / 2"}}
    named = {"mark": label, "encoding": {"text": {"field": "text"}}}
    budget = {"values": [{"megabytes": run.state.search.budget_bytes / 1e6, "text": "budget"}]}
    step = {
        "type": "line",
        "interpolate": "step-after",
        "color": "var(--muted)",
        "strokeWidth": 1.5,
    }
    is_control = f"datum.kind === '{CONTROL}'"
    point = {
        "type": "point",
        "filled": True,
        "size": {"expr": f"{is_control} ? 130 : 60"},
        "stroke": {"expr": f"{is_control} ? 'var(--text)' : null"},
        "strokeWidth": 1,
    }
    by_legend = {"name": "cuts", "select": {"type": "point", "fields": ["cut"]}, "bind": "legend"}
    ring = {
        "type": "point",
        "filled": False,
        "size": 330,
        "strokeWidth": 2.5,
        "color": "var(--text)",
    }
    layers = [
        {"data": budget, "encoding": {"x": place["x"]}, "layer": [rule, named]},
        {"data": {"values": best}, "mark": step, "encoding": place},
        {"params": [by_legend], "mark": point, "encoding": place | _looks(run, title, points)},
        _names(place),
        {"transform": [{"filter": "datum.best"}], "mark": ring, "encoding": place},
    ]
    edge = (
        " Scores far worse than the rest are at the edge." if "clamp" in place["y"]["scale"] else ""
    )
    fresh = " The winner was chosen on fresh rows, so another trial may have a better score."
    return Chart(
        "pareto",
        "What the search tried",
        (
            "Each trial by its plan's bytes and last score. Diamonds are what one would do "
            "instead, crosses were stopped early; the line is the best at its "
            f"bytes.{edge}{fresh if run.results.search else ''}"
        ),
        {"height": HEIGHT, "data": {"values": points}, "layer": layers},
    )


def _point(run: Snapshot, trial: TrialRecord, is_best: bool) -> Spec:
    """Return the fields that the plot and its tooltips show of a trial.

    The score is that of its last rung.
    """
    name = control_title(trial.origin).rpartition(", ")[2] if kind_of(trial) == CONTROL else ""
    return {
        "trial": trial.index,
        "origin": trial.origin,
        "kind": kind_of(trial),
        "cut": cut_title(trial.cut),
        "plan": str(plan_of(trial)),
        "formats": formats_text(trial.plan),
        "megabytes": trial.plan_bytes / 1e6,
        "mean_bits": trial.mean_bits,
        "score": trial.rungs[-1].value(run.metric),
        "step": trial.rungs[-1].step,
        "best": is_best,
        "name": ", ".join(filter(None, [run.best_title if is_best else "", name])),
    }


def kind_of(trial: TrialRecord) -> str:
    """Return a trial's kind, as the legend names it.

    It is `stopped early`, `failed`, `given plan`, `control` (needs no search) or `searched`.
    """
    if trial.status in ("stopped", "failed"):
        return STOPPED if trial.status == "stopped" else FAILED
    if trial.is_given:
        return GIVEN
    return CONTROL if trial.is_control else SEARCHED


def _score_axis(metric: str, title: str, points: Values) -> Spec:
    """Encode the score on an axis that has each cut's best and ends before the outliers.

    Outliers are drawn at the axis's end.
    """
    sign = -1 if metric == "accuracy" else 1
    costs = sorted(sign * point["score"] for point in points)
    best_of_cuts = [
        min(sign * point["score"] for point in points if point["cut"] == cut)
        for cut in {point["cut"] for point in points}
    ]
    best = costs[0]
    reach = max(REACH * (statistics.median(costs) - best), max(best_of_cuts) - best)
    axis = quantity("score", title)
    if not 0 < reach < costs[-1] - best:  # all scores fit
        return axis
    return axis | {
        "scale": {
            "zero": False,
            "domain": sorted((sign * best, sign * (best + reach))),
            "clamp": True,
        }
    }


def _space_names(points: Values, ends: Sequence[float]) -> None:
    """Choose how many pixels below its point each name stands, so that names do not overlap.

    The winner's name is placed first.
    """
    sizes = [point["megabytes"] for point in points]
    taken: list[tuple[float, float]] = []
    named = [point for point in points if point["name"]]
    for point in sorted(named, key=lambda point: not point["best"]):
        along = (point["megabytes"] - min(sizes)) / (max(sizes) - min(sizes) or 1)
        down = HEIGHT * (max(ends) - point["score"]) / (max(ends) - min(ends) or 1)
        near = [other for where, other in taken if abs(along - where) < NAME_WIDTH]
        free = (
            shift
            for shift in (0, 13, -13, 26, -26)
            if all(abs(down + shift - other) >= 13 for other in near)
        )
        point["below"] = next(free, 0)
        taken.append((along, down + point["below"]))


def _looks(run: Snapshot, title: str, points: Values) -> Spec:
    """Encode cuts by colour and kinds by shape."""
    found = run.results.prune.cuts if run.results.prune else {}
    used = dict.fromkeys(trial.cut for trial in run.trials)
    titles = [cut_title(name) for name in dict.fromkeys((*found, *used)) if name in used]
    cuts = dict(zip(titles, itertools.cycle(CUT_COLORS), strict=False))
    kinds = {
        kind: shape
        for kind, shape in SHAPES.items()
        if any(point["kind"] == kind for point in points)
    }
    figures = {
        "megabytes": "MB|.2f",
        "mean_bits": "mean bits|.2f",
        "score": f"{title}|.4f",
        "step": "at step",
    }
    details = tooltip(
        trial="trial",
        origin="from",
        kind="kind",
        cut="cut",
        plan="plan",
        formats="formats",
        **figures,
    )
    opacity = {"condition": {"param": "cuts", "value": 0.85}, "value": 0.1}
    return {
        "color": by_word("cut", cuts),
        "shape": by_word("kind", kinds),
        "tooltip": details,
        "opacity": opacity,
    }


def _names(place: Spec) -> Spec:
    """Name the best trial and the controls, beside them and away from the edge."""
    side, away = "scale('x', datum.megabytes) > width / 2 ?", "(datum.best ? 15 : 9)"
    beside = {
        "align": {"expr": f"{side} 'right' : 'left'"},
        "dx": {"expr": f"{side} -{away} : {away}"},
    }
    font = {"fontWeight": {"expr": "datum.best ? 'bold' : 'normal'"}, "dy": {"expr": "datum.below"}}
    label, text = {"type": "text", **beside, **font}, place | {"text": {"field": "name"}}
    both = [{"mark": label | HALO}, {"mark": label}]
    return {"transform": [{"filter": "datum.name"}], "layer": both, "encoding": text}
