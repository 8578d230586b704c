"""Charts of the report: leather's scales, axes and lines as inline SVG, with bands for intervals
and points that tell their value.

Everything is coloured by classes of the page's style sheet (`c0`, `c1`, ...), so that light and
dark are the sheet's matter.
"""

from __future__ import annotations

import functools
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import leather
from leather.shapes import Shape

from .html import MAX_POINTS, legend, number, text

leather.theme.tick_font_char_width = leather.theme.tick_font_char_height = (
    6  # margins for the sheet's smaller letters
)
leather.theme.margin = 0.02
leather.theme.legend_font_char_height = leather.theme.legend_gap = 0  # the legend is the page's
SIZE = (360, 160)


@dataclass(frozen=True)
class Line:
    """Points (step, value) of one curve and, where known, their intervals (step, low, high)."""

    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass
class Curve(Shape):
    """A line of a class, and at most `MAX_POINTS` points with a title. `unit`: of the x axis."""

    name: str
    kind: str
    unit: str = "step"

    def validate_series(self, series: Any) -> None: ...

    def legend_to_svg(self, series: Any, palette: Any) -> list[ET.Element]:
        return []

    def to_svg(
        self, width: int, height: int, x_scale: Any, y_scale: Any, series: Any, palette: Any
    ) -> ET.Element:
        group = ET.Element("g", {"class": self.kind})
        places = [
            (
                d.x,
                d.y,
                f"{x_scale.project(d.x, 0, width):.1f}",
                f"{y_scale.project(d.y, height, 0):.1f}",
            )
            for d in series.data()
        ]
        ET.SubElement(group, "polyline", points=" ".join(f"{x},{y}" for _, _, x, y in places))
        few = len(places) < 8
        for step, value, x, y in places[:: max(1, -(-len(places) // MAX_POINTS))]:
            dot = ET.SubElement(
                group, "circle", {"class": "dot" if few else "hidden", "cx": x, "cy": y}
            )
            name = f"{self.name} " if self.name else ""
            title = ET.SubElement(dot, "title")
            title.text = f"{self.unit} {number(step)}, {name}{number(value)}"
        return group


@dataclass
class Band(Shape):
    """The area between lows and highs: the series goes along the lows and back along the highs."""

    kind: str

    def validate_series(self, series: Any) -> None: ...

    def legend_to_svg(self, series: Any, palette: Any) -> list[ET.Element]:
        return []

    def to_svg(
        self, width: int, height: int, x_scale: Any, y_scale: Any, series: Any, palette: Any
    ) -> ET.Element:
        corners = (
            f"{x_scale.project(d.x, 0, width):.1f},{y_scale.project(d.y, height, 0):.1f}"
            for d in series.data()
        )
        return ET.Element("polygon", {"class": f"band {self.kind}", "points": " ".join(corners)})


def chart(
    title: str,
    note: str,
    lines: Mapping[str, Line],
    colours: Mapping[str, str],
    *,
    own_legend: bool = False,
    unit: str = "step",
) -> str:
    """A figure with one curve per name; "" if none has a point. `own_legend`: its names are not
    those of the page's legend. `unit`: what the x axis counts."""
    lines = {name: line for name, line in lines.items() if line.points}
    if not lines:
        return ""
    steps = [step for line in lines.values() for step, _ in line.points]
    values = [
        value
        for line in lines.values()
        for value in (*(v for _, v in line.points), *(v for b in line.band for v in b[1:]))
    ]
    drawn = leather.Chart()
    drawn.set_x_scale(_scale(*_domain(steps, 0.5)))
    drawn.set_y_scale(_scale(*_domain(values, abs(values[0]) * 0.1 or 0.5)))
    for name, line in lines.items():
        if line.band:
            around = [(s, low) for s, low, _ in line.band] + [
                (s, high) for s, _, high in reversed(line.band)
            ]
            drawn.add_series(leather.Series(around), Band(colours[name]))
    for name, line in lines.items():
        drawn.add_series(leather.Series(list(line.points)), Curve(name, colours[name], unit))
    svg = re.sub(
        r'<svg width="(\d+)" height="(\d+)"[^>]*>',
        r'<svg viewBox="0 0 \1 \2" role="img">',
        _svg_text(drawn),
    )
    last = ", ".join(f"{name} {number(line.points[-1][1])}".strip() for name, line in lines.items())
    label = f"<title>{text(title)}: last {text(last)}</title>"
    caption = f"<figcaption>{text(title)} <small>{text(note)}</small></figcaption>"
    names = legend({name: colours[name] for name in lines}) if own_legend else ""
    return f"<figure>{caption}{names}{svg.replace('>', '>' + label, 1)}</figure>"


def _svg_text(drawn: leather.Chart) -> str:
    """The SVG element of a chart as text. It is written to a file object, because without one
    leather returns an object for display, not text, wherever IPython is importable."""
    file = io.StringIO()
    drawn.to_svg(file, width=SIZE[0], height=SIZE[1])
    return file.getvalue().removeprefix(leather.svg.HEADER)


@functools.lru_cache(256)
def _scale(low: float, high: float) -> Any:
    """Round ticks are searched for, which takes as long as all the rest; charts of a run share
    their steps."""
    return leather.Linear(low, high)


def _domain(values: Sequence[float], alone: float) -> tuple[float, float]:
    """Smallest and largest; a single value stands in the middle, nothing but 0 at the bottom.
    Values that differ by rounding are one: there are no ticks between them."""
    low, high = min(values), max(values)
    if math.isclose(low, high, rel_tol=1e-6):
        return (low - alone, high + alone) if low else (0.0, 1.0)
    return low, high
