"""Plots of the model: the winner's bits beside the sensitivities, accuracies by task, what pruning left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from qpruner.records import SensitivityRecord, TaskScore
from qpruner.report.charts.chart import Chart, Spec, Values, colored, quantity, tooltip
from qpruner.report.marginal_effects import rank_correlation
from qpruner.report.snapshot import Snapshot
from qpruner.report.table import Z_95

CELL_WIDTH, CELL_HEIGHT = 62, 17
BEFORE_AFTER = {"before": "var(--stopped)", "after": "var(--searched)"}
SHOWN_TRIALS = "trials (measured)"


def tasks(run: Snapshot) -> Iterator[Chart]:
    """Accuracy of every row on every held-out task."""
    if run.results.evaluate is None:
        return
    by_task: dict[tuple[str, str], dict[str, list[TaskScore]]] = {}
    for row in run.results.evaluate.rows:
        for score in row.scores:
            by_task.setdefault((score.task, score.metric), {}).setdefault(row.label, []).append(score)
    before = {row.label for row in run.results.evaluate.rows if row.seed is None}
    for number, ((task, metric), rows) in enumerate(by_task.items(), start=1):
        values = [_accuracy(label, scores, label in before) for label, scores in rows.items()]
        place = {
            "y": {"field": "row", "type": "nominal", "sort": list(rows), "axis": {"title": None, "labelLimit": 230}},
            "color": colored("when", BEFORE_AFTER, "fine-tune"),
        }
        low_high = {"x": quantity("low", "accuracy", tickCount=8), "x2": {"field": "high"}}
        details = tooltip(row="row", value="accuracy|.3f", low="low|.3f", high="high|.3f", seeds="training seeds")
        yield Chart(
            f"task-{number}",
            "quality",
            f"{task}: {metric}",
            f"Accuracy on {values[0]['questions']} held-out questions, before and after the fine-tune that every row "
            "had. Bars are 95 % intervals over questions; several training seeds show as their mean.",
            {
                "height": 24 * len(rows),
                "data": {"values": values},
                "layer": [
                    {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": place | low_high},
                    {
                        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                        "encoding": place | {"x": quantity("value", "accuracy", tickCount=8), "tooltip": details},
                    },
                ],
            },
        )


def winner(run: Snapshot) -> Iterator[Chart]:
    """The best plan's bits over the model's layers and, beside them, how much each group suffers."""
    plan, measured = run.best_plan, run.results.sensitivity
    if plan is None:
        return
    cells: Values = [{**_place(group), "group": group, "bits": bits} for group, bits in plan.items()]
    bits_map = _bits_map(cells, _grid(cells))
    if measured is None:
        yield Chart("winner", "plan", "Bits by layer", "One cell a group.", {"hconcat": [bits_map]})
        return
    rises = _rises(run, measured)
    lowest, *_, highest = sorted(next(iter(measured.methods.values())).values)
    yield Chart(
        "winner",
        "plan",
        "Bits and sensitivity by layer",
        f"Left: each group's bits in the plan. Right: what {lowest} bits instead of {highest} are predicted to cost "
        "that group, as a share of the largest such cost. Point at a cell for its value.",
        {
            "params": [_method(run, measured, rises)],
            "hconcat": [bits_map, _sensitivity_map(rises, _grid(cells))],
            "spacing": 28,
        },
    )


def kept(run: Snapshot) -> Iterator[Chart]:
    """What pruning left of each block."""
    if run.results.prune is None:
        return
    layers = run.results.prune.layers
    values = [{"block": layer.layer, "kept": layer.kept_parameters / layer.base_parameters} for layer in layers]
    share = quantity("kept", "kept", zero=True, format=".0%") | {"scale": {"domain": [0, 1]}}
    block = {"field": "block", "type": "ordinal", "axis": {"title": "block", "labelAngle": 0, "labelOverlap": True}}
    yield Chart(
        "kept",
        "pruning",
        "Kept of each block",
        "Share of a block's parameters that pruning left.",
        {
            "height": 150,
            "data": {"values": values},
            "mark": {"type": "bar", "color": "var(--searched)"},
            "encoding": {"x": block, "y": share, "tooltip": tooltip(block="block", kept="kept|.1%")},
        },
    )


def _accuracy(label: str, scores: list[TaskScore], is_before: bool) -> Spec:
    """A row on one task: mean over training seeds, 95 % interval over questions."""
    value = statistics.fmean(score.value for score in scores)
    half_width = Z_95 * statistics.fmean(score.stderr for score in scores)
    has_width = half_width == half_width  # NaN with one question
    return {
        "row": label,
        "when": "before" if is_before else "after",
        "value": value,
        "low": max(0.0, value - half_width) if has_width else value,
        "high": min(1.0, value + half_width) if has_width else value,
        "seeds": len(scores),
        "questions": scores[0].num_questions,
    }


def _place(group: str) -> Spec:
    """A group's row and column in the map; ``layers.07.mlp`` is block 7, part mlp."""
    _, block, *part = group.split(".")
    return {"block": int(block), "part": ".".join(part) or "block"}


def _grid(cells: Values) -> Spec:
    parts = list(dict.fromkeys(cell["part"] for cell in cells))
    column = {"title": None, "orient": "top", "labelAngle": 0, "labelLimit": CELL_WIDTH - 4}
    return {
        "x": {"field": "part", "type": "nominal", "sort": parts, "axis": column},
        "y": {"field": "block", "type": "ordinal", "axis": {"title": "block", "titlePadding": 10}},
    }


def _bits_map(cells: Values, grid: Spec) -> Spec:
    levels = sorted({cell["bits"] for cell in cells})

    def by_bits(name: str) -> Spec:
        scale = {"domain": levels, "range": [f"var(--{name}-{bits})" for bits in levels]}
        return {"field": "bits", "type": "ordinal", "scale": scale, "legend": None}

    return {
        "title": ["bits", ""],
        "width": {"step": CELL_WIDTH},
        "height": {"step": CELL_HEIGHT},
        "data": {"values": cells},
        "encoding": grid,
        "resolve": {"scale": {"color": "independent"}},
        "layer": [
            {
                "mark": {"type": "rect", "stroke": "var(--page)"},
                "encoding": {"color": by_bits("bits"), "tooltip": tooltip(group="group", bits="bits")},
            },
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {"text": {"field": "bits", "type": "ordinal"}, "color": by_bits("on-bits")},
            },
        ],
    }


def _method(run: Snapshot, measured: SensitivityRecord, rises: Values) -> Spec:
    """The choice of a method; first the one that agrees best with trials, and of equal ones whose seed did best."""
    fresh = {
        each.origin.removeprefix("seed-").replace("-", "_"): each.loss
        for each in (run.results.search.confirmations if run.results.search else ())
    }
    agreement = {name: rank_correlation(method, run.effects) or 0.0 for name, method in measured.methods.items()}
    options = list(dict.fromkeys(rise["method"] for rise in rises))
    bind = {"input": "select", "options": options, "name": "Sensitivity by "}
    return {
        "name": "method",
        "value": min(agreement, key=lambda name: (-agreement[name], fresh.get(name, math.inf))),
        "bind": bind,
    }


def _sensitivity_map(rises: Values, grid: Spec) -> Spec:
    """One method's predictions over the model."""
    shade = {
        "field": "share",
        "type": "quantitative",
        "scale": {"domain": [0, 1], "range": [0, 1], "clamp": True},
        "legend": None,
    }
    return {
        "title": {"text": {"expr": "['sensitivity by', method]"}},
        "width": {"step": CELL_WIDTH},
        "height": {"step": CELL_HEIGHT},
        "data": {"values": rises},
        "transform": [{"filter": "datum.method == method"}],
        "mark": {"type": "rect", "color": "var(--control)", "stroke": "var(--line)"},
        "encoding": grid
        | {
            "y": {"field": "block", "type": "ordinal", "axis": None},
            "fillOpacity": shade,
            "tooltip": tooltip(group="group", method="method", rise="predicted rise|.3g", unit="unit"),
        },
    }


def _rises(run: Snapshot, measured: SensitivityRecord) -> Values:
    """Every group's predicted rise at the lowest bits over the highest, by method; and what trials show."""
    rises: dict[str, tuple[str, list[float]]] = {}
    for name, method in measured.methods.items():
        lowest, *_, highest = sorted(method.values)
        pairs = zip(method.values[lowest], method.values[highest], strict=True)
        rises[name] = (method.unit, [low - high for low, high in pairs])
    if not isinstance(run.effects, str):
        rises[SHOWN_TRIALS] = ("nats", list(run.effects.values[min(run.effects.values)]))
    return [
        {
            **_place(group),
            "group": group,
            "method": name,
            "unit": unit,
            "rise": rise,
            "share": rise / max(values) if max(values) > 0 else 0.0,
        }
        for name, (unit, values) in rises.items()
        for group, rise in zip(measured.groups, values, strict=True)
    ]
