"""Plots the plans, and what each cut kept of every block.

A plan has a bar per group, coloured by format.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qpruner.config.schema import MUTUAL_INFORMATION
from qpruner.plans.plan import UNPRUNED, PrecisionPlan, cut_title
from qpruner.quantization.formats import by_size, format_of
from qpruner.report.plots.chart import Chart, Spec, Values, by_word, quantity, tooltip
from qpruner.runs.records import CutRecord, MethodScores, SensitivityRecord

WIDTH, ROW_HEIGHT, COST_HEIGHT = 760, 22, 70
NO_TITLE = {"title": None, "labelLimit": 320}


def plan_bars(plans: Mapping[str, PrecisionPlan], measured: SensitivityRecord | None) -> Chart:
    """Draw plans below each other by their names.

    Above them is what a sensitivity predicts of every group. Groups have their names in the base
    model, so that the same block of two cuts is in one column.
    """
    bars = [
        {
            "plan": name if title in name else f"{name}, {title}",
            "group": group,
            "format": format_name,
        }
        for name, plan in plans.items()
        for title in (cut_title(plan.cut),)
        for group, format_name in plan.as_dict().items()
    ]
    # in which no block is lacking
    longest = sorted(plans.values(), key=lambda plan: -len(plan.groups))
    groups = list(dict.fromkeys(group for plan in longest for group in plan.groups))
    used = by_size(tuple({bar["format"] for bar in bars}))
    colours = by_word("format", {name: format_of(name).colour for name in used})
    color = {"color": colours, "tooltip": tooltip(group="group", format="format")}
    rows = {"field": "plan", "type": "ordinal", "sort": None, "axis": NO_TITLE}
    mark = {"type": "rect", "stroke": "var(--page)", "strokeWidth": 0.5}
    drawn = _panel(bars, {"step": ROW_HEIGHT}, mark, {"x": _along(groups), "y": rows} | color)
    caption = (
        "A row per plan: a bar per group in model order, in the colour of its format, and the cut "
        "beside it. Blocks are numbered as in the base model."
    )
    methods = measured.methods if measured else {}
    if measured is None or not methods:
        return Chart("plans", "Formats by group", caption, {"vconcat": [drawn]})
    # Mutual information comes last, because it predicts no quantization error.
    first = min(methods, key=lambda name: name == MUTUAL_INFORMATION)
    return Chart(
        "plans",
        "Sensitivity and formats by group",
        (
            "Above: the predicted cost of a group's smallest format instead of its largest, by "
            f"{first}. {caption}"
        ),
        {"vconcat": [_costs(groups, measured.groups, methods[first]), drawn], "spacing": 8},
    )


def _panel(values: Values, height: Any, mark: Spec, encoding: Spec) -> Spec:
    return {
        "width": WIDTH,
        "height": height,
        "data": {"values": values},
        "mark": mark,
        "encoding": encoding,
    }


def _along(names: list[str], **axis: Any) -> Spec:
    """Encode groups or blocks along the width, in this order."""
    shown = {"title": None, "labelOverlap": True, "labelAngle": 270, **axis}
    return {"field": "group", "type": "ordinal", "scale": {"domain": names}, "axis": shown}


def _costs(groups: list[str], measured: Sequence[str], method: MethodScores) -> Spec:
    """Draw the cost that a method predicts for each measured group."""
    values = [
        {"group": group, "unit": method.unit, "rise": float(f"{cost:.4g}")}
        for group, cost in zip(measured, costs_of(method), strict=True)
        if cost is not None
    ]
    details = tooltip(group="group", rise="predicted rise|.3g", unit="unit")
    y = quantity("rise", "predicted cost", zero=True, tickCount=3)
    encoding = {"x": _along(groups, labels=False, ticks=False), "y": y, "tooltip": details}
    return _panel(values, COST_HEIGHT, {"type": "bar", "color": "var(--stopped)"}, encoding)


def costs_of(method: MethodScores) -> list[float | None]:
    """Return for each group the predicted cost of its smallest format instead of its largest.

    The cost is None for a group that has one format.
    """
    ordered = [method.values[name] for name in by_size(tuple(method.values))]
    found = (
        [value for value in of_group if value is not None]
        for of_group in zip(*ordered, strict=True)
    )
    return [values[0] - values[-1] if len(values) > 1 else None for values in found]


def kept_by_block(cuts: Mapping[str, CutRecord]) -> Chart:
    """Draw the share of parameters that each cut kept of every block."""
    values = [
        {
            "cut": cut_title(name),
            "group": f"{layer.layer}",
            "kept": layer.kept_parameters / layer.base_parameters,
        }
        for name, cut in cuts.items()
        if name != UNPRUNED
        for layer in cut.layers
    ]
    blocks = list(dict.fromkeys(str(value["group"]) for value in values))
    shade = {
        "field": "kept",
        "type": "quantitative",
        "scale": {"domain": [0, 1], "range": [0, 1]},
        "legend": None,
    }
    rows = {"field": "cut", "type": "ordinal", "sort": None, "axis": NO_TITLE}
    details = {"tooltip": tooltip(cut="cut", group="block", kept="kept|.1%")}
    mark = {"type": "rect", "color": "var(--searched)", "stroke": "var(--line)"}
    encoding = {"x": _along(blocks, labelAngle=0), "y": rows, "fillOpacity": shade} | details
    caption = "The share of parameters kept of every block of the base model: the darker, the more."
    return Chart(
        "kept",
        "Kept of each block",
        caption,
        {"vconcat": [_panel(values, {"step": ROW_HEIGHT}, mark, encoding)]},
    )
