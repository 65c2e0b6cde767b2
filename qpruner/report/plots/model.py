"""Plots of the model: the plan's bits beside the sensitivities, accuracies by task, what pruning left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qpruner.report.plots.chart import Chart, Spec, Values, by_bits, by_word, quantity, tooltip
from qpruner.report.results import MUTUAL_INFORMATION, TaskAccuracy
from qpruner.report.search_progress import cost
from qpruner.report.snapshot import Snapshot
from qpruner.report.statistics import rank_correlation
from qpruner.runs.records import LayerWidths, PruneRecord, SensitivityRecord
from qpruner.sensitivity.seeds import seed_origin
from qpruner.wording import counted

CELL_WIDTH, CELL_HEIGHT = 62, 17
BEFORE_AFTER = {"before": "var(--stopped)", "after": "var(--searched)"}
SHOWN_TRIALS = "trials (measured)"
SHADE: Spec = {
    "color": {"condition": {"test": "datum.share < 0", "value": "var(--below-zero)"}, "value": "var(--control)"},
    "fillOpacity": {"field": "strength", "type": "quantitative", "scale": None, "legend": None},
}
"""Of a share of the largest prediction, from -1 over the page's own colour to 1; `strength` is its absolute value."""
SHADES = (
    "what fewer bits are predicted to cost, as a share of the largest such figure: orange groups suffer, purple ones "
    "are predicted to gain; where none gains, the shades begin at the least"
)
NUM_COLUMNS = 32
"""Units of a block are drawn in at most this many columns, each the mean of its neighbours in the ranking."""
UNITS = {
    "attention": ("key/value groups", "kept_kv_groups", "base_kv_groups"),
    "mlp": ("MLP channels", "kept_mlp_channels", "base_mlp_channels"),
    "expert": ("experts", "kept_experts", "base_experts"),
}
"""Kind of unit -> its title, and the fields of what was kept and of what there was."""


def task_accuracy(number: int, task: str, metric: str, found: Sequence[TaskAccuracy]) -> Chart:
    """Draw the accuracy of every row on one held-out task."""
    values = [vars(each) | {"when": "before" if each.is_before else "after"} for each in found]
    rows = [each.row for each in found]
    place = {
        "y": {"field": "row", "type": "nominal", "sort": rows, "axis": {"title": None, "labelLimit": 230}},
        "color": by_word("when", BEFORE_AFTER, "fine-tune"),
    }
    low_high = {"x": quantity("low", metric, tickCount=8), "x2": {"field": "high"}}
    details = tooltip(row="row", value=f"{metric}|.3f", low="low|.3f", high="high|.3f", num_seeds="training seeds")
    point = {"type": "point", "filled": True, "size": 80, "opacity": 1}
    return Chart(
        f"task-{number}",
        "quality",
        f"{task}: {metric}",
        f"lm-eval's {metric} on {counted(found[0].num_questions, 'held-out question')}, before and after the fine-tune "
        "that every row had. Bars are 95 % intervals over questions; several training seeds show as their mean.",
        {
            "height": 24 * len(rows),
            "data": {"values": values},
            "layer": [
                {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": place | low_high},
                {"mark": point, "encoding": place | {"x": quantity("value", metric, tickCount=8), "tooltip": details}},
            ],
        },
    )


def plan_map(run: Snapshot) -> Chart:
    """Draw the best plan's bits over the model's layers and, beside them, how much each group suffers from fewer."""
    assert run.best_plan
    cells: Values = [{**_cell(group), "group": group, "bits": bits} for group, bits in run.best_plan.items()]
    record = run.results.prune
    numbering = " Blocks are numbered as in the pruned model." if record and record.dropped_blocks else ""
    maps = [_bits_map(cells)]
    if run.sensitivity is None:
        return Chart("winner", "plan", "Bits by layer", f"One cell a group.{numbering}", {"hconcat": maps})
    rises = _rises(run, run.sensitivity)
    maps.append(_sensitivity_map(cells, run.sensitivity.groups, rises))
    bind = {"input": "select", "options": list(rises), "name": "Sensitivity by "}
    return Chart(
        "winner",
        "plan",
        "Bits and sensitivity by layer",
        f"Left: each group's bits in the plan. Right: {SHADES}.{numbering}",
        {
            "params": [{"name": "method", "value": first_method(run), "bind": bind}],
            "hconcat": maps,
            "spacing": 28,
        },
        "Point at a cell for its value.",
    )


def first_method(run: Snapshot) -> str:
    """Choose the sensitivity to show first: the one whose seed plan was best on fresh rows.

    Where none was scored there, the one that agrees best with trials; where these show nothing, the first that
    predicts quantization errors.
    """
    assert run.sensitivity
    methods = run.sensitivity.methods
    by_origin = {seed_origin(name): name for name in methods}
    confirmed = run.results.search.confirmations if run.results.search else ()
    seeds = [each for each in confirmed if each.control and each.origin in by_origin]
    if seeds:
        return by_origin[min(seeds, key=lambda each: (cost(each, run.metric), each.index)).origin]
    return max(
        methods, key=lambda name: (rank_correlation(methods[name], run.effects) or 0.0, name != MUTUAL_INFORMATION)
    )


def _cell(group: str) -> Spec:
    """Place a group in the map; ``layers.07.mlp`` is block 7, part mlp."""
    _, block, *part = group.split(".")
    return {"block": int(block), "part": ".".join(part) or "block"}


def _grid(cells: Values, is_first: bool = True) -> Spec:
    parts = list(dict.fromkeys(cell["part"] for cell in cells))
    column = {"title": None, "orient": "top", "labelAngle": 0, "labelLimit": CELL_WIDTH - 4}
    row = {"title": "block", "titlePadding": 10} if is_first else None
    return {
        "x": {"field": "part", "type": "nominal", "sort": parts, "axis": column},
        "y": {"field": "block", "type": "ordinal", "axis": row},
    }


def _bits_map(cells: Values) -> Spec:
    levels = sorted({cell["bits"] for cell in cells})
    cell = {"color": by_bits(levels, "bits"), "tooltip": tooltip(group="group", bits="bits")}
    text = {"text": {"field": "bits", "type": "ordinal"}, "color": by_bits(levels, "on-bits")}
    return {
        "title": ["bits", ""],
        "width": {"step": CELL_WIDTH},
        "height": {"step": CELL_HEIGHT},
        "data": {"values": cells},
        "encoding": _grid(cells),
        "resolve": {"scale": {"color": "independent"}},
        "layer": [
            {"mark": {"type": "rect", "stroke": "var(--page)"}, "encoding": cell},
            {"mark": {"type": "text", "fontSize": 11}, "encoding": text},
        ],
    }


def _sensitivity_map(cells: Values, groups: Sequence[str], rises: Mapping[str, tuple[str, Sequence[float]]]) -> Spec:
    """Draw one method's predictions over the model; a parameter `method` chooses it."""
    places = {cell["group"]: {"block": cell["block"], "part": cell["part"]} for cell in cells}
    values: Values = []
    for name, (unit, found) in rises.items():
        for group, rise, share in zip(groups, found, shares(found), strict=True):
            figures = {"rise": float(f"{rise:.4g}"), "share": round(share, 3), "strength": round(abs(share), 3)}
            values.append(places[group] | {"group": group, "method": name, "unit": unit} | figures)
    details = tooltip(group="group", method="method", rise="predicted rise|.3g", unit="unit")
    return {
        "title": {"text": {"expr": "['sensitivity by', method]"}},
        "width": {"step": CELL_WIDTH},
        "height": {"step": CELL_HEIGHT},
        "data": {"values": values},
        "transform": [{"filter": "datum.method == method"}],
        "mark": {"type": "rect", "stroke": "var(--line)"},
        "encoding": _grid(cells, is_first=False) | SHADE | {"tooltip": details},
    }


def shares(rises: Sequence[float]) -> list[float]:
    """Scale predictions by the largest of either sign; where none is below zero, from the least on.

    Else a method that predicts nearly the same for all groups is one dark field, whatever plan it suggests.
    """
    least, largest = min(rises), max(map(abs, rises))
    if least < 0 or least == max(rises):
        return [rise / (largest or 1.0) for rise in rises]
    return [(rise - least) / (largest - least) for rise in rises]


def _rises(run: Snapshot, measured: SensitivityRecord) -> dict[str, tuple[str, Sequence[float]]]:
    """Return by method unit and predicted rises of the lowest bits over the highest, and what trials show."""
    found: dict[str, tuple[str, Sequence[float]]] = {}
    for name, method in measured.methods.items():
        lowest, *_, highest = sorted(method.values)
        pairs = zip(method.values[lowest], method.values[highest], strict=True)
        found[name] = method.unit, [low - high for low, high in pairs]
    if not isinstance(run.effects, str):
        found[SHOWN_TRIALS] = "nats", run.effects.values[min(run.effects.values)]
    return found


def sensitivities(record: SensitivityRecord) -> Chart:
    """Draw what fewer bits are predicted to cost each group, a row a method and bit-width."""
    values: Values = []
    for name, method in record.methods.items():
        *lower, highest = sorted(method.values)
        for bits in lower:
            found = [low - high for low, high in zip(method.values[bits], method.values[highest], strict=True)]
            row = f"{name.replace('_', ' ')}, {bits} bits"
            for group, share in zip(record.groups, shares(found), strict=True):
                values.append({"row": row, "group": group, "share": share, "strength": abs(share)})
    groups = {"sort": list(record.groups), "axis": {"title": None, "labelAngle": -90, "labelOverlap": True}}
    return Chart(
        "sensitivities",
        "plan",
        "Sensitivity of each group",
        f"{SHADES[0].upper()}{SHADES[1:]}.",
        {
            "title": SHADES.partition(":")[0],
            "height": {"step": 20},
            "data": {"values": values},
            "mark": {"type": "rect", "stroke": "var(--line)"},
            "encoding": SHADE
            | {
                "x": {"field": "group", "type": "nominal", **groups},
                "y": {"field": "row", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 260}},
            },
        },
    )


def kept_of_blocks(record: PruneRecord) -> Chart:
    """Draw what pruning left of each block."""
    values = [{"block": each.layer, "kept": each.kept_parameters / each.base_parameters} for each in record.layers]
    share = quantity("kept", "kept", zero=True, format=".0%") | {"scale": {"domain": [0, 1]}}
    block = {"field": "block", "type": "ordinal", "axis": {"title": "block", "labelAngle": 0, "labelOverlap": True}}
    numbering = " Blocks are numbered as in the base model." if record.dropped_blocks else ""
    return Chart(
        "kept",
        "pruning",
        "Kept of each block",
        f"Share of a block's parameters that pruning left.{numbering}",
        {
            "height": 150,
            "data": {"values": values},
            "mark": {"type": "bar", "color": "var(--searched)"},
            "encoding": {"x": block, "y": share, "tooltip": tooltip(block="block", kept="kept|.1%")},
        },
    )


def importance(record: PruneRecord, scores: Mapping[str, Any]) -> Chart:
    """Draw the importance of the units of each block in the order of their ranking, and the share that was kept.

    Where whole blocks were scored, a last panel has their importance; those that were removed are red.

    Args:
        record: Of the cut.
        scores: `<block>.<kind>` -> ``(units,)``; `block` -> ``(blocks, 2)``, number and importance.
    """
    scored = [kind for kind in UNITS if any(name.endswith(f".{kind}") for name in scores)]
    panels = [panel for kind in scored or ["attention", "mlp"] for panel in _panels(kind, record, scores)]
    if "block" in scores:
        bars = [
            {"block": int(index), "value": float(value), "gone": int(index) in record.dropped_blocks}
            for index, value in scores["block"]
        ]
        color = {"condition": {"test": "datum.gone", "value": "var(--failed)"}, "value": "var(--stopped)"}
        panels.append(_bars("whole blocks", bars, quantity("value", "importance", zero=True), color))
    caption = (
        "What pruning cuts by, block by block from the least to the most important unit; beside it the share of them "
        "that was kept."
    )
    return Chart("importance", "pruning", "Importance of every unit", caption, {"hconcat": panels, "spacing": 12})


def _panels(kind: str, record: PruneRecord, scores: Mapping[str, Any]) -> Iterator[Spec]:
    title, kept, base = UNITS[kind]
    values: Values = []
    for layer in record.layers:
        for column, value in enumerate(ranked(scores.get(f"{layer.layer}.{kind}"))):
            # Log10 of zero would make every other colour the same.
            shown = round(float(np.log10(value)), 3) if value > 0 else None
            values.append({"block": layer.layer, "column": column, "importance": shown})
    color = {
        "field": "importance",
        "type": "quantitative",
        "scale": {"scheme": "viridis"},
        "legend": {"title": "log10 importance"},
    }
    yield {
        "title": title,
        "width": 6 * NUM_COLUMNS,
        "height": {"step": CELL_HEIGHT},
        "data": {"values": values},
        "resolve": {"scale": {"color": "independent"}},
        "transform": [{"filter": "isValid(datum.importance)"}],
        "mark": "rect",
        "encoding": {
            "x": {"field": "column", "type": "ordinal", "axis": None},
            "y": _blocks(record.layers),
            "color": color,
        },
    }
    bars = [{"block": each.layer, "value": kept_share(each, kept, base)} for each in record.layers]
    share = quantity("value", "kept", zero=True, format=".0%", values=[0, 1]) | {"scale": {"domain": [0, 1]}}
    yield _bars("kept", bars, share, {"value": "var(--stopped)"}, record.layers)


def _blocks(layers: Sequence[LayerWidths]) -> Spec:
    domain = [layer.layer for layer in layers]
    return {"field": "block", "type": "ordinal", "scale": {"domain": domain}, "axis": {"title": "block"}}


def _bars(title: str, values: Values, x: Spec, color: Spec, layers: Sequence[LayerWidths] = ()) -> Spec:
    y = _blocks(layers) if layers else {"field": "block", "type": "ordinal", "axis": {"title": "block"}}
    return {
        "title": title,
        "width": 60,
        "height": {"step": CELL_HEIGHT},
        "data": {"values": values},
        "mark": "bar",
        "encoding": {"x": x, "y": y, "color": color},
    }


def ranked(scores: Any) -> Sequence[float]:
    """Sort a block's scores in ascending order and average them into columns; empty where the block was not scored."""
    if scores is None:
        return ()
    ordered = np.sort(scores)
    if len(ordered) < NUM_COLUMNS:
        return [float(each) for each in ordered[np.arange(NUM_COLUMNS) * len(ordered) // NUM_COLUMNS]]
    return [float(part.mean()) for part in np.array_split(ordered, NUM_COLUMNS)]


def kept_share(layer: LayerWidths, kept: str, base: str) -> float:
    """Return the share of a block's units that was kept; all where it had none."""
    there = getattr(layer, base)
    return len(getattr(layer, kept)) / there if there else 1.0
