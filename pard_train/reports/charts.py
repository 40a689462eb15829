"""Charts: described as data, drawn by matplotlib as SVG for the page and as PNG for Markdown and trackers.

The page's CSS holds the only palette. An SVG refers to it by name (`var(--c0)`), so one drawing fits the light and the
dark scheme. Every series has a color and a marker, so color is never the only cue.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).with_name("templates")
COLORS = dict(re.findall(r"--([\w-]+): (#\w{6})", (TEMPLATES / "page.css").read_text().split("@media")[0]))  # light
VARIABLES = {color: f"var(--{name})" for name, color in COLORS.items()}
NUM_COLORS = 8  # c0 to c7
MARKERS = "os^Dv"
GLYPHS = "●■▲◆▼"  # the same markers as text
WIDTH, HEIGHT = 320, 200  # of a chart, in CSS pixels or points of 1/72 inch
ROW_HEIGHT = 18  # in an interval chart
MARGINS = {"line": (48, 12, 8, 38), "bar": (48, 12, 8, 38), "interval": (14, 44, 2, 38)}  # left, right, top, bottom
NUM_COLUMNS, TITLE_HEIGHT, LEGEND_HEIGHT = 3, 44, 18  # of a PNG; a title has two lines
SETTINGS: dict[Any, Any] = {
    **{"svg.fonttype": "none", "text.parse_math": False, "font.size": 11.5, "axes.titlesize": 11.5, "savefig.dpi": 110},
    **{"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": COLORS["card"]},
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (("major.size", 0), ("major.pad", 6))},
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), COLORS["muted"]),
    **{"text.color": COLORS["text"], "grid.color": COLORS["grid"], "axes.axisbelow": True},
}
DASHED: dict[str, Any] = {"color": COLORS["muted"], "linewidth": 1, "linestyle": "dashed"}


@dataclass(frozen=True)
class Point:
    """A value y at x (in an interval chart the index of the row), with its interval; a ring marks it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    is_marked: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        kind: `line`, `bar`, or `interval`: values with intervals on a common scale, row by row.
        series: points by name.
        limits: range of the values.
        y_label: name of the values; an interval chart shows it at its horizontal axis.
        ticks: numbers of the horizontal axis, unless it is an interval chart.
        baseline: value drawn as a dashed line, such as a speed-up of one.
        rows: names of the rows of an interval chart, from the top.
    """

    title: str
    kind: str
    series: Mapping[str, Sequence[Point]]
    limits: tuple[float, float]
    y_label: str
    x_label: str = ""
    ticks: Sequence[float] = ()
    baseline: float | None = None
    rows: Sequence[str] = ()

    @property
    def height(self) -> float:
        """In CSS pixels."""
        num_lines = 1.4 * len(self.rows) + sum(map(len, self.series.values()))
        return HEIGHT if self.kind != "interval" else sum(MARGINS[self.kind][2:]) + ROW_HEIGHT * num_lines


def assign_styles(charts: Iterable[Chart]) -> dict[str, int]:
    """The number of a color and marker for every series name, the same in all charts."""
    return {name: number for number, name in enumerate(dict.fromkeys(name for c in charts for name in c.series))}


def legend_of(charts: Iterable[Chart], styles: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Name, CSS class and marker as text of every series."""
    numbers = {name: styles[name] for name in assign_styles(charts)}
    return [(name, f"c{n % NUM_COLORS}", GLYPHS[n % len(GLYPHS)]) for name, n in numbers.items()]


def draw_svg(chart: Chart, styles: Mapping[str, int]) -> Markup:
    """A chart as an inline SVG element: text stays text, and the colors are variables of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    with _settings(salt=str(chart)):
        figure = Figure(figsize=(WIDTH / 72, chart.height / 72))
        _draw(figure, chart, styles)
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    content = re.sub(r"\s*\n\s*", " ", file.getvalue()).split("</defs>", 1)[1]  # without the head and its style sheet
    content = re.sub("<[^>]*>", lambda tag: _slim(tag[0]), content)  # tags only: texts have no unescaped <
    label = escape(f"{chart.title}: {chart.y_label}")
    return Markup(f'<svg viewBox="0 0 {WIDTH} {chart.height:g}" role="img" aria-label="{label}">{content}')


def _slim(tag: str) -> str:
    """A tag with the page's colors and short numbers, without ids that nothing refers to."""
    tag = re.sub(r' id="\w[\w.]*_\d+"| transform="rotate\(-0[^"]*"|font-family: [^;"]*;? ?', "", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag.replace("xlink:href", "href"))
    return re.sub("#[0-9a-f]{6}", lambda color: VARIABLES.get(color[0], color[0]), tag)


def write_png(parts: Sequence[Sequence[Chart]], path: Path) -> None:
    """Write charts as one picture with a legend; every part starts a new row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles = assign_styles(chart for part in parts for chart in part)
    rows = [part[start : start + NUM_COLUMNS] for part in parts for start in range(0, len(part), NUM_COLUMNS)]
    tops: list[float] = [LEGEND_HEIGHT * (len(styles) + 1)]
    for row in rows:
        tops.append(tops[-1] + TITLE_HEIGHT + max(chart.height for chart in row))
    with _settings():
        figure = Figure(figsize=(WIDTH * max(map(len, rows)) / 72, tops[-1] / 72))
        for top, row in zip(tops, rows, strict=False):
            for column, chart in enumerate(row):
                axes = _draw(figure, chart, styles, left=column * WIDTH, top=top + TITLE_HEIGHT)
                axes.set_title(textwrap.fill(chart.title, 36), loc="left", fontweight="bold")
        handles = [Line2D([], [], label=name, **_look(number)) for name, number in styles.items()]
        figure.legend(handles=handles, loc="upper left", frameon=False)
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


@contextmanager
def _settings(*, salt: str = "") -> Iterator[None]:
    """Draw with our settings; the ids in an SVG follow from the salt."""
    import matplotlib

    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has more fonts
        yield


def _look(number: int) -> dict[str, Any]:
    """Color and marker of a series."""
    color, marker = COLORS[f"c{number % NUM_COLORS}"], MARKERS[number % len(MARKERS)]
    edge = {"markeredgecolor": COLORS["card"], "markeredgewidth": 0.8}
    return {"color": color, "marker": marker, "markersize": 6.5, "linewidth": 2, "clip_on": False, **edge}


def _draw(figure: Figure, chart: Chart, styles: Mapping[str, int], *, left: float = 0, top: float = 0) -> Axes:
    """Add a chart to a figure, so many points from its upper left corner."""
    from matplotlib.ticker import FixedLocator

    width, height = 72 * figure.get_size_inches()
    margins = MARGINS[chart.kind]
    inner_width, inner_height = WIDTH - margins[0] - margins[1], chart.height - margins[2] - margins[3]
    corner = (left + margins[0]) / width, 1 - (top + margins[2] + inner_height) / height
    axes = figure.add_axes((*corner, inner_width / width, inner_height / height))
    looks = {name: _look(styles[name]) for name in chart.series}
    if chart.kind == "interval":
        _draw_intervals(axes, chart, looks)
        axes.set(xlim=chart.limits, xlabel=chart.y_label, yticks=[])
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=5)
    else:
        {"line": _draw_lines, "bar": _draw_bars}[chart.kind](axes, chart, looks)
        axes.set(ylim=chart.limits, xlabel=chart.x_label, ylabel=chart.y_label)
        axes.xaxis.set_major_locator(FixedLocator(chart.ticks, nbins=9))
        axes.grid(axis="y")
        axes.locator_params(axis="y", nbins=5)
        if not 0.01 <= abs(chart.limits[1]) < 1e5:  # more digits than fit into the margin
            axes.yaxis.set_major_formatter(lambda y, _: re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{y:.2e}") if y else "0")
    return axes


def _draw_lines(axes: Axes, chart: Chart, looks: Mapping[str, dict[str, Any]]) -> None:
    """Lines with their intervals as bands."""
    for name, points in chart.series.items():
        color = looks[name]["color"]
        band = np.array([(p.x, p.low, p.high) for p in points if p.low is not None]).reshape(-1, 3)
        axes.fill_between(*band.T, color=color, alpha=0.14, linewidth=0)
        axes.plot([p.x for p in points], [p.y for p in points], **looks[name], markevery=1 + len(points) // 20)
        for p in points:
            if p.is_marked:
                axes.plot(p.x, p.y, "o", markersize=14, fillstyle="none", color=color, clip_on=False)
    if chart.baseline is not None:
        axes.axhline(chart.baseline, **DASHED)


def _draw_bars(axes: Axes, chart: Chart, looks: Mapping[str, dict[str, Any]]) -> None:
    """Bars side by side, in the order of the series, at every whole x."""
    width = 0.8 / len(chart.series)
    for number, (name, points) in enumerate(chart.series.items()):
        places = [p.x + (number - (len(chart.series) - 1) / 2) * width for p in points]
        heights, color = [p.y for p in points], looks[name]["color"]
        axes.bar(places, heights, width, color=color, edgecolor=COLORS["card"], linewidth=0.5)


def _draw_intervals(axes: Axes, chart: Chart, looks: Mapping[str, dict[str, Any]]) -> None:
    """Below every row's name one line per series: from the baseline to the value, the interval, the value as text."""
    y, baseline = 0.0, chart.baseline or 0.0
    place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    for row, title in enumerate(chart.rows):
        axes.annotate(" ".join(title.split()), (chart.limits[0], y), fontweight="bold", **place)
        for name, p in [(name, p) for name, points in chart.series.items() for p in points if p.x == row]:
            y += 1
            color = looks[name]["color"]
            axes.hlines(y, baseline, p.y, color=color, linewidth=1.2, alpha=0.35)
            if p.low is not None and p.high is not None:
                axes.hlines(y, p.low, p.high, color=color, linewidth=4, alpha=0.45)
            axes.plot(p.y, y, **looks[name])
            axes.text(1.04, y, f"{p.y:.2f}", va="center", transform=axes.get_yaxis_transform())
        y += 1.4
    axes.set_ylim(y - 0.7, -0.7)
    axes.axvline(baseline, **DASHED)
