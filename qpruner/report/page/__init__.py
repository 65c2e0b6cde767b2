"""`report.html`: the whole run on one page that needs no network, works from disk and prints.

Vega-Lite draws the plots; its runtime, as vl-convert bundles it, is written into the page (0.9 MB). All text goes
through Jinja's escaping, and a content security policy keeps the page from loading anything.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qpruner.report import by_task, legend, sections
from qpruner.report.claim import claim
from qpruner.report.page.answer import tiles
from qpruner.report.plots.chart import Chart
from qpruner.report.search_progress import score
from qpruner.report.search_summary import search_text
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import TrialRecord

TRIAL_HEADINGS = (
    ("trial", "number"),
    ("from", "text"),
    ("status", "text"),
    ("MB", "number"),
    ("mean bits", "number"),
    ("score", "number"),
    ("step", "number"),
    ("seconds", "number"),
    ("plan", "plan"),
    ("reason", "text"),
)
FEW_TRIALS = 12
"""Trials that the table shows at full height, without a box to scroll in."""
PARTS = {
    "answer": "The answer",
    "quality": "Quality",
    "plan": "Plan",
    "search": "Search",
    "pruning": "Pruning",
    "cost": "Cost",
    "repeat": "To repeat it",
}


def render(run: Snapshot, charts: Sequence[Chart], config: str, importance: bytes | None = None) -> str:
    """The page.

    Args:
        run: What the run's folder tells.
        charts: Its plots.
        config: The configuration as YAML.
        importance: What pruning drew of every unit, as a PNG file.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["code"] = _code
    template = environment.from_string(_own("template.html"))
    there = {
        "plan": run.best_plan,
        "quality": run.results.evaluate,
        "search": run.state.search,
        "pruning": run.results.prune,
    }
    # Reasons, the last, only where there are some.
    trial_headings = TRIAL_HEADINGS if any(trial.reason for trial in run.trials) else TRIAL_HEADINGS[:-1]
    parts = {name: heading for name, heading in PARTS.items() if there.get(name, True)}
    return template.render(
        run=run,
        model=run.state.config["model"]["source"],
        parts=parts,
        tiles=tiles(run),
        charts=charts,
        config=config,
        importance=importance and base64.b64encode(importance).decode(),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        tables=_tables(run),
        search_text=_search_text(run),
        by_task=by_task,
        legend=legend,
        sections=sections,
        as_json=_script_json,
        plan_bar=_plan_bar,
        few_trials=FEW_TRIALS,
        trial_headings=trial_headings,
        trial_cells=lambda trial: list(_trial_cells(run, trial))[: len(trial_headings)],
        style=_own("style.css"),
        script=_own("page.js"),
        bundle=_runtime(),
    )


def notebook_view(run: Snapshot) -> str:
    """The answer alone, as a notebook shows it."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_own("notebook.html"))
    return template.render(run=run, tiles=tiles(run), tables=_tables(run), sections=sections)


@cache
def _runtime() -> Markup:
    """Vega-Lite's runtime as one script; bundling takes 1.5 s (measured 2026-11-25)."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in bundle.lower(), "it would end its element early"
    return Markup(bundle)  # noqa: S704 (vl-convert's own code)


def _own(name: str) -> Markup:
    return Markup((files(__name__) / name).read_text(encoding="utf-8"))  # noqa: S704 (our own files)


def _tables(run: Snapshot) -> dict[str, Any]:
    """What the template shows of each part that the run has."""
    results = run.results
    tables: dict[str, Any] = {"stages": sections.stages(run), "rungs": sections.rungs(run)}
    if results.evaluate:
        tables["final"] = [
            (caption, headings, [list(map(_unbroken, line)) for line in body])
            for caption, headings, body in sections.final_tables(results)
        ]
        tables["by_task"] = by_task.table(results)
        tables["steps"] = sections.steps(results)
        tables["legend"] = legend.terms(results)
        tables["claim"] = [line.removeprefix("- ") for line in claim(results).splitlines()]
    if measured := run.sensitivity:
        tables["methods_caption"] = sections.methods_caption(measured)
        tables["methods"] = sections.methods(measured, run.effects)
        tables["groups"] = sections.groups(measured, run.effects, run.best_plan)
        tables["numbering"] = sections.group_numbering(results.prune)
    if results.search:
        tables["finalists"] = sections.finalists(results.search)
        if results.search.front:
            tables["front"] = sections.front(results.search)
    if results.prune:
        tables["layers"] = sections.layers(results.prune)
    return tables


def _unbroken(cell: str) -> str:
    """A figure whose unit or spread does not go to another line."""
    return re.sub(r" (?=MB?$)|(?<=±) |(?<=\(se) ", "\u00a0", cell)


def _code(text: str) -> Markup:
    """A text whose words in backticks are shown as code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _search_text(run: Snapshot) -> list[str]:
    if run.results.search:
        return search_text(run.results.search, run.trials)
    return sections.unfinished_search_text(run) if run.state.search else []


def _script_json(data: Any) -> Markup:
    """JSON that nothing in it can end the script element of."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704 (no character that ends the element is left)


def _plan_bar(plan: dict[str, int]) -> Markup:
    """The plan's characters; runs of 8 and of 16 bits are set off."""
    tags = {"8": "b", "F": "i"}
    runs = re.finditer(r"4+|8+|F+", sections.bar(plan))
    marked = ((tags.get(run[0][0]), run[0]) for run in runs)
    return Markup("").join(Markup("<{0}>{1}</{0}>").format(tag, text) if tag else text for tag, text in marked)


def _trial_cells(run: Snapshot, trial: TrialRecord) -> Iterator[tuple[str | float | None, Any, str]]:
    """Every cell of a trial's row: what it is sorted by where that is not its text, what is shown, its class."""
    last = trial.rungs[-1] if trial.rungs else None
    reached = score(last, run.metric) if last else None
    status = sections.statuses(run)[trial.status]
    if trial == run.best_trial:
        status += ", winner" if run.results.search else ", best so far"
    figures = (
        (None, f"{trial.index}"),
        (None, trial.origin if trial in run.own_trials else f"{trial.origin}, another search"),
        (None, status),
        (None, f"{trial.plan_bytes / 1e6:.2f}"),
        (None, f"{trial.mean_bits:.2f}"),
        (reached, "" if reached is None else f"{reached:.4f}"),
        (None, f"{last.step}" if last else ""),
        (None, f"{trial.seconds:.0f}"),
        (None, _plan_bar(trial.plan)),
        (None, trial.reason or ""),
    )
    for (_, kind), (value, shown) in zip(TRIAL_HEADINGS, figures, strict=True):
        yield value, shown, kind
