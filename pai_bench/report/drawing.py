"""Draws figures with matplotlib: PNG, PDF and SVG files, and the SVG inside the page."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pai_bench.report import inline
from pai_bench.report.figure import Axis, Figure, Lines, Matrix, Series
from pai_bench.report.inline import GROUND, INK, LINE, QUIET, RAISED
from pai_bench.report.names import Look

_MARKERS = {
    "circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "x", "down": "v", "plus": "P", "none": "",
}  # fmt: skip
_DASHES: dict[str, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": ":"}
_LEGEND = "legend"  # id of the legend in the SVG
_APART = 4.0  # points between the bars of two methods at one compression
_ON_COLOUR = "#fafafa"  # text on a dark square; it does not follow the style of the page
_SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "figure.dpi": 72,  # the unit of the SVG, so that the canvas and the SVG have the same coordinates
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "figure.constrained_layout.w_pad": 0.07,  # letters are a little wider in a PNG than on the canvas
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # letters stay letters, which journals ask for
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Drawing:
    """One figure in all its forms.

    The same figure with the same name gives the same bytes.
    """

    svg: bytes
    png: bytes | None
    pdf: bytes | None
    inline: str  # SVG for the page
    points: str  # [x, y, method, text] of every value, as JSON that is safe within HTML; x and y as in the SVG


@dataclass
class _Canvas:
    """A matplotlib figure, and the facts about it that the page needs."""

    figure: Any
    # axes, x, y, how far to the right in points, method, text
    values: list[tuple[Any, float, float, float, str, str]] = field(default_factory=list)
    methods: dict[str, str] = field(default_factory=dict)  # by the id of a group of the SVG
    legend: Any = None

    def belongs(self, artist: Any, method: str) -> None:
        """Marks a drawn object as part of a method, so that the page can hide it."""
        name = f"series_{len(self.methods) + 1}"
        artist.set_gid(name)
        self.methods[name] = method


def draw(figure: Figure, looks: Mapping[str, Look], name: str, with_images: bool = True) -> Drawing:
    """Draws a figure once.

    Args:
        name: the name of the figure. Ids inside the SVG come from it, so all figures of a page need different names.
        with_images: whether to make a PNG and a PDF too.
    """
    import matplotlib

    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}):
        canvas = _lines(figure, looks) if isinstance(figure.panels[0], Lines) else _matrices(figure)
        svg = _saved(canvas.figure, "svg")
        points = _points(canvas)
        cropped = min(axes.get_tightbbox().y0 for axes in canvas.figure.axes) - 2 if canvas.legend else 0.0
        # The layout is done. Computing it again would take as long as drawing.
        canvas.figure.set_layout_engine("none")
        png, pdf = (_saved(canvas.figure, suffix) if with_images else None for suffix in ("png", "pdf"))
    words = "; ".join([figure.title, *(panel.title for panel in figure.panels)])
    on_page = inline.figure(svg, words, canvas.methods, {_LEGEND}, cropped)
    return Drawing(
        svg, png, pdf, on_page, json.dumps(points, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    )


def swatch(look: Look, name: str) -> str:
    """An SVG symbol with this name for the legends of the page: a short line with the marker of a method."""
    import matplotlib
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.lines import Line2D

    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}):
        figure = NewFigure(figsize=(30 / 72, 14 / 72), facecolor="none")
        figure.add_artist(Line2D([0.04, 0.5, 0.96], [0.5] * 3, markevery=[1], **_style(look, markersize=6.5)))
        return inline.symbol(_saved(figure, "svg"), name)


def _saved(figure: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    # Without the date, so that the same figure gives the same bytes.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
    figure.savefig(buffer, format=suffix, dpi=200, metadata=undated)
    return buffer.getvalue()


def _points(canvas: _Canvas) -> list[list[Any]]:
    """The values that the pointer can find: those inside their axes."""
    height = canvas.figure.bbox.height
    found: list[list[Any]] = []
    for axes, x, y, right, method, text in canvas.values:
        across, up = axes.transData.transform((x, y))
        if axes.bbox.y0 - 3 <= up <= axes.bbox.y1 + 3:
            found.append([round(float(across) + right, 1), round(float(height - up), 1), method, text])
    return found


def _style(look: Look, markers: bool = True, markersize: float = 4.2, linewidth: float = 1.5) -> dict[str, Any]:
    marker = _MARKERS[look.marker] if markers else ""
    style: dict[str, Any] = {
        "color": _colour(look),
        "marker": marker,
        "markersize": markersize,
        "linewidth": linewidth,
        "linestyle": _DASHES[look.dash],
    }
    if marker not in ("", "x"):
        style |= {"markeredgecolor": GROUND, "markeredgewidth": 0.5}
    return style


def _colour(look: Look) -> str:
    return INK if look.colour == "dense" else look.colour


# Lines ----------------------------------------------------------------------------------------------------------------


def _lines(figure: Figure, looks: Mapping[str, Look]) -> _Canvas:
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.lines import Line2D

    panels = [panel for panel in figure.panels if isinstance(panel, Lines)]
    number = len(panels)
    across = min(number, 2 if number in (2, 4) else 3)
    down = -(-number // across)
    width = 3.3 * across if across > 1 else 4.6
    columns = _columns([looks[method].label for method in figure.methods], 4 if across > 1 else 3, 72 * width)
    legend_rows = -(-len(figure.methods) // columns)
    height = 2.45 * down + 0.2 * legend_rows + 0.15
    canvas = _Canvas(NewFigure(figsize=(width, height), layout="constrained"))
    grid = canvas.figure.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _axis(axes, "x", panel.x)
        _axis(axes, "y", panel.y)
        barred = [series for series in panel.series if series.bars]
        places = [point.x for series in barred for point in series.points]
        beside = barred if len(set(places)) < len(places) else []  # where bars would cover each other
        for series in panel.series:
            right = _APART * (beside.index(series) - (len(beside) - 1) / 2) if series in beside else 0.0
            _series(canvas, axes, panel, series, looks[series.method], right)
        if panel.title:
            axes.set_title(panel.title, loc="left")
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in grid[number:]:
        axes.set_visible(False)
    shown = [looks[method] for method in figure.methods]
    handles = [Line2D([], [], label=look.label, **_style(look, markersize=4.5)) for look in shown]
    canvas.legend = canvas.figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.4
    )
    canvas.legend.set_gid(_LEGEND)
    return canvas


def _columns(labels: Sequence[str], most: int, width: float) -> int:
    """In how many columns a legend fits into a width in points. matplotlib fills one column after the other."""
    letter, beside = 0.62 * _SETTINGS["font.size"], 5.5 * _SETTINGS["font.size"]  # the line, and the gap after an entry
    for columns in range(min(most, len(labels)), 1, -1):
        longer, shorter = len(labels) % columns, len(labels) // columns
        ends = [min(i, longer) + i * shorter for i in range(columns + 1)]
        if sum(letter * max(map(len, labels[a:b])) + beside for a, b in pairwise(ends)) <= width:
            return columns
    return 1


def _series(canvas: _Canvas, axes: Any, panel: Lines, series: Series, look: Look, right: float) -> None:
    """Draws the line and the markers of a method, and its bands or bars.

    Args:
        right: how far to the right of their places, in points, so that bars do not cover each other.
    """
    from matplotlib.transforms import ScaledTranslation

    moved = axes.transData + ScaledTranslation(right / 72, 0, canvas.figure.dpi_scale_trans)
    points = [(panel.x.shown(point.x), panel.y.shown(point.y), point.text) for point in series.points]
    style = _style(look, series.markers, linewidth=0.8 if series.bars or series.thin else 1.5)
    if series.flat:
        style["linestyle"] = _DASHES["dashed"]
    (line,) = axes.plot(
        [x for x, _, _ in points], [y for _, y, _ in points], zorder=2 if series.flat else 3, transform=moved, **style
    )
    canvas.belongs(line, series.method)
    canvas.values += [(axes, x, y, right, series.method, text) for x, y, text in points]
    for piece in series.bands():
        across, lows, highs = zip(*piece, strict=True)
        x = [panel.x.shown(value) for value in across]
        low, high = ([panel.y.shown(value) for value in ends] for ends in (lows, highs))
        if series.bars or len(piece) == 1:
            band = axes.vlines(x, low, high, color=_colour(look), linewidth=1, transform=moved)
        else:
            band = axes.fill_between(x, low, high, color=_colour(look), alpha=0.14, linewidth=0)
        canvas.belongs(band, series.method)


def _axis(axes: Any, which: str, axis: Axis) -> None:
    from matplotlib.ticker import NullLocator

    if axis.log:
        getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(axis.low, axis.high)
    getattr(axes, f"set_{which}ticks")([value for value, _ in axis.ticks], [words for _, words in axis.ticks])
    if axis.turned:
        axes.tick_params(axis=which, rotation=90, labelsize=6.5)
    getattr(axes, f"{which}axis").set_minor_locator(NullLocator())
    getattr(axes, f"set_{which}label")(axis.label)


# Matrices -------------------------------------------------------------------------------------------------------------


def _matrices(figure: Figure) -> _Canvas:
    from matplotlib.figure import Figure as NewFigure

    panels = [panel for panel in figure.panels if isinstance(panel, Matrix)]
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    widest = max(len(column) for panel in panels for column in panel.columns)
    turned = widest > 6
    left = 0.062 * max(len(row) for panel in panels for row in panel.rows)
    width = left + 0.44 * max(len(panel.columns) for panel in panels) + 0.3 + (0.045 * widest if turned else 0)
    width = max(width, left + 0.085 * max(len(panel.title) for panel in panels))
    above = 0.3 + (0.045 * widest if turned else 0)
    height = above + 0.3 * max(len(panel.rows) for panel in panels) + 0.25
    canvas = _Canvas(NewFigure(figsize=(max(3.0, width * across), height * down), layout="constrained"))
    grid = canvas.figure.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _matrix(canvas, axes, panel, turned)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return canvas


def _matrix(canvas: _Canvas, axes: Any, panel: Matrix, turned: bool) -> None:
    from matplotlib.colors import to_rgba

    axes.set(xlim=(0, len(panel.columns)), ylim=(len(panel.rows), 0))
    colours = [
        [
            to_rgba(GROUND)
            if square.empty
            else to_rgba(RAISED)
            if square.value is None
            else to_rgba(panel.colour, max(0.06, square.value))  # zero is a square, too
            for square in line
        ]
        for line in panel.squares
    ]
    axes.pcolormesh(colours, edgecolors=GROUND, linewidth=1.5)
    for i, line in enumerate(panel.squares):
        for j, square in enumerate(line):
            if not square.written:
                continue
            colour = _ON_COLOUR if (square.value or 0) > 0.65 else INK
            words = axes.text(j + 0.5, i + 0.5, square.written, ha="center", va="center", fontsize=7.5, color=colour)
            words.set_in_layout(False)  # these texts lie inside the axes, and measuring all of them takes long
            if square.text:
                canvas.values.append((axes, j + 0.5, i + 0.5, 0.0, "", square.text))
    axes.xaxis.tick_top()
    turning: dict[str, Any] = {"rotation": 45, "ha": "left"} if turned else {}
    axes.set_xticks([j + 0.5 for j in range(len(panel.columns))], panel.columns, **turning)
    axes.set_yticks([i + 0.5 for i in range(len(panel.rows))], panel.rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(panel.title, loc="left")
