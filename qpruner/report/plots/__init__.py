"""The plots of a run as Vega-Lite specifications, for the page and, as PNG, for GitHub."""

from __future__ import annotations

from qpruner.report.plots.chart import Chart
from qpruner.report.plots.model import kept, tasks, winner
from qpruner.report.plots.search import hypervolume, pareto, progress, rungs, timeline
from qpruner.report.snapshot import Snapshot


def charts(run: Snapshot) -> list[Chart]:
    """Every plot that the run has something to show in, in the report's order."""
    return [
        chart for make in (tasks, winner, pareto, progress, hypervolume, rungs, timeline, kept) for chart in make(run)
    ]
