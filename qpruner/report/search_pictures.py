"""Pictures of a search: its plans by score, bytes against score, and the sensitivities of the groups."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from qpruner.plans.pareto import non_dominated
from qpruner.report.far import ARROWS, edge_of
from qpruner.report.plots.budget_axis import budget_axis
from qpruner.report.search_progress import best_of, cost, front_point, score, score_title
from qpruner.runs.records import SearchState, SensitivityRecord, TrialRecord

DOTS_PER_INCH = 90
MOST_PLANS = 40
"""Plans that a bit map shows: the best ones."""
MOST_LABELS = 40
"""Groups that are labelled one by one."""
MOST_NUMBERED = 12
"""Trials that the plot of bytes and score numbers; where front and controls are more, the front goes without."""
TITLE_WIDTH = 90
"""Characters in a line of a plot's title."""
COLORS = {4: "#4477aa", 8: "#ddaa33", 16: "#bb5566"}
"""Of bit-widths; told apart in greyscale and by the color-blind (Paul Tol's high-contrast scheme)."""


def draw_plans(trials: Sequence[TrialRecord], search: SearchState, winner: int | None = None) -> Any:
    """The bit map: a row a trial, a column a group, the best score on top.

    Args:
        trials: Those that are over; the ones without a score are left out.
        search: Says what the scores are.
        winner: Number of the trial that the search returned, if there is one.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    metric = search.metric
    scored = sorted((trial for trial in trials if trial.rungs), key=lambda trial: _rank(trial, metric))[:MOST_PLANS]
    groups = list(scored[0].plan)
    bits = np.array([list(trial.plan.values()) for trial in scored])
    figure = Figure(figsize=(min(3.5 + 0.3 * len(groups), 13), 1.7 + 0.24 * len(scored)), layout="constrained")
    axes = figure.subplots()
    shades = ListedColormap(list(COLORS.values()))
    axes.imshow(bits, cmap=shades, norm=BoundaryNorm([0, 5, 9, 17], shades.N), aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(len(groups) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(scored) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    _label_groups(axes, groups)
    names = [f"{trial.origin}{', winner' if trial.index == winner else ''}" for trial in scored]
    labels = [f"{trial.index} {name}  {_score(trial, metric)}" for trial, name in zip(scored, names, strict=True)]
    axes.set_yticks(range(len(scored)), labels, fontsize=7)
    axes.set_title(f"plans by {score_title(search)}, best on top (* stopped early)", fontsize=9, loc="left")
    shown = [Patch(color=color, label=f"{level} bits") for level, color in COLORS.items() if level in bits]
    figure.legend(handles=shown, ncols=len(shown), loc="outside lower right", fontsize=7, frameon=False)
    return figure


def draw_front(trials: Sequence[TrialRecord], search: SearchState, winner: int | None = None) -> Any:
    """Score against bytes, with the front of the finished trials, the budget and a ring around the best.

    Args:
        trials: Those that are over.
        search: Its metric and budget.
        winner: Number of the trial that the search returned; until there is one, the best searched one has the ring.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    metric = search.metric
    scored = [trial for trial in trials if trial.rungs]
    edge = edge_of(scored, metric)

    def place(trial: TrialRecord) -> tuple[float, float]:
        return trial.plan_bytes / 1e6, edge.place(score(trial.rungs[-1], metric))

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    finished = [trial for trial in trials if trial.status == "finished"]
    kinds = {
        "searched": ([trial for trial in finished if not trial.is_control], "o", COLORS[4]),
        "control": ([trial for trial in finished if trial.is_control and not trial.is_given], "D", COLORS[16]),
        "given plan": ([trial for trial in finished if trial.is_given], "s", "black"),
        "stopped early": ([trial for trial in trials if trial.status == "stopped"], "x", "tab:gray"),
    }
    for label, (shown, marker, color) in kinds.items():
        points = [place(trial) for trial in shown if trial.rungs]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=color, label=label, zorder=3)
    front = [finished[position] for position in non_dominated([front_point(trial, metric) for trial in finished])]
    if winner is None:
        name, best = "best so far", best_of(kinds["searched"][0], metric)
    else:
        name, best = "winner", next((trial for trial in finished if trial.index == winner), None)
    halo = [withStroke(linewidth=2, foreground="white")]
    text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "path_effects": halo, "zorder": 6}
    if best:
        axes.scatter(*place(best), s=130, facecolors="none", edgecolors="black", linewidths=1.8, label=name, zorder=5)
        axes.annotate(f"{best.index}", place(best), xytext=(0, 8), ha="center", fontweight="bold", **text)
    numbered = {trial.index: trial for trial in (*kinds["control"][0], *kinds["given plan"][0])}
    with_front = numbered | {trial.index: trial for trial in front}
    is_few = len(with_front) <= MOST_NUMBERED
    for trial in (with_front if is_few else numbered).values():
        if trial is not best:
            is_far = edge.far_score(trial) is not None  # an arrow stands over it
            beside = (-7, -3) if is_far else (-4, 4)
            axes.annotate(f"{trial.index}", place(trial), xytext=beside, ha="right", **text)
    if front:
        places = zip(*map(place, front), strict=True)
        axes.step(*places, where="post", color="black", linewidth=1, label="front", zorder=2)
    for trial in (trial for trial in scored if edge.far_score(trial) is not None):
        axes.annotate(ARROWS[metric], place(trial), ha="center", va="top" if metric == "accuracy" else "bottom")
    axes.axvline(search.budget_bytes / 1e6, color="black", linestyle=":", linewidth=1, label="budget")
    axes.set(xlabel="MB, stretched near the budget", ylabel=score_title(search))
    _stretch(axes, [trial.plan_bytes / 1e6 for trial in scored], search.budget_bytes / 1e6)
    about = f"after {len(trials)} trials; numbered: {'front, ' if is_few else ''}controls, {name}. {edge.told(scored)}"
    axes.set_title("\n".join(textwrap.wrap(about, TITLE_WIDTH)), fontsize=9, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _stretch(axes: Any, sizes: Sequence[float], budget: float) -> None:
    """The axis of sizes."""
    axis = budget_axis(sizes, budget)
    axes.set_xscale("function", functions=(np.vectorize(axis.along), np.vectorize(axis.back)))
    low, high = (axis.along(end(*sizes, budget)) for end in (min, max))
    beside = 0.05 * (high - low) or 1.0
    axes.set_xlim(axis.back(low - beside), axis.back(high + beside))
    ticks, decimals = axis.ticks(sizes)
    axes.set_xticks(ticks, [f"{tick:.{decimals}f}" for tick in ticks])
    axes.minorticks_off()


def draw_sensitivity(record: SensitivityRecord) -> Any:
    """What fewer bits are predicted to cost each group: a row a method and bit-width, each as a share of its largest.

    Methods differ in what they predict, and in its unit. Colours are those of the report's map.
    """
    from matplotlib.figure import Figure

    rows, labels = [], []
    for name, method in record.methods.items():
        *lower, highest = sorted(method.values)
        for bits in lower:
            rise = np.array(method.values[bits]) - np.array(method.values[highest])
            rows.append(_shades(rise))
            labels.append(f"{name.replace('_', ' ')}, {bits} bits")
    figure = Figure(figsize=(min(4 + 0.3 * len(record.groups), 13), 1.9 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(np.array(rows), aspect="auto", interpolation="nearest", cmap="PuOr_r", vmin=-1, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the largest", shrink=0.8)
    _label_groups(axes, record.groups)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    about = (
        "what a method predicts that fewer bits cost, as a share of its largest; where no figure is below zero, the "
        "shades begin at the least"
    )
    axes.set_title("\n".join(textwrap.wrap(about, TITLE_WIDTH)), fontsize=9, loc="left")
    return figure


def _shades(rises: Any) -> Any:
    """Where predictions stand between the largest of either sign; where none is below zero, from the least on, since
    they may all be near the largest."""
    if rises.min() < 0 or rises.min() == rises.max():
        return rises / (np.abs(rises).max() or 1.0)
    return (rises - rises.min()) / (rises.max() - rises.min())


def png_of(drawn: Any) -> tuple[bytes, tuple[int, int]]:
    """A figure as a PNG file, and its width and height in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn.set_dpi(DOTS_PER_INCH)
    canvas, file = FigureCanvasAgg(drawn), io.BytesIO()
    canvas.print_png(file, pil_kwargs={"optimize": True})
    return file.getvalue(), canvas.get_width_height()


def _rank(trial: TrialRecord, metric: str) -> tuple[bool, float, int]:
    """Finished ones first: a score at an earlier rung does not compare."""
    return (trial.status != "finished", cost(trial.rungs[-1], metric), trial.index)


def _score(trial: TrialRecord, metric: str) -> str:
    star = "*" if trial.status == "stopped" else " "
    return f"{score(trial.rungs[-1], metric):.4f}{star}"


def _label_groups(axes: Any, groups: Sequence[str]) -> None:
    every = -(-len(groups) // MOST_LABELS)
    axes.set_xticks(range(0, len(groups), every), list(groups)[::every], rotation=90, fontsize=7)
