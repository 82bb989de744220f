"""Figures as PNG and SVG files, for papers and slides."""

import io
from collections.abc import Mapping
from typing import Any

from pai_bench.report.names import Look
from pai_bench.report.plots import Axis, Figure, Lines, Matrix, Series

_MARKERS = {
    "circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "x", "down": "v", "plus": "P", "none": "",
}  # fmt: skip
_DASHES: dict[str, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": ":"}
_DENSE = "#222222"


def files(figure: Figure, looks: Mapping[str, Look]) -> dict[str, bytes]:
    """The figure as a PNG and as an SVG, by suffix; the same figure gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    settings: dict[Any, Any] = {
        "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8.5, "axes.spines.top": False,
        "axes.spines.right": False, "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
        "svg.hashsalt": "pai_bench", "svg.fonttype": "none", "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        draw: Any = _lines if isinstance(figure.panels[0], Lines) else _matrices
        canvas = draw(figure, looks, Canvas)
        FigureCanvasAgg(canvas)
        found: dict[str, bytes] = {}
        for suffix in ("png", "svg"):
            buffer = io.BytesIO()
            if found:
                canvas.set_layout_engine("none")  # the layout stands; finding it again takes as long as drawing
            # Without the date that matplotlib writes by default.
            canvas.savefig(buffer, format=suffix, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
            found[suffix] = buffer.getvalue()
    return found


def _colour(look: Look) -> str:
    return _DENSE if look.colour == "dense" else look.colour


def _lines(figure: Figure, looks: Mapping[str, Look], new: Any) -> Any:
    from matplotlib.lines import Line2D

    panels = [panel for panel in figure.panels if isinstance(panel, Lines)]
    number = len(panels)
    across = min(number, 2 if number in (2, 4) else 3)
    down = -(-number // across)
    columns = 4 if across > 1 else 3
    legend_rows = -(-len(figure.methods) // columns)
    height = 2.45 * down + 0.2 * legend_rows + 0.15
    canvas = new(figsize=(3.3 * across if across > 1 else 4.6, height), layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _axis(axes, "x", panel.x)
        _axis(axes, "y", panel.y)
        for series in panel.series:
            _series(axes, panel, series, looks[series.method])
        if number > 1:
            axes.set_title(panel.title, loc="left")
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in grid[number:]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=_colour(look), linestyle=_DASHES[look.dash], marker=_MARKERS[look.marker], markersize=4.5,
               linewidth=1.5, label=look.label)
        for look in (looks[method] for method in figure.methods)
    ]  # fmt: skip
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.4)
    return canvas


def _series(axes: Any, panel: Lines, series: Series, look: Look) -> None:
    colour, zorder = _colour(look), 2 if series.flat else 3
    points = [(panel.x.shown(point.x), panel.y.shown(point.y)) for point in series.points]
    marker = _MARKERS[look.marker] if series.markers else ""
    drawn: dict[str, Any] = {
        "color": colour, "marker": marker, "markersize": 4.2, "linewidth": 0.8 if series.bars else 1.5,
        "linestyle": _DASHES["dashed" if series.flat else look.dash], "zorder": zorder,
    }  # fmt: skip
    if marker not in ("", "x"):
        drawn |= {"markeredgecolor": "white", "markeredgewidth": 0.5}
    axes.plot(*zip(*points, strict=True), **drawn)
    for piece in series.bands():
        across, lows, highs = zip(*piece, strict=True)
        x = [panel.x.shown(value) for value in across]
        low, high = ([panel.y.shown(value) for value in ends] for ends in (lows, highs))
        if series.bars or len(piece) == 1:
            axes.vlines(x, low, high, color=colour, linewidth=1)
        else:
            axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)


def _axis(axes: Any, which: str, axis: Axis) -> None:
    from matplotlib.ticker import NullLocator

    if axis.log:
        getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(axis.low, axis.high)
    getattr(axes, f"set_{which}ticks")([value for value, _ in axis.ticks], [words for _, words in axis.ticks])
    getattr(axes, f"{which}axis").set_minor_locator(NullLocator())
    getattr(axes, f"set_{which}label")(axis.label)


def _matrices(figure: Figure, looks: Mapping[str, Look], new: Any) -> Any:
    from matplotlib.patches import Rectangle

    panels = [panel for panel in figure.panels if isinstance(panel, Matrix)]
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    letters = 0.062 * max(len(row) for panel in panels for row in panel.rows)
    width = letters + 0.44 * max(len(panel.columns) for panel in panels) + 0.3
    turned = max(len(column) for panel in panels for column in panel.columns) > 6
    above = 0.045 * max(len(column) for panel in panels for column in panel.columns) + 0.3 if turned else 0.3
    height = above + 0.3 * max(len(panel.rows) for panel in panels) + 0.25
    canvas = new(figsize=(max(3.0, width * across), height * down), layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        axes.set(xlim=(0, len(panel.columns)), ylim=(len(panel.rows), 0))
        for i, line in enumerate(panel.squares):
            for j, square in enumerate(line):
                value = square.value or 0.0
                box = {"facecolor": panel.colour, "alpha": value} if square.value is not None else {"facecolor": "0.95"}
                axes.add_patch(Rectangle((j, i), 1, 1, linewidth=0, **box))
                colour = "white" if value > 0.65 else "0.15"
                axes.text(j + 0.5, i + 0.5, square.written, ha="center", va="center", fontsize=7.5, color=colour)
        for j in range(len(panel.columns) + 1):
            axes.axvline(j, color="white", linewidth=1.5)
        for i in range(len(panel.rows) + 1):
            axes.axhline(i, color="white", linewidth=1.5)
        axes.xaxis.tick_top()
        turning: dict[str, Any] = {"rotation": 45, "ha": "left"} if turned else {}
        axes.set_xticks([j + 0.5 for j in range(len(panel.columns))], panel.columns, **turning)
        axes.set_yticks([i + 0.5 for i in range(len(panel.rows))], panel.rows)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(panel.title, loc="left")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return canvas
