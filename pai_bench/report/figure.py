"""A figure as data: axes, lines and matrices, in the units of the picture."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis. A logarithmic axis may have a place for zero."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    zero: float | None = None  # on a logarithmic axis: zero and all smaller values are drawn here
    turned: bool = False  # whether the words at the ticks are turned, because they are long

    def shown(self, value: float) -> float:
        """The value to draw: the value itself, or the end of a logarithmic axis that does not reach it."""
        return max(value, self.zero or self.low) if self.log else value

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(self.shown(value)) - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A value, its band if it has one, and its description."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Series:
    """The points of a method. A line joins them."""

    method: str
    points: tuple[Point, ...]
    markers: bool = True
    flat: bool = False  # a horizontal line: the dense network
    bars: bool = False  # bars instead of a band
    thin: bool = False  # a thin line: it joins points for the eye, and there is nothing between them

    def bands(self) -> list[list[tuple[float, float, float]]]:
        """x, low and high of the points with a band. Points without a band split them into pieces."""
        pieces: list[list[tuple[float, float, float]]] = [[]]
        for point in self.points:
            if point.low is None or point.high is None:
                pieces.append([])
            else:
                pieces[-1].append((point.x, point.low, point.high))
        return [piece for piece in pieces if piece]


@dataclass(frozen=True)
class Lines:
    """Lines over two axes."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Square:
    """One square of a matrix. The value is a share in [0, 1], or None if nothing is known."""

    value: float | None
    written: str
    text: str
    empty: bool = False  # whether it is no square at all, but ground


@dataclass(frozen=True)
class Matrix:
    """Shares, by row and column."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    squares: tuple[tuple[Square, ...], ...]
    colour: str


@dataclass(frozen=True)
class Figure:
    """One figure. Its panels share a legend."""

    kind: str
    title: str
    caption: str
    panels: tuple[Lines | Matrix, ...]
    methods: tuple[str, ...] = ()  # in the legend
