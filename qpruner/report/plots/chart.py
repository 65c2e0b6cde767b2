"""Defines a plot as a Vega-Lite specification, with the settings that all plots share.

They share encodings too. Colours are variables of the page's style sheet (``var(--searched)``), so
that a drawn plot follows the light, dark and print themes. `Chart.png` replaces them by the light
theme's values. Formats have one colour in all themes.
"""

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
    "axis": {
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        **TEXT,
    },
    "legend": TEXT
    | {
        "symbolOpacity": 1,
        "orient": "bottom",
        "symbolBaseFillColor": "var(--text)",
        "columns": 3,
        "offset": 8,
    }
    | {"layout": {"bottom": {"direction": "vertical"}}},
    "title": {"color": "var(--text)", "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
    "text": {"color": "var(--text)", "fontSize": 12},
}
HALO: Spec = {"stroke": "var(--page)", "strokeWidth": 4, "strokeJoin": "round", "aria": False}
"""Outline of a label, which keeps it readable over points."""


@dataclass(frozen=True)
class Chart:
    """A plot: a Vega-Lite specification without the shared settings."""

    name: str
    title: str
    caption: str
    spec: Spec

    @property
    def complete(self) -> Spec:
        """The specification with the shared settings.

        A plot of one panel gets the full width of its container.
        """
        one_panel = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
        # another choice may have a longer title
        panels = {"autosize": {"type": "pad", "resize": True}}
        return {
            "description": f"{self.title}. {self.caption}",
            "config": CONFIG,
            **(panels if "vconcat" in self.spec else one_panel),
            **self.spec,
        }

    def png(self) -> bytes:
        """Draw the plot in the light theme; return the bytes of a PNG file."""
        import vl_convert

        drawn = self.complete | {"background": "var(--page)"}
        if drawn.get("width") == "container":
            drawn["width"] = PNG_WIDTH
        text = re.sub(
            r"var\((--[a-z0-9-]+)\)", lambda found: light_theme()[found[1]], json.dumps(drawn)
        )
        return bytes(vl_convert.vegalite_to_png(text, scale=PNG_SCALE))


@cache
def light_theme() -> dict[str, str]:
    """Read the light theme's colours from the style sheet: variable -> colour."""
    style = (files("qpruner.report") / "html" / "style.css").read_text(encoding="utf-8")
    return dict(re.findall(r"(--[a-z0-9-]+):\s*([^;]+);", style[: style.index("}")]))


def quantity(field: str, title: str, zero: bool = False, **axis: Any) -> Spec:
    """Encode a numeric field as the position along an axis."""
    return {
        "field": field,
        "type": "quantitative",
        "scale": {"zero": zero},
        "axis": {"title": title, **axis},
    }


def by_word(field: str, values: dict[str, str], title: str | None = None) -> Spec:
    """Encode a field of words by colour or shape.

    `values` maps each word to its colour or shape.
    """
    scale = {"domain": list(values), "range": list(values.values())}
    return {"field": field, "type": "nominal", "scale": scale, "legend": {"title": title}}


def tooltip(**fields: str) -> list[Spec]:
    """Encode a tooltip from pairs of a field and its title.

    A number format follows the title after `|` if the field needs one: ``loss="loss|.4f"``.
    """
    shown = []
    for field, text in fields.items():
        title, _, number_format = text.partition("|")
        shown.append(
            {"field": field, "title": title} | ({"format": number_format} if number_format else {})
        )
    return shown
