"""Figures as SVG for the page: drawn once, coloured by its style sheet, with a list of what the pointer finds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pai_bench.report.names import Look
from pai_bench.report.plots import Axis, Lines, Matrix, Series

WIDTH, NARROW = 480, 350
_HEIGHT = 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 28, 46
_SQUARE = 30
_LETTER = 6.4  # width of a letter of a label


@dataclass(frozen=True)
class Drawn:
    """One panel: its SVG, and [x, y, method, text] of every value, as JSON that is safe within HTML."""

    svg: str
    points: str


def panel(drawn: Lines | Matrix, looks: Mapping[str, Look], width: int = WIDTH) -> Drawn:
    """Draws a panel.

    Args:
        width: of a panel with lines, in the units in which its letters are 12 high.
    """
    return _lines(drawn, looks, width) if isinstance(drawn, Lines) else _matrix(drawn)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _text(x: float, y: float, words: str, anchor: str = "middle", style: str = "", turn: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    turned = f' transform="{turn}"' if turn else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{kind}{turned}>{escape(words)}</text>'


def _n(number: float) -> str:
    """A coordinate to a tenth."""
    return f"{number:.1f}".removesuffix(".0")


def _colour(look: Look) -> str:
    return "currentColor" if look.colour == "dense" else look.colour


_DASH = {"solid": "", "dashed": ' stroke-dasharray="6 4"', "dotted": ' stroke-dasharray="1.5 3.5"'}


def _mark(x: float, y: float, look: Look, r: float = 3.6) -> str:
    """The marker of a method around a point."""
    shapes: dict[str, list[tuple[float, float]]] = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
        "down": [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    }
    if look.marker == "none":
        return ""
    if look.marker == "circle":
        return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{r}"/>'
    if look.marker in shapes:
        corners = " ".join(f"{_n(x + 0.9 * r * dx)},{_n(y + 0.9 * r * dy)}" for dx, dy in shapes[look.marker])
        return f'<polygon points="{corners}"/>'
    ends = [(-1, -1, 1, 1), (-1, 1, 1, -1)] if look.marker == "cross" else [(-1.2, 0, 1.2, 0), (0, -1.2, 0, 1.2)]
    path = "".join(f"M{_n(x + r * a)} {_n(y + r * b)}L{_n(x + r * c)} {_n(y + r * d)}" for a, b, c, d in ends)
    return f'<path d="{path}" stroke="{_colour(look)}" stroke-width="2" fill="none"/>'


def swatch(look: Look) -> str:
    """A short line with a method's marker, for the legend."""
    colour = _colour(look)
    line = f'<line x1="1" y1="7" x2="29" y2="7" stroke="{colour}" stroke-width="2"{_DASH[look.dash]}/>'
    mark = f'<g fill="{colour}">{_mark(15, 7, look, 4)}</g>'
    return f'<svg width="30" height="14" viewBox="0 0 30 14" aria-hidden="true">{line}{mark}</svg>'


def _lines(drawn: Lines, looks: Mapping[str, Look], width: int) -> Drawn:
    right, bottom = width - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + drawn.x.place(x) * (right - _LEFT)
        up = bottom - drawn.y.place(y) * (bottom - _TOP)
        return across, up

    parts = [_text(_LEFT, 15, drawn.title, "start", "title")]
    parts += _frame(drawn.x, drawn.y, right, bottom)
    points: list[list[Any]] = []
    groups = [_series(series, looks[series.method], at, points, (_TOP, bottom)) for series in drawn.series]
    box = f"{_LEFT - 5} {_TOP - 5} {right - _LEFT + 10} {bottom - _TOP + 10}"
    left, top, across, down = box.split()
    # An inner SVG cuts off what lies outside of it.
    inner = f'<svg x="{left}" y="{top}" width="{across}" height="{down}" viewBox="{box}">'
    parts.append(f"{inner}{''.join(groups)}</svg>")
    words = f"{drawn.title}: {drawn.y.label} against {drawn.x.label}"
    return Drawn(_framed(width, _HEIGHT, words, parts), _json(points))


def _frame(x: Axis, y: Axis, right: float, bottom: float) -> list[str]:
    parts = []
    for value, words in y.ticks:
        up = bottom - y.place(value) * (bottom - _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{_n(up)}" x2="{_n(right)}" y2="{_n(up)}"/>')
        parts.append(_text(_LEFT - 7, up + 4, words, "end", "tick"))
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{_n(bottom)}" x2="{_n(right)}" y2="{_n(bottom)}"/>')
    for value, words in x.ticks:
        across = _LEFT + x.place(value) * (right - _LEFT)
        parts.append(f'<path class="axis" d="M{_n(across)} {_n(bottom)}v4"/>')
        parts.append(_text(across, bottom + 17, words, "middle", "tick"))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 7, x.label, "middle", "label"))
    middle = (_TOP + bottom) / 2
    parts.append(_text(12, middle, y.label, "middle", "label", f"rotate(-90 12 {_n(middle)})"))
    return parts


def _series(series: Series, look: Look, at: Any, points: list[list[Any]], inside: tuple[float, float]) -> str:
    """One method's band or bars, line and markers; adds to `points` what the pointer finds."""
    colour = _colour(look)
    places = [(at(point.x, point.y), point) for point in series.points]
    parts = []
    for piece in series.bands():
        lows, highs = [at(x, low) for x, low, _ in piece], [at(x, high) for x, _, high in piece]
        if series.bars or len(piece) == 1:
            bars = "".join(f"M{_n(x)} {_n(y)}V{_n(top)}" for (x, y), (_, top) in zip(lows, highs, strict=True))
            parts.append(f'<path d="{bars}" stroke="{colour}" stroke-width="1.2" fill="none"/>')
        else:
            outline = " ".join(f"{_n(x)},{_n(y)}" for x, y in [*highs, *reversed(lows)])
            parts.append(f'<polygon points="{outline}" fill="{colour}" opacity="0.14"/>')
    path = " ".join(f"{_n(x)},{_n(y)}" for (x, y), _ in places)
    width = 1 if series.bars else 1.8
    dash = _DASH["dashed"] if series.flat else _DASH[look.dash]
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')
    if series.markers:
        marks = "".join(_mark(x, y, look) for (x, y), _ in places)
        parts.append(f'<g class="marks" fill="{colour}">{marks}</g>')
    for (x, y), point in places:
        if inside[0] - 4 <= y <= inside[1] + 4:
            points.append([round(x, 1), round(y, 1), series.method, point.text])
    return f'<g data-method="{escape(series.method)}">{"".join(parts)}</g>'


def _matrix(drawn: Matrix) -> Drawn:
    left = 14 + _LETTER * max(map(len, drawn.rows))
    columns = [_LETTER * len(column) for column in drawn.columns]
    turned = max(columns) > _SQUARE
    width_of_square = max(_SQUARE, 38)
    top = 30 + (0.72 * max(columns) + 8 if turned else 14)
    right = left + width_of_square * len(drawn.columns)
    room = 0.72 * columns[-1] if turned else 0
    parts = [_text(4, 15, drawn.title, "start", "title")]
    points: list[list[Any]] = []
    for j, column in enumerate(drawn.columns):
        x = left + (j + 0.5) * width_of_square
        if turned:
            parts.append(_text(x, top - 6, column, "start", "tick", f"rotate(-45 {_n(x)} {_n(top - 6)})"))
        else:
            parts.append(_text(x, top - 7, column, "middle", "tick"))
    for i, row in enumerate(drawn.rows):
        y = top + i * _SQUARE
        parts.append(_text(left - 8, y + _SQUARE / 2 + 4, row, "end", "tick"))
        for j, square in enumerate(drawn.squares[i]):
            x = left + j * width_of_square
            middle = (x + width_of_square / 2, y + _SQUARE / 2)
            box = f'x="{_n(x + 1)}" y="{_n(y + 1)}" width="{width_of_square - 2}" height="{_SQUARE - 2}" rx="3"'
            if square.value is None:
                parts.append(f'<rect class="empty" {box}/>')
            else:
                parts.append(f'<rect class="ground" {box}/>')
                parts.append(f'<rect fill="{drawn.colour}" fill-opacity="{square.value:.3f}" {box}/>')
            strong = "tick strong" if (square.value or 0) > 0.65 else "tick value"
            parts.append(_text(middle[0], middle[1] + 4, square.written, "middle", strong))
            if square.text and square.written:
                points.append([round(middle[0], 1), round(middle[1], 1), "", square.text])
    size = (max(right + room + 10, 30 + _LETTER * len(drawn.title)), top + _SQUARE * len(drawn.rows) + 6)
    return Drawn(_framed(*size, drawn.title, parts), _json(points))


def _framed(width: float, height: float, words: str, parts: Sequence[str]) -> str:
    widest = 1.35 * width if width == WIDTH else 1.12 * width
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" style="max-width:{_n(widest)}px" role="img" tabindex="0" '
        f'aria-label="{escape(words)}">{"".join(parts)}<circle class="here" r="7" cx="-20" cy="-20"/></svg>'
    )
