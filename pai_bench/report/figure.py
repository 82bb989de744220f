"""A figure as data: axes, lines and matrices, in the units that are shown."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis; a logarithmic one may have a place for zero."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    zero: float | None = None  # where zero, and what lies below that place, is drawn on a logarithmic axis

    def shown(self, value: float) -> float:
        """What is drawn for a value: the value itself, unless a logarithmic axis does not reach it."""
        return max(value, self.zero or self.low) if self.log else value

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(self.shown(value)) - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A value, its band if it has one, and what is said of it."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Series:
    """The points of a method, joined by a line."""

    method: str
    points: tuple[Point, ...]
    markers: bool = True
    flat: bool = False  # one value from end to end: the dense network's
    bars: bool = False  # instead of a band

    def bands(self) -> list[list[tuple[float, float, float]]]:
        """x, low and high of neighbouring points that have a band, in pieces where others lie between them."""
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
    """One place of a matrix; value is a share in [0, 1], None where nothing is known."""

    value: float | None
    written: str
    text: str


@dataclass(frozen=True)
class Matrix:
    """Shares by row and column."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    squares: tuple[tuple[Square, ...], ...]
    colour: str


@dataclass(frozen=True)
class Figure:
    """One figure: its panels share a legend."""

    kind: str
    title: str
    caption: str
    panels: tuple[Lines | Matrix, ...]
    methods: tuple[str, ...] = ()  # of the legend
