"""Renders `report.html`: the whole run on one page that needs no network, works from disk and prints.

Vega-Lite draws the plots; its runtime, as vl-convert bundles it, is written into the page (0.9 MB). All text goes
through Jinja's escaping, and a content security policy keeps the page from loading anything.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qpruner.report.content import Section, Tiles
from qpruner.report.search_progress import score
from qpruner.report.sections import sections
from qpruner.report.snapshot import Snapshot
from qpruner.report.tables import bar_of
from qpruner.runs.records import TrialRecord

TRIAL_COLUMNS = {
    "trial": "number",
    "from": "text",
    "status": "text",
    "MB": "number",
    "mean bits": "number",
    "score": "number",
    "step": "number",
    "seconds": "number",
    "plan": "plan",
    "reason": "text",
}
"""Heading -> class of the cells."""
FEW_TRIALS = 12
"""Trials that the table shows at full height, without a box to scroll in."""


def render(run: Snapshot, listed: Sequence[Section]) -> str:
    """Render the page of a run from its sections."""
    # Reasons, the last, only where there are some.
    columns = dict(list(TRIAL_COLUMNS.items())[: 10 if any(trial.reason for trial in run.trials) else 9])
    return (
        _environment()
        .from_string(_own("template.html"))
        .render(
            run=run,
            sections=listed,
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            few_trials=FEW_TRIALS,
            trial_columns=columns,
            trial_cells=lambda trial: list(_trial_cells(run, trial))[: len(columns)],
            style=_own("style.css"),
            script=_own("page.js"),
            runtime=_runtime(),
        )
    )


def notebook_view(run: Snapshot) -> str:
    """Render the answer alone, as a notebook shows it."""
    [answer, *_] = sections(run, [], "")
    shown = [part for part in answer.parts if isinstance(part, Tiles) or type(part).__name__ != "Terms"]
    return _environment().from_string(_own("notebook.html")).render(run=run, parts=shown)


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "code": _code,
        "kind": lambda part: type(part).__name__,
        "script_json": _script_json,
        "plan_bar": _plan_bar,
        "unbroken": _unbroken,
    }
    return environment


@cache
def _runtime() -> Markup:
    """Return Vega-Lite's runtime as one script; bundling takes 1.5 s (measured 2026-11-25)."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in bundle.lower(), "it would end its element early"
    return Markup(bundle)  # noqa: S704 (vl-convert's own code)


def _own(name: str) -> Markup:
    return Markup((files(__name__) / name).read_text(encoding="utf-8"))  # noqa: S704 (our own files)


def _unbroken(cell: str) -> str:
    """Keep a figure and its unit or spread on one line."""
    return re.sub(r" (?=MB?$)|(?<=±) |(?<=\(se) ", "\u00a0", cell)


def _code(text: str) -> Markup:
    """Show words in backticks as code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _script_json(data: Any) -> Markup:
    """Write JSON that cannot end the script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704 (no character that ends the element is left)


def _plan_bar(bar: str) -> Markup:
    """Set off runs of 8 and of 16 bits in a plan's bar."""
    tags = {"8": "b", "F": "i"}
    marked = ((tags.get(run[0][0]), run[0]) for run in re.finditer(r"4+|8+|F+", bar))
    return Markup("").join(Markup("<{0}>{1}</{0}>").format(tag, text) if tag else text for tag, text in marked)


def _trial_cells(run: Snapshot, trial: TrialRecord) -> Iterator[tuple[float | None, Any, str]]:
    """Yield of every cell what it is sorted by where that is not its text, what is shown, and its class."""
    last = trial.rungs[-1] if trial.rungs else None
    reached = score(last, run.metric) if last else None
    status = run.statuses[trial.status]
    if trial == run.best_trial:
        status += ", winner" if run.results.search else ", best so far"
    shown = (
        f"{trial.index}",
        trial.origin if trial in run.own_trials else f"{trial.origin}, another search",
        status,
        f"{trial.plan_bytes / 1e6:.2f}",
        f"{trial.mean_bits:.2f}",
        "" if reached is None else f"{reached:.4f}",
        f"{last.step}" if last else "",
        f"{trial.seconds:.0f}",
        _plan_bar(bar_of(trial.plan)),
        trial.reason or "",
    )
    for (heading, kind), cell in zip(TRIAL_COLUMNS.items(), shown, strict=True):
        yield reached if heading == "score" else None, cell, kind
