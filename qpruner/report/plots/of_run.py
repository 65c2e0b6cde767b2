"""Collects the plots that a run has something to show in, in the report's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qpruner.report.plots.chart import Chart
from qpruner.report.plots.model import importance, kept_of_blocks, plan_map, task_accuracy
from qpruner.report.plots.search import Shown, best_so_far, front, rungs, timeline
from qpruner.report.results import task_accuracies
from qpruner.report.snapshot import Snapshot


def charts(run: Snapshot, importances: Mapping[str, Any] | None = None) -> Iterator[Chart]:
    """Yield every plot; `importances` are the scores of every unit, as pruning kept them."""
    if run.results.evaluate:
        for number, ((task, metric), found) in enumerate(task_accuracies(run.results).items(), start=1):
            yield task_accuracy(number, task, metric, found)
    if run.best_plan:
        yield plan_map(run)
    if search := run.state.search:
        title = "given plan" if run.is_given else "winner" if run.results.search else "best so far"
        is_chosen = run.results.search is not None and not run.is_given
        shown = Shown(search, run.trials, run.best_trial, title, is_chosen, run.metric_title)
        together = Shown(search, run.shown_together, run.best_trial, title, is_chosen, run.metric_title)
        drawn = (front(shown), best_so_far(together), rungs(shown))
        yield from (chart for chart in drawn if chart)
        if intervals := run.worker_intervals:
            yield timeline(intervals, run.trials)
    if run.results.prune:
        yield kept_of_blocks(run.results.prune)
        if importances:
            yield importance(run.results.prune, importances)
