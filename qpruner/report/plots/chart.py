"""One plot, and what all plots share.

Colours are variables of the page's style sheet (``var(--bits-4)``), so that plots follow light, dark and print without
being drawn anew; `Chart.png` puts the light theme's values in their place.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

Spec = dict[str, Any]
Values = list[dict[str, Any]]

PNG_WIDTH, PNG_SCALE = 640, 1.5
TEXT = {
    "labelColor": "var(--text)",
    "titleColor": "var(--text)",
    "titleFontWeight": "normal",
    "labelFontSize": 12,
    "titleFontSize": 12,
}
CONFIG: Spec = {
    "background": "transparent",
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "var(--line)", "domainColor": "var(--line)", "tickColor": "var(--line)", **TEXT},
    "legend": TEXT | {"symbolOpacity": 1, "orient": "bottom"},
    "title": {"color": "var(--text)", "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
    "text": {"color": "var(--text)", "fontSize": 12},
}
HALO: Spec = {"stroke": "var(--page)", "strokeWidth": 4, "strokeJoin": "round", "aria": False}
"""Of a text that points may lie under."""


@dataclass(frozen=True)
class Chart:
    """One plot, as Vega-Lite without what all plots share; `on_page` tells what a pointer does there."""

    name: str
    title: str
    caption: str
    spec: Spec
    on_page: str = ""

    @property
    def complete(self) -> Spec:
        """The specification as Vega-Lite takes it; a single plot takes the width there is."""
        single = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
        several = {"autosize": {"type": "pad", "resize": True}}  # a choice may change how long a title is
        return {
            "description": f"{self.title}. {self.caption} {self.on_page}".rstrip(),
            "config": CONFIG,
            **(several if "hconcat" in self.spec else single),
            **self.spec,
        }

    def png(self) -> bytes:
        """Draw the plot as a PNG file, in the light theme."""
        import vl_convert

        drawn = self.complete | {"background": "var(--page)"}
        if drawn.get("width") == "container":
            drawn["width"] = PNG_WIDTH
        text = re.sub(r"var\((--[a-z0-9-]+)\)", lambda found: light_theme()[found[1]], json.dumps(drawn))
        return bytes(vl_convert.vegalite_to_png(text, scale=PNG_SCALE))


@cache
def light_theme() -> dict[str, str]:
    """Read the style sheet's colours by variable, those of the light theme."""
    style = (files("qpruner.report") / "html" / "style.css").read_text(encoding="utf-8")
    return dict(re.findall(r"(--[a-z0-9-]+):\s*([^;]+);", style[: style.index("}")]))


def quantity(field: str, title: str, zero: bool = False, **axis: Any) -> Spec:
    """Encode a number along an axis."""
    return {"field": field, "type": "quantitative", "scale": {"zero": zero}, "axis": {"title": title, **axis}}


def by_word(field: str, values: dict[str, str], title: str | None = None) -> Spec:
    """Encode words by one colour or shape each."""
    scale = {"domain": list(values), "range": list(values.values())}
    return {"field": field, "type": "nominal", "scale": scale, "legend": {"title": title}}


def by_bits(levels: list[int], prefix: str) -> Spec:
    """Encode bit-widths by the colours `--PREFIX-4`, `--PREFIX-8` and so on."""
    scale = {"domain": levels, "range": [f"var(--{prefix}-{bits})" for bits in levels]}
    return {"field": "bits", "type": "ordinal", "scale": scale, "legend": None}


def tooltip(**fields: str) -> list[Spec]:
    """List fields to show on pointing; a number's format follows its title after a bar: ``loss="loss|.4f"``."""
    shown = []
    for field, text in fields.items():
        title, _, number_format = text.partition("|")
        shown.append({"field": field, "title": title} | ({"format": number_format} if number_format else {}))
    return shown
