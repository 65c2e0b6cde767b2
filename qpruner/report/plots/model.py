"""Plots of the model: the winner's bits beside the sensitivities, accuracies by task, what pruning left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qpruner.report.by_task import accuracies
from qpruner.report.plots.chart import Chart, Spec, Values, colored, quantity, tooltip
from qpruner.report.sections import block_numbering, group_numbering
from qpruner.report.seed_plans import first_method, likeness
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import SensitivityRecord
from qpruner.wording import counted

CELL_WIDTH, CELL_HEIGHT = 62, 17
BEFORE_AFTER = {"before": "var(--stopped)", "after": "var(--searched)"}
SHOWN_TRIALS = "trials (measured)"
SHADE: Spec = {
    "color": {"condition": {"test": "datum.share < 0", "value": "var(--below-zero)"}, "value": "var(--control)"},
    "fillOpacity": {"field": "strength", "type": "quantitative", "scale": None},
}
"""Of a share of the largest prediction, from -1 over the page's own colour to 1; `strength` is its absolute value.
Where no prediction is below zero, the page's own colour is the least of them: plans follow where they differ."""
KEY_STEPS = 20


@dataclass(frozen=True)
class Prediction:
    """What the lowest bits are said to cost each group over the highest.

    Attributes:
        method: By which sensitivity.
        unit: Of the rises.
        rises: By group.
    """

    method: str
    unit: str
    rises: Sequence[float]


def tasks(run: Snapshot) -> Iterator[Chart]:
    """Accuracy of every row on every held-out task."""
    if run.results.evaluate is None:
        return
    for number, ((task, metric), found) in enumerate(accuracies(run.results).items(), start=1):
        values = [
            {
                "row": each.row,
                "when": "before" if each.is_before else "after",
                "value": each.value,
                "low": each.low,
                "high": each.high,
                "seeds": each.num_seeds,
            }
            for each in found
        ]
        rows = [each.row for each in found]
        place = {
            "y": {"field": "row", "type": "nominal", "sort": rows, "axis": {"title": None, "labelLimit": 230}},
            "color": colored("when", BEFORE_AFTER, "fine-tune"),
        }
        low_high = {"x": quantity("low", metric, tickCount=8), "x2": {"field": "high"}}
        details = tooltip(row="row", value=f"{metric}|.3f", low="low|.3f", high="high|.3f", seeds="training seeds")
        yield Chart(
            f"task-{number}",
            "quality",
            f"{task}: {metric}",
            f"lm-eval's {metric} on {counted(found[0].num_questions, 'held-out question')}, before and after the "
            "fine-tune that every row had. Bars are 95 % intervals over questions; several training seeds show as "
            "their mean.",
            {
                "height": 24 * len(rows),
                "data": {"values": values},
                "layer": [
                    {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": place | low_high},
                    {
                        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                        "encoding": place | {"x": quantity("value", metric, tickCount=8), "tooltip": details},
                    },
                ],
            },
        )


def winner(run: Snapshot) -> Iterator[Chart]:
    """The best plan's bits over the model's layers and, beside them, how much each group suffers."""
    plan, measured = run.best_plan, run.sensitivity
    if plan is None:
        return
    cells: Values = [{**_place(group), "group": group, "bits": bits} for group, bits in plan.items()]
    bits_map = _bits_map(cells, _grid(cells))
    data: Spec = {"data": {"values": cells}}
    numbering = group_numbering(run.results.prune)
    if measured is None:
        caption = f"One cell a group. {numbering}".rstrip()
        yield Chart("winner", "plan", "Bits by layer", caption, data | {"hconcat": [bits_map]})
        return
    predictions = _predictions(run, measured)
    by_group = zip(*(each.rises for each in predictions), strict=True)
    rises = dict(zip(measured.groups, by_group, strict=True))
    for cell in cells:
        cell["rises"] = rises[cell["group"]]
    lowest, *_, highest = sorted(next(iter(measured.methods.values())).values)
    caption = (
        f"Left: each group's bits in the plan. Right: what {lowest} bits instead of {highest} are predicted to cost "
        "that group, as a share of the largest such figure; below zero, fewer bits are predicted to help. Where no "
        "figure is below zero, the shades begin at the least."
    )
    yield Chart(
        "winner",
        "plan",
        "Bits and sensitivity by layer",
        " ".join(filter(None, [caption, numbering, likeness(run)])),
        data
        | {
            "params": [_method(run, predictions), _about(predictions)],
            "hconcat": [bits_map, _sensitivity_map(_grid(cells)), _key()],
            "spacing": 28,
        },
        "Point at a cell for its value.",
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
        f"Share of a block's parameters that pruning left. {block_numbering(run.results.prune)}".rstrip(),
        {
            "height": 150,
            "data": {"values": values},
            "mark": {"type": "bar", "color": "var(--searched)"},
            "encoding": {"x": block, "y": share, "tooltip": tooltip(block="block", kept="kept|.1%")},
        },
    )


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


def _method(run: Snapshot, predictions: Sequence[Prediction]) -> Spec:
    """The choice of a method."""
    bind = {"input": "select", "options": [each.method for each in predictions], "name": "Sensitivity by "}
    return {"name": "method", "value": first_method(run), "bind": bind}


def _about(predictions: Sequence[Prediction]) -> Spec:
    """Where a cell has each method's rise, and between what its shades lie, once for all cells."""
    return {
        "name": "methods",
        "value": {
            each.method: {
                "place": place,
                "unit": each.unit,
                "largest": max(map(abs, each.rises)),
                "least": max(0.0, min(each.rises)),
            }
            for place, each in enumerate(predictions)
        },
    }


def _sensitivity_map(grid: Spec) -> Spec:
    """One method's predictions over the model."""
    return {
        "title": {"text": {"expr": "['sensitivity by', method]"}},
        "width": {"step": CELL_WIDTH},
        "height": {"step": CELL_HEIGHT},
        "transform": [
            {"calculate": "method", "as": "method"},
            {"calculate": "methods[method].unit", "as": "unit"},
            {"calculate": "datum.rises[methods[method].place]", "as": "rise"},
            {"calculate": "methods[method].largest - methods[method].least", "as": "range"},
            {"calculate": "datum.range > 0 ? (datum.rise - methods[method].least) / datum.range : 0", "as": "share"},
            {"calculate": "abs(datum.share)", "as": "strength"},
        ],
        "mark": {"type": "rect", "stroke": "var(--line)"},
        "encoding": grid
        | SHADE
        | {
            "y": {"field": "block", "type": "ordinal", "axis": None},
            "tooltip": tooltip(group="group", method="method", rise="predicted rise|.3g", unit="unit"),
        },
    }


def _key() -> Spec:
    """What the shades of the sensitivity map stand for."""
    edges = [2 * step / KEY_STEPS - 1 for step in range(KEY_STEPS + 1)]
    values: Values = [
        {"from": low, "to": high, "share": (low + high) / 2, "strength": abs(low + high) / 2}
        for low, high in pairwise(edges)
    ]
    least = "methods[method].least / methods[method].largest"
    axis = {
        "title": "share of the largest",
        "orient": "right",
        "values": [-1, 0, 1],
        "domain": False,
        "ticks": False,
        "grid": False,
        "labelExpr": f"datum.value ? (datum.value < 0 && {least} > 0 ? '' : datum.label) : format({least} || 0, '.0%')",
        "format": ".0%",
    }
    return {
        "width": 14,
        "height": 120,
        "data": {"values": values},
        "transform": [{"filter": "datum.share > 0 || methods[method].least == 0"}],
        "mark": {"type": "rect", "aria": False},
        "encoding": SHADE
        | {
            "y": {"field": "from", "type": "quantitative", "scale": {"domain": [-1, 1]}, "axis": axis},
            "y2": {"field": "to"},
        },
    }


def _predictions(run: Snapshot, measured: SensitivityRecord) -> list[Prediction]:
    """Every method's, and what trials show, as the page has room for."""
    found: list[tuple[str, str, Sequence[float]]] = []
    for name, method in measured.methods.items():
        lowest, *_, highest = sorted(method.values)
        pairs = zip(method.values[lowest], method.values[highest], strict=True)
        found.append((name, method.unit, [low - high for low, high in pairs]))
    if not isinstance(run.effects, str):
        found.append((SHOWN_TRIALS, "nats", run.effects.values[min(run.effects.values)]))
    return [Prediction(name, unit, [float(f"{rise:.4g}") for rise in rises]) for name, unit, rises in found]
