"""Plots of the model: the plan's formats beside the sensitivities, and the importance of each unit (see `UNITS`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qpruner.plans.plan import EMBEDDINGS, HEAD
from qpruner.quantization.formats import by_size, format_of
from qpruner.report.plots.chart import Chart, Spec, Values, by_format, quantity, tooltip
from qpruner.report.results import MUTUAL_INFORMATION
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import CutRecord, MethodScores, SensitivityRecord

if TYPE_CHECKING:
    import torch

CELL_WIDTH, CELL_HEIGHT = 62, 17
NUM_COLUMNS = 32
"""Number of columns that show a block's ranked units; with more units, a column shows a mean of neighbouring units."""
UNITS = {
    "attention": ("key/value groups", "kept_kv_groups", "base_kv_groups"),
    "mlp": ("MLP channels", "kept_mlp_channels", "base_mlp_channels"),
    "expert": ("experts", "kept_experts", "base_experts"),
}
"""Kind of unit -> its title, and the fields of the record with the units kept and the number before pruning."""
BLOCK: Spec = {"field": "block", "type": "ordinal", "axis": {"title": "block"}}
OWN_COLORS: Spec = {"scale": {"color": "independent"}}
LETTER: Spec = {"field": "letter", "type": "nominal"}
IN_BLOCKS, OUTSIDE_BLOCKS = [{"filter": "datum.part != null"}], [{"filter": "datum.part == null"}]
IMPORTANCE_FILE = "importance.npz"


def plan_map(run: Snapshot, plan: Mapping[str, str]) -> Chart:
    """Draw each group's format in a plan by block and, beside them, each group's sensitivity."""
    cells = [_cell(group) | _of_format(name) for group, name in plan.items()]
    record = run.results.prune
    is_renumbered = record and run.best_cut in record.cuts and record.cuts[run.best_cut].dropped_blocks
    numbering = " Blocks are numbered as in the pruned model." if is_renumbered else ""
    maps = [_format_map(cells)]
    if run.sensitivity is None or set(run.sensitivity.groups) != set(plan):
        return Chart("winner", "Formats by layer", f"One cell per group.{numbering}", {"hconcat": maps})
    maps.append(_sensitivity_map(cells, run.sensitivity))
    methods = list(run.sensitivity.methods)
    # Mutual information comes last, because it predicts no quantization error.
    first = min(methods, key=lambda name: name == MUTUAL_INFORMATION)
    bind = {"input": "select", "options": methods, "name": "Sensitivity by "}
    return Chart(
        "winner",
        "Formats and sensitivity by layer",
        "Left: each group's format in the plan. Right: the predicted cost of a group's smallest format instead of its "
        "largest, as a share of the largest cost. "
        "Orange groups are predicted to get worse, purple ones to get better. If none gets better, the shades begin at "
        f"the smallest cost.{numbering}",
        {"params": [{"name": "method", "value": first, "bind": bind}], "hconcat": maps, "spacing": 28},
        "Point at a cell for its value.",
    )


def _panel(title: Any, width: Any, values: Values) -> Spec:
    return {"title": title, "width": width, "height": {"step": CELL_HEIGHT}, "data": {"values": values}}


def _cell(group: str) -> Spec:
    """Place a group: ``layers.07.mlp`` is in row 7, column mlp; groups outside the blocks have a row of their own."""
    if group in (EMBEDDINGS, HEAD):
        return {"block": group, "part": None, "group": group}
    _, block, *part = group.split(".")
    return {"block": str(int(block)), "part": ".".join(part) or "block", "group": group}


def _of_format(name: str) -> Spec:
    return {"format": name, "letter": format_of(name).letter, "ink": format_of(name).ink}


def _grid(cells: Values, layers: Sequence[Spec], is_first: bool = True) -> Spec:
    """Draw layers, mark and encoding, in a cell per group; a group outside the blocks fills its row."""
    parts = list(dict.fromkeys(cell["part"] for cell in cells if cell["part"])) or ["block"]
    column = {"title": None, "orient": "top", "labelAngle": 0, "labelLimit": CELL_WIDTH - 4}
    row = {"title": "block", "titlePadding": 10} if is_first else None
    x: Spec = {"field": "part", "type": "nominal", "scale": {"domain": parts}, "axis": column}
    order = list(dict.fromkeys(cell["block"] for cell in cells))
    y: Spec = {"field": "block", "type": "ordinal", "scale": {"domain": order}, "axis": row}
    drawn = []
    for layer in layers:
        encoding = {"y": y} | layer["encoding"]
        drawn.append(layer | {"transform": IN_BLOCKS, "encoding": {"x": x} | encoding})
        wide = {"x": {"value": 0}, "x2": {"value": "width"}} if layer["mark"]["type"] == "rect" else {}
        drawn.append(layer | {"transform": OUTSIDE_BLOCKS, "encoding": wide | encoding})
    return {"layer": drawn}


def _format_map(cells: Values) -> Spec:
    used = [cell["format"] for cell in cells]
    color = {"color": by_format(used), "tooltip": tooltip(group="group", format="format")}
    layers: list[Spec] = [
        {"mark": {"type": "rect", "stroke": "var(--page)"}, "encoding": color},
        {"mark": {"type": "text", "fontSize": 11, "color": {"expr": "datum.ink"}}, "encoding": {"text": LETTER}},
    ]
    return _panel(["formats", ""], {"step": CELL_WIDTH}, cells) | _grid(cells, layers)


def _sensitivity_map(cells: Values, record: SensitivityRecord) -> Spec:
    """Draw the cost that one method predicts for each group's smallest format; the page's reader selects the method."""
    values: Values = []
    for name, method in record.methods.items():
        costs = {group: cost for group, cost in zip(record.groups, costs_of(method), strict=True) if cost is not None}
        for (group, rise), share in zip(costs.items(), shades(list(costs.values())), strict=True):
            figures = {"rise": float(f"{rise:.4g}"), "share": round(share, 3), "strength": round(abs(share), 3)}
            values.append(_cell(group) | {"method": name, "unit": method.unit} | figures)
    shade = {"condition": {"test": "datum.share < 0", "value": "var(--below-zero)"}, "value": "var(--control)"}
    opacity = {"field": "strength", "type": "quantitative", "scale": None, "legend": None}
    details = tooltip(group="group", method="method", rise="predicted rise|.3g", unit="unit")
    encoding = {"color": shade, "fillOpacity": opacity, "tooltip": details}
    layers = [{"mark": {"type": "rect", "stroke": "var(--line)"}, "encoding": encoding}]
    title = {"text": {"expr": "['sensitivity by', method]"}}
    of_map = {"transform": [{"filter": "datum.method == method"}]} | _grid(cells, layers, is_first=False)
    return _panel(title, {"step": CELL_WIDTH}, values) | of_map


def costs_of(method: MethodScores) -> list[float | None]:
    """Return for each group the predicted cost of its smallest format instead of its largest; None if it has one."""
    ordered = [method.values[name] for name in by_size(tuple(method.values))]
    found = ([value for value in of_group if value is not None] for of_group in zip(*ordered, strict=True))
    return [values[0] - values[-1] if len(values) > 1 else None for values in found]


def shades(rises: Sequence[float]) -> list[float]:
    """Turn the rises in loss that a method predicts into shades: shares of the largest magnitude.

    If no rise is negative, shades go from 0 (smallest) to 1 instead, so that nearly equal rises do not all look dark.
    """
    if not rises:
        return []
    least, largest = min(rises), max(map(abs, rises))
    if least < 0 or least == max(rises):
        return [rise / (largest or 1.0) for rise in rises]
    return [(rise - least) / (largest - least) for rise in rises]


# ---- the importance of units


def save_importance(
    folder: Path, scores: Mapping[int, Mapping[str, torch.Tensor]], blocks: Mapping[int, float]
) -> None:
    """Save each block's scores of units as an array such as `7.mlp`; save (index, score) of blocks as array `block`."""
    arrays: dict[str, Any] = {
        f"{index}.{kind}": score.numpy() for index, kinds in scores.items() for kind, score in kinds.items()
    }
    if blocks:
        arrays["block"] = np.array([[index, score] for index, score in blocks.items()])
    np.savez_compressed(folder / IMPORTANCE_FILE, **arrays)


def load_importance(folder: Path) -> dict[str, Any]:
    """Load the arrays that `save_importance` saved."""
    with np.load(folder / IMPORTANCE_FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def importance(record: CutRecord, scores: Mapping[str, Any]) -> Chart:
    """Draw each block's units by importance, the share kept, and scores of whole blocks, removed ones in red."""
    scored = [kind for kind in UNITS if any(name.endswith(f".{kind}") for name in scores)]
    panels = [panel for kind in scored or ["attention", "mlp"] for panel in _panels(kind, record, scores)]
    if "block" in scores:
        blocks = [
            {"block": int(index), "value": float(value), "gone": int(index) in record.dropped_blocks}
            for index, value in scores["block"]
        ]
        color = {"condition": {"test": "datum.gone", "value": "var(--failed)"}, "value": "var(--stopped)"}
        panels.append(_bars("whole blocks", blocks, quantity("value", "importance", zero=True)))
        panels[-1]["encoding"]["color"] = color
    numbering = " Blocks are numbered as in the base model." if record.dropped_blocks else ""
    caption = (
        "The importance that pruning uses: in each block from the least to the most important unit, and beside it the "
        f"share of units that was kept.{numbering}"
    )
    return Chart("importance", "Importance of every unit", caption, {"hconcat": panels, "spacing": 12})


def _panels(kind: str, record: CutRecord, scores: Mapping[str, Any]) -> Iterator[Spec]:
    title, kept, base = UNITS[kind]
    values: Values = []
    for layer in record.layers:
        for column, value in enumerate(in_columns(scores.get(f"{layer.layer}.{kind}"))):
            # Log10 of zero would make every other colour the same.
            shown = round(float(np.log10(value)), 3) if value > 0 else None
            values.append({"block": layer.layer, "column": column, "importance": shown})
    scale = {"scale": {"scheme": "viridis"}, "legend": {"title": "log10 importance"}}
    encoding = {
        "x": {"field": "column", "type": "ordinal", "axis": None},
        "y": BLOCK | {"scale": {"domain": [layer.layer for layer in record.layers]}},
        "color": {"field": "importance", "type": "quantitative"} | scale,
    }
    shown_only = [{"filter": "isValid(datum.importance)"}]
    ranks = {"resolve": OWN_COLORS, "transform": shown_only, "mark": "rect", "encoding": encoding}
    yield _panel(title, 6 * NUM_COLUMNS, values) | ranks
    # A block without such units lost none.
    counts = [(each.layer, len(getattr(each, kept) or ()), getattr(each, base)) for each in record.layers]
    bars = [{"block": block, "value": num_kept / there if there else 1.0} for block, num_kept, there in counts]
    share = quantity("value", "kept", zero=True, format=".0%", values=[0, 1]) | {"scale": {"domain": [0, 1]}}
    yield _bars("kept", bars, share)


def _bars(title: str, values: Values, x: Spec) -> Spec:
    bar = {"type": "bar", "color": "var(--stopped)"}
    return _panel(title, 60, values) | {"mark": bar, "encoding": {"x": x, "y": BLOCK}}


def in_columns(scores: Any) -> Sequence[float]:
    """Spread a block's ascending scores over `NUM_COLUMNS` columns: repeat few, average many; empty without scores."""
    if scores is None:
        return ()
    ordered = np.sort(scores)
    if len(ordered) < NUM_COLUMNS:
        return [float(each) for each in ordered[np.arange(NUM_COLUMNS) * len(ordered) // NUM_COLUMNS]]
    return [float(part.mean()) for part in np.array_split(ordered, NUM_COLUMNS)]
