"""Charts as inline SVG: small panels that take their colours from the page and so follow dark mode without a script.

Every series has a slot, which stands for one colour and one marker on the whole page: colour is never the only cue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

NICE = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])  # round numbers for an axis
NUM_SLOTS = 8  # colours in templates/page.css; with five shapes, forty drafts look different
WIDTH, HEIGHT = 360, 232  # units of a panel; the page shows one at 0.85 to 1.4 times this size
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 26, 38
ROW_LABEL, ROW_LINE, ROW_GAP = 18, 17, 8  # heights in an interval chart
VALUE_WIDTH = 42  # room for the numbers at its right
MARKER = 3.6  # half the width of one
SHAPES = (  # corners in units of MARKER; the first is a circle
    (),
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
    ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    ((-1.2, -0.9), (1.2, -0.9), (0, 1.3)),
)


@dataclass(frozen=True)
class Point:
    """A measured value.

    Attributes:
        low, high: its interval; None where there is none.
        note: shown when a pointer rests on it.
        is_marked: ringed.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    is_marked: bool = False


@dataclass(frozen=True)
class Series:
    """What one draft measured; slot is its colour and marker."""

    name: str
    slot: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Axes:
    """Names and range of a panel's axes.

    Attributes:
        low, high: range of y.
        ticks: places on x that get a number.
        baseline: value of y drawn as a dashed line, such as a speed-up of one.
    """

    x_label: str
    y_label: str
    low: float
    high: float
    ticks: Sequence[float] = ()
    baseline: float | None = None


class Panel:
    """An SVG under construction in a rectangle of data.

    Args:
        label: what it shows, for screen readers.
        height: in units.
        x_range, y_range: data at the left and right, bottom and top edges of the plot.
        right: margin.
    """

    def __init__(
        self,
        label: str,
        *,
        x_range: tuple[float, float],
        y_range: tuple[float, float] = (0.0, 1.0),
        height: float = HEIGHT,
        left: float = LEFT,
        right: float = RIGHT,
    ):
        self.height = height
        self.left, self.right = left, WIDTH - right
        self._x_range, self._y_range = x_range, y_range
        shape = {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": label}
        self.root = ElementTree.Element("svg", shape)

    def x(self, value: float) -> float:
        """Units from the left of a value on x."""
        low, high = self._x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Units from the top of a value on y."""
        low, high = self._y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - BOTTOM - TOP)

    def line(self, css: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight line between two places, in units."""
        places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        ElementTree.SubElement(self.root, "line", {"class": css, **_numbers(places)})

    def text(self, css: str, x: float, y: float, content: str, anchor: str = "middle") -> None:
        """Words whose baseline is at y; anchor is start, middle or end."""
        fields = {"class": css, "text-anchor": anchor, **_numbers({"x": x, "y": y})}
        ElementTree.SubElement(self.root, "text", fields).text = content

    def path(self, css: str, places: Sequence[tuple[float, float]], *, is_closed: bool = False) -> None:
        """A line through places, in units, or the area inside of it."""
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        ElementTree.SubElement(self.root, "path", {"class": css, "d": f"M{steps}" + "Z" * is_closed})

    def bar(self, css: str, x: float, y: float, width: float, height: float, note: str) -> None:
        """A rectangle from its upper left corner, in units."""
        places = {"x": x, "y": y, "width": width, "height": height}
        bar = ElementTree.SubElement(self.root, "rect", {"class": css, **_numbers(places)})
        ElementTree.SubElement(bar, "title").text = note

    def marker(self, slot: int, x: float, y: float, note: str = "") -> None:
        """The mark of a slot at a place, in units."""
        corners = SHAPES[slot % len(SHAPES)]
        css = f"mark s{slot % NUM_SLOTS}"
        if corners:
            points = " ".join(f"{x + MARKER * dx:.1f},{y + MARKER * dy:.1f}" for dx, dy in corners)
            mark = ElementTree.SubElement(self.root, "polygon", {"class": css, "points": points})
        else:
            fields = {"class": css, **_numbers({"cx": x, "cy": y, "r": MARKER})}
            mark = ElementTree.SubElement(self.root, "circle", fields)
        if note:
            ElementTree.SubElement(mark, "title").text = note

    def frame(self, axes: Axes) -> None:
        """Grid, ticks and names of both axes."""
        for value in NICE.tick_values(axes.low, axes.high):
            if axes.low <= value <= axes.high + 1e-9:
                self.line("grid", self.left, self.y(value), self.right, self.y(value))
                self.text("tick", self.left - 6, self.y(value) + 4, f"{value:g}", "end")
        for value in axes.ticks:
            self.text("tick", self.x(value), self.height - BOTTOM + 16, f"{value:g}")
        if axes.baseline is not None:
            self.line("baseline", self.left, self.y(axes.baseline), self.right, self.y(axes.baseline))
        self.text("axis", (self.left + self.right) / 2, self.height - 5, axes.x_label)
        self.text("axis", 4, 14, axes.y_label, "start")

    def svg(self) -> Markup:
        """The finished picture; ElementTree has escaped every text in it."""
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))


def line_chart(label: str, series: Sequence[Series], axes: Axes) -> Markup:
    """Lines over x with their intervals as bands.

    Args:
        label: what it shows, for screen readers.
        series: drafts, each with a line of points.
        axes: names and range.
    """
    xs = [p.x for s in series for p in s.points]
    pad = (max(xs) - min(xs)) * 0.04 or 1.0
    panel = Panel(label, x_range=(min(xs) - pad, max(xs) + pad), y_range=(axes.low, axes.high))
    panel.frame(axes)
    for s in series:
        band = [(panel.x(p.x), panel.y(p.high)) for p in s.points if p.high is not None]
        band += [(panel.x(p.x), panel.y(p.low)) for p in reversed(s.points) if p.low is not None]
        if band:
            panel.path(f"band s{s.slot % NUM_SLOTS}", band, is_closed=True)
    for s in series:
        panel.path(f"line s{s.slot % NUM_SLOTS}", [(panel.x(p.x), panel.y(p.y)) for p in s.points])
    for s in series:
        for p in s.points:
            _draw_point(panel, s, p)
    return panel.svg()


def _draw_point(panel: Panel, series: Series, point: Point) -> None:
    x, y = panel.x(point.x), panel.y(point.y)
    panel.marker(series.slot, x, y, f"{series.name}: {point.note}")
    if point.is_marked:
        ring = {"class": f"ring s{series.slot % NUM_SLOTS}", **_numbers({"cx": x, "cy": y, "r": 2.2 * MARKER})}
        ElementTree.SubElement(panel.root, "circle", ring)


def bar_chart(label: str, series: Sequence[Series], axes: Axes) -> Markup:
    """Bars side by side, in the order of the series, at every whole x.

    Args:
        label: what it shows, for screen readers.
        series: drafts, each with a bar of height y at every x.
        axes: names and range; low is the foot of the bars.
    """
    xs = [p.x for s in series for p in s.points]
    panel = Panel(label, x_range=(min(xs) - 0.6, max(xs) + 0.6), y_range=(axes.low, axes.high))
    panel.frame(axes)
    width = (panel.x(1) - panel.x(0)) * 0.8 / len(series)
    for index, s in enumerate(series):
        for p in s.points:
            left = panel.x(p.x) + (index - len(series) / 2) * width
            note = f"{s.name}: {p.note}"
            panel.bar(f"bar s{s.slot % NUM_SLOTS}", left, panel.y(p.y), width, panel.y(axes.low) - panel.y(p.y), note)
    return panel.svg()


def interval_chart(label: str, rows: Sequence[str], series: Sequence[Series], axes: Axes) -> Markup:
    """Values with their intervals on a common scale, row by row, and the number at the right.

    Args:
        label: what it shows, for screen readers.
        rows: names, top down.
        series: drafts; a point's x is the number of its row, y its value.
        axes: y_label, low, high and baseline of the scale, which lies on its side; the rest is not used.
    """
    lines = [[(s, p) for s in series for p in s.points if p.x == row] for row in range(len(rows))]
    height = sum(ROW_LABEL + ROW_LINE * len(row) + ROW_GAP for row in lines) + BOTTOM
    panel = Panel(label, x_range=(axes.low, axes.high), height=height, left=8, right=VALUE_WIDTH + 8)
    _draw_scale(panel, axes)
    top = 0
    for name, row in zip(rows, lines, strict=True):
        panel.text("name", panel.left + 6, top + 13, name, "start")
        for line, (s, p) in enumerate(row):
            _draw_interval(panel, s, p, top + ROW_LABEL + ROW_LINE * (line + 0.5), axes.baseline or 0.0)
        top += ROW_LABEL + ROW_LINE * len(row) + ROW_GAP
    return panel.svg()


def _draw_scale(panel: Panel, axes: Axes) -> None:
    foot = panel.height - BOTTOM + 4
    for value in NICE.tick_values(axes.low, axes.high):
        if axes.low <= value <= axes.high + 1e-9:
            panel.line("grid", panel.x(value), 0, panel.x(value), foot)
            panel.text("tick", panel.x(value), foot + 14, f"{value:g}")
    if axes.baseline is not None:
        panel.line("baseline", panel.x(axes.baseline), 0, panel.x(axes.baseline), foot)
    panel.text("axis", (panel.left + panel.right) / 2, panel.height - 3, axes.y_label)


def _draw_interval(panel: Panel, series: Series, point: Point, y: float, baseline: float) -> None:
    css, x = f"s{series.slot % NUM_SLOTS}", panel.x(point.y)
    panel.line(f"track {css}", panel.x(baseline), y, x, y)
    if point.low is not None and point.high is not None:
        panel.line(f"whisker {css}", panel.x(point.low), y, panel.x(point.high), y)
    panel.marker(series.slot, x, y, f"{series.name}: {point.note}")
    panel.text("value", WIDTH - 4, y + 4, f"{point.y:.2f}", "end")


def swatch(slot: int) -> Markup:
    """The mark of a slot as it stands in a legend."""
    panel = Panel("", x_range=(0, 1))
    panel.root.attrib = {"viewBox": "0 0 26 12", "class": "swatch", "aria-hidden": "true"}
    panel.line(f"line s{slot % NUM_SLOTS}", 1, 6, 25, 6)
    panel.marker(slot, 13, 6)
    return panel.svg()


def nice_top(value: float, low: float) -> float:
    """Upper end of an axis that starts at low and holds value.

    >>> nice_top(3.7, 1.0)
    4.0
    """
    return float(NICE.tick_values(low, max(value, low + 0.1))[-1])


def thinned(values: Sequence[float], most: int = 9) -> list[float]:
    """Some of the values, evenly, so that their numbers do not touch."""
    step = -(-len(values) // most)
    return list(values[::step])


def _numbers(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in values.items()}
