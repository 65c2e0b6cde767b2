"""Plots of the search: score against bytes, best so far, rungs, slots in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qpruner.plans.pareto import non_dominated
from qpruner.plans.plan import PrecisionPlan
from qpruner.report.far import ARROWS, Edge, edge_of, edge_of_rungs
from qpruner.report.plots.budget_axis import BudgetAxis, budget_axis
from qpruner.report.plots.chart import Chart, Spec, Values, aside, colored, quantity, shaped, tooltip
from qpruner.report.search_progress import hypervolume_so_far, score
from qpruner.report.snapshot import Snapshot
from qpruner.report.worker_intervals import WorkerInterval, without_pauses
from qpruner.runs.records import TrialRecord

SECTION = "search"
SEARCHED, CONTROL, GIVEN, STOPPED, FAILED = "searched", "control", "given plan", "stopped early", "failed"
FINISHED = (SEARCHED, CONTROL, GIVEN)
COLORS = {
    SEARCHED: "var(--searched)",
    CONTROL: "var(--control)",
    GIVEN: "var(--text)",
    STOPPED: "var(--stopped)",
    FAILED: "var(--failed)",
}
MANY_SECONDS = 240
"""Beyond them an axis of time counts minutes."""
BUDGET_PADDING = 24
"""Pixels beside the budget's line, for its name."""
ROOM_OF_A_SCORE, CHARACTERS_OF_A_SCORE = 0.2, 7
"""Of a plot's width, and in characters."""
HALO: Spec = {"stroke": "var(--page)", "strokeWidth": 4, "strokeJoin": "round", "aria": False}
"""Of a text that points may lie under."""
SHAPES = {SEARCHED: "circle", CONTROL: "diamond", GIVEN: "square", STOPPED: "cross", FAILED: "triangle-down"}


def kind_of(trial: TrialRecord) -> str:
    """What a trial is, in the legend's words."""
    if trial.status in ("stopped", "failed"):
        return {"stopped": STOPPED, "failed": FAILED}[trial.status]
    if trial.is_given:
        return GIVEN
    return CONTROL if trial.is_control else SEARCHED


def pareto(run: Snapshot) -> Iterator[Chart]:
    """Score against bytes."""
    scored = _scored(run)
    if not scored:
        return
    assert run.state.search
    budget, edge = run.state.search.budget_bytes / 1e6, edge_of(scored, run.metric)
    points = [point | {"distance": point["megabytes"] - budget} for point in _points(run)]
    sizes = [point["megabytes"] for point in points]
    axis = budget_axis(sizes, budget)
    points = _placed(points, list(map(axis.along, sizes)), edge)
    place = {"x": _sizes(axis, sizes), "y": quantity("shown", run.metric_title)}
    kinds = _by_kind(points)
    details = tooltip(
        trial="trial",
        origin="from",
        kind="kind",
        plan="plan",
        megabytes="MB|.2f",
        mean_bits="mean bits|.2f",
        score=f"{run.metric_title}|.4f",
        step="at step",
    )
    layers: list[Spec] = [
        {
            "data": {"values": [{"distance": 0, "text": "budget"}]},
            "encoding": {"x": place["x"]},
            "layer": [
                {"mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3]}},
                {
                    # Along the line, on the side of no plan: at its end an arrow may stand.
                    "mark": {"type": "text", "angle": 270, "baseline": "top", "dy": 7, "y": {"expr": "height / 2"}},
                    "encoding": {"text": {"field": "text"}},
                },
            ],
        },
        {
            "data": {"values": list(_front(points, run.metric == "accuracy"))},
            "mark": {"type": "line", "interpolate": "step-after", "color": "var(--muted)", "strokeWidth": 1.5},
            "encoding": place,
        },
        {
            "params": [{"name": "kinds", "select": {"type": "point", "fields": ["kind"]}, "bind": "legend"}],
            "mark": {"type": "point", "filled": True, "size": 75},
            "encoding": place
            | kinds
            | {"opacity": {"condition": {"param": "kinds", "value": 0.85}, "value": 0.1}, "tooltip": details},
        },
        *_ring(run, points, place),
    ]
    yield Chart(
        "pareto",
        SECTION,
        "Score against size",
        "Every trial by its plan's bytes and its last score. The axis is stretched near the budget, which most plans "
        "use up. The step line joins finished trials that none of fewer or equal bytes beats. A cross was stopped "
        "early, so its score is of fewer steps. "
        f"{_told_choice(run)}{edge.told(scored)}".rstrip(),
        {"height": 340, "data": {"values": points}, "layer": layers + _arrows(points, place, edge)},
        "Point at a trial to see its plan; click in the legend to single out a kind.",
    )


def _sizes(axis: BudgetAxis, sizes: Sequence[float]) -> Spec:
    """The axis of sizes; Vega has such a scale around zero, so points have their distance from the budget."""
    ticks, decimals = axis.ticks(sizes)
    scale = {"type": "symlog", "constant": axis.unit, "nice": False, "padding": BUDGET_PADDING}
    told = quantity(
        "distance",
        f"size in MB, stretched near the budget of {axis.budget:,.1f} MB",
        values=[tick - axis.budget for tick in ticks],
        labelExpr=f"format(datum.value + {axis.budget}, ',.{decimals}f')",
        labelOverlap=True,
    )
    return told | {"scale": scale}


def progress(run: Snapshot) -> Iterator[Chart]:
    """The best score so far, trial by trial."""
    compared = {trial.index for trial in run.shown_together}
    trials = [trial for trial in _scored(run) if kind_of(trial) in FINISHED and trial.index in compared]
    if not trials:
        return
    edge, shown = edge_of(trials, run.metric), {trial.index for trial in trials}
    told = ("trial", "origin", "kind", "score", "best")
    points = [{name: point[name] for name in told} for point in _points(run) if point["trial"] in shown]
    points = _placed(points, [point["trial"] for point in points], edge)
    last = max(trial.index for trial in run.shown_together if trial.is_over)
    # The last trials may all have been stopped: the best stays what it was.
    after_each = points if points[-1]["trial"] == last else [*points, {"trial": last, "kind": None}]
    better, best = (max if run.metric == "accuracy" else min), Values()
    for kind in (SEARCHED, CONTROL):
        reached = None
        for point in after_each:
            if point["kind"] == kind:
                reached = point["score"] if reached is None else better(reached, point["score"])
            if reached is not None:
                best.append({"trial": point["trial"], "kind": kind, "score": reached, "shown": edge.place(reached)})
    place = {
        "x": quantity("trial", "trial, in order of suggestion", format="d", tickMinStep=1),
        "y": quantity("shown", run.metric_title),
    }
    line = {"type": "line", "interpolate": "step-after", "strokeWidth": 2.5}
    point = {"type": "point", "filled": True, "size": 45, "opacity": 0.75}
    yield Chart(
        "progress",
        SECTION,
        "Best so far",
        "Lines: the best score of searched plans and of controls after each trial. Points: the finished trials. "
        f"{_told_choice(run)}{edge.told(trials)}".rstrip(),
        {
            "height": 260,
            "data": {"values": points},
            "layer": [
                {"data": {"values": best}, "mark": line, "encoding": place | {"color": _by_kind(points)["color"]}},
                {"mark": point, "encoding": place | _by_kind(points) | _details(run)},
                *_ring(run, points, place),
                *_arrows(points, place, edge),
            ],
        },
    )


def hypervolume(run: Snapshot) -> Iterator[Chart]:
    """What the front is worth, trial by trial, of a search for one."""
    search = run.state.search
    if search is None or not search.pareto:
        return
    trials = [trial for trial in run.shown_together if trial.is_over]
    values: Values = [
        {"trial": trial.index, "of": name, "hypervolume": volume}
        for name, alone in (("all trials", False), (CONTROL, True))
        for trial, volume in zip(
            trials, hypervolume_so_far(trials, run.metric, search.budget_bytes, alone), strict=True
        )
    ]
    if not values:
        return
    yield Chart(
        "hypervolume",
        SECTION,
        "Hypervolume so far",
        "What the front is worth after each trial, and that of the controls alone: how much better than the smallest "
        f"plan the best one inside a budget is in {run.metric_title}, in the mean over all budgets up to the search's "
        "own. Finished trials count, at their last rung.",
        {
            "height": 200,
            "data": {"values": values},
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2.5, "point": True},
            "encoding": {
                "x": quantity("trial", "trial, in order of suggestion", format="d", tickMinStep=1),
                "y": quantity("hypervolume", "hypervolume", zero=True),
                "color": colored("of", {"all trials": COLORS[SEARCHED], CONTROL: COLORS[CONTROL]}),
                "tooltip": tooltip(trial="trial", of="of", hypervolume="hypervolume|.4f"),
            },
        },
    )


def rungs(run: Snapshot) -> Iterator[Chart]:
    """Every trial from rung to rung."""
    scores: Values = [
        {
            "trial": trial.index,
            "origin": trial.origin,
            "kind": kind_of(trial),
            "step": rung.step,
            "score": score(rung, run.metric),
        }
        for trial in run.trials
        for rung in trial.rungs
    ]
    steps = sorted({each["step"] for each in scores})
    if len(steps) < 2:
        return
    edge = edge_of_rungs(run.trials, run.metric)
    scores = _placed(scores, [steps.index(each["step"]) for each in scores], edge)
    kinds, faint = _by_kind(scores), max(0.12, min(0.6, 12 / len(run.trials)))
    place = {
        "x": quantity("step", "optimizer step", format="d", values=steps) | {"scale": {"type": "log", "base": 2}},
        "y": quantity("shown", run.metric_title),
    }
    each = place | {"detail": {"field": "trial"}, "color": kinds["color"]}
    yield Chart(
        "rungs",
        SECTION,
        "From rung to rung",
        f"Each trial's score at the rungs; a line that ends early was stopped there. {edge.told(run.trials)}".rstrip(),
        {
            "height": 260,
            "data": {"values": scores},
            "layer": [
                {"mark": {"type": "line", "opacity": faint}, "encoding": each},
                {
                    "mark": {"type": "point", "filled": True, "size": 30, "opacity": min(1.0, 2 * faint)},
                    "encoding": each | {"shape": kinds["shape"]} | _details(run),
                },
                *_arrows(scores, place, edge),
            ],
        },
    )


def timeline(run: Snapshot) -> Iterator[Chart]:
    """Which slot had a trial of this search when, and which."""
    bars, ends = Values(), list[float]()
    trials = {trial.index: trial for trial in run.trials}
    worked = without_pauses(run.worker_intervals)
    unit, seconds = ("minute", 60) if any(stretch.end > MANY_SECONDS for stretch in worked) else ("second", 1)
    for _, start, end, index in worked:
        slot = next((number for number, free in enumerate(ends) if free <= start), len(ends))
        ends[slot : slot + 1] = [end]
        about = {"trial": index, "origin": trials[index].origin, "kind": kind_of(trials[index]), "slot": slot + 1}
        bars.append(about | {"start": start / seconds, "end": end / seconds})
    if not bars:
        return
    slots = len(ends)
    busy = sum(interval.end - interval.start for interval in worked) / (slots * max(ends))
    yield Chart(
        "timeline",
        "cost",
        "Slots in use during the search",
        "Each bar is a worker's time on a trial of this search; the fine-tunes after it are not shown. Slots ever in "
        f"use: {slots}; they had a trial {busy:.0%} of the time. {_told_sessions(worked)}".rstrip(),
        {
            "height": 22 * slots,
            "data": {"values": bars},
            "mark": {"type": "bar", "stroke": "var(--page)"},
            "encoding": {
                "x": quantity("start", f"{unit}s of searching since the first trial", zero=True, tickCount=8),
                "x2": {"field": "end"},
                "y": {"field": "slot", "type": "ordinal", "axis": {"title": "slot"}},
                "color": _by_kind(bars)["color"],
                "tooltip": tooltip(
                    trial="trial", origin="from", kind="kind", start=f"from {unit}|.1f", end=f"to {unit}|.1f"
                ),
            },
        },
    )


def _told_sessions(worked: Sequence[WorkerInterval]) -> str:
    """That the axis leaves out what lies between sessions; nothing where there was one."""
    sessions = len({stretch.session for stretch in worked})
    if sessions < 2:
        return ""
    return f"The search went on over {sessions} sessions; the time between them is cut out of axis and percentage."


def _scored(run: Snapshot) -> list[TrialRecord]:
    """Every trial that was scored and is over."""
    return [trial for trial in run.trials if trial.rungs and trial.status != "running"]


def _points(run: Snapshot) -> Values:
    """The same, at their last rungs."""
    return [
        {
            "trial": trial.index,
            "origin": trial.origin,
            "kind": kind_of(trial),
            "plan": str(PrecisionPlan.from_dict(trial.plan)),
            "megabytes": trial.plan_bytes / 1e6,
            "mean_bits": trial.mean_bits,
            "score": score(trial.rungs[-1], run.metric),
            "step": trial.rungs[-1].step,
            "best": trial == run.best_trial,
        }
        for trial in _scored(run)
    ]


def _title_of_best(run: Snapshot) -> str:
    if run.is_given:
        return GIVEN
    return "winner" if run.results.search else "best so far"


def _told_choice(run: Snapshot) -> str:
    """That another trial than the winner may have the best score; nothing where no search chose one."""
    if run.results.search is None or run.is_given:
        return ""
    return "The winner was chosen on fresh rows, so another trial may have a better score. "


def _ring(run: Snapshot, points: Values, place: Spec) -> list[Spec]:
    """What marks the best trial and names it; nothing where it is not among the points."""
    if not any(point["best"] for point in points):
        return []
    title, is_best = _title_of_best(run), [{"filter": "datum.best"}]
    ring = {"type": "point", "filled": False, "size": 330, "strokeWidth": 2.5, "color": "var(--text)"}
    label = {"type": "text", "fontWeight": "bold"} | aside(place["x"]["field"], 15, len(title))
    return [
        {"transform": is_best, "mark": ring, "encoding": place},
        {
            "transform": is_best,
            "layer": [{"mark": label | HALO}, {"mark": label}],
            "encoding": place | {"text": {"value": title}},
        },
    ]


def _placed(points: Values, along: Sequence[float], edge: Edge) -> Values:
    """Points and how high they are drawn; `far` is what stands beside the arrow of one beyond the edge.

    That is its score, but not of trials that were stopped, maybe many, nor where another's would cover it.

    Args:
        points: With `score` and `kind`.
        along: Where each is from left to right.
        edge: Of the plot.
    """
    placed = list(zip(points, along, strict=True))
    told = [at for point, at in placed if edge.is_beyond(point["score"]) and point["kind"] != STOPPED]
    room = ROOM_OF_A_SCORE * (max(along) - min(along))

    def beside_arrow(point: Spec, at: float) -> str:
        near = sum(abs(at - other) <= room for other in told)
        return f"{point['score']:.4f}" if point["kind"] != STOPPED and near == 1 else ""

    return [
        point
        | {"shown": edge.place(point["score"])}
        | ({"far": beside_arrow(point, at)} if edge.is_beyond(point["score"]) else {})
        for point, at in placed
    ]


def _arrows(points: Values, place: Spec, edge: Edge) -> list[Spec]:
    """What stands at the points beyond the edge; nothing, of which Vega would warn, where there are none."""
    mark = {"type": "text", "dy": 14 if edge.metric == "accuracy" else -14, "fontWeight": "bold"}
    layers: list[Spec] = []
    if any("far" in point for point in points):
        arrow = {"value": ARROWS[edge.metric]}
        layers.append(
            {"transform": [{"filter": "isValid(datum.far)"}], "mark": mark, "encoding": place | {"text": arrow}}
        )
    if any(point.get("far") for point in points):
        beside = mark | aside(place["x"]["field"], 8, CHARACTERS_OF_A_SCORE)
        told = {"field": "far", "type": "nominal"}
        layers.append({"transform": [{"filter": "datum.far"}], "mark": beside, "encoding": place | {"text": told}})
    return layers


def _front(points: Values, by_accuracy: bool) -> Iterator[Spec]:
    """The finished trials that none of fewer or equal bytes beats, by bytes."""
    sign = -1 if by_accuracy else 1
    finished = [point for point in points if point["kind"] in FINISHED]
    for position in non_dominated([(point["megabytes"], sign * point["score"]) for point in finished]):
        yield {"distance": finished[position]["distance"], "shown": finished[position]["shown"]}


def _by_kind(values: Iterable[Spec]) -> Spec:
    """Colour and shape by kind, of the kinds there are."""
    there = {value["kind"] for value in values}
    return {
        "color": colored("kind", {kind: color for kind, color in COLORS.items() if kind in there}),
        "shape": shaped("kind", {kind: shape for kind, shape in SHAPES.items() if kind in there}),
    }


def _details(run: Snapshot) -> Spec:
    return {"tooltip": tooltip(trial="trial", origin="from", kind="kind", score=f"{run.metric_title}|.4f")}
