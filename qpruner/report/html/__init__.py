"""Renders `report.html`: the run on one page, which needs no network and can be printed.

Vega-Lite draws the plots. Its runtime (0.9 MB), bundled by vl-convert, is part of the page. Jinja
escapes all text, and a content security policy keeps the page from loading anything.
"""

import json
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qpruner.plans.plan import PrecisionPlan
from qpruner.report.content import Cell, Section
from qpruner.report.snapshot import Snapshot


def render(run: Snapshot, listed: Sequence[Section]) -> str:
    """Render the page of a run from its sections."""
    template = _environment().from_string(_own("template.html"))
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts = {"style": _own("style.css"), "script": _own("page.js"), "runtime": _runtime()}
    return template.render(run=run, sections=listed, written=written, **parts)


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "kind": lambda part: type(part).__name__,
        "code": _code,
        "cell": _cell,
        "script_json": _script_json,
    }
    return environment


@cache
def _runtime() -> Markup:
    """Return Vega-Lite's runtime as one script; bundling takes 1.5 s (measured 2026-11-25)."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in bundle.lower(), "it would end the page's script element"
    return Markup(bundle)  # noqa: S704 (vl-convert's own code)


def _own(name: str) -> Markup:
    return Markup((files(__name__) / name).read_text(encoding="utf-8"))  # noqa: S704 (our own files)


def _code(text: str) -> Markup:
    """Turn text between backticks into code elements."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part
        for index, part in enumerate(text.split("`"))
    )


def _cell(cell: Cell) -> Markup:
    """Draw a plan as a bar per group; turn text between backticks into code elements."""
    return Markup(cell.bars) if isinstance(cell, PrecisionPlan) else _code(str(cell))  # noqa: S704 (its texts are escaped)


def _script_json(data: Any) -> Markup:
    """Serialize data as JSON that cannot end the script element around it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704 (no character that ends the element is left)
