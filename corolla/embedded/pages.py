"""Reports as pages of one file: a template, the style of all of them, and charts in its colours."""

from typing import Any

import jinja2

from corolla.embedded.assets import asset

_COLOURS = {
    "#ffffff": "none",
    "#000000": "currentColor",
    "#d3d3d3": "var(--line)",
    "#e6eaee": "var(--line)",
}
"""Colour in a chart that is drawn on white paper → what it is on a page, light or dark."""


def render_page(template: str, **values: Any) -> bytes:
    """Returns a page made from an embedded template, which includes `style` as it is."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = asset(template).read_text(encoding="utf-8")
    style = asset("report.css").read_text(encoding="utf-8")
    return environment.from_string(text).render(style=style, **values).encode()


def shown(colour: str) -> str:
    """Returns what a colour of a chart is on a page."""
    return _COLOURS.get(colour, colour)


def inline(svg: str) -> str:
    """Returns an SVG of matplotlib for a page: without its head, in the page's own colours."""
    found = svg[svg.index("<svg") :]
    for drawn in _COLOURS:
        found = found.replace(drawn, shown(drawn))
    return found
