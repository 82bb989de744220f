"""Rows of figures, each with the target that it has to reach, and the tables made of them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure. A ratio is how many times faster the product is, unless `at_most` says that less is better."""

    name: str
    figure: float
    unit: str = "x"
    target: float | None = None  # what the figure has to reach
    goal: float | None = None  # where it could be
    at_most: bool = False
    exact: bool | None = None  # whether what was claimed to be equal is equal
    time: float | None = None  # seconds of the product's side
    lower_bound: float | None = None  # seconds in which the operations and bytes that it takes could be done at best
    note: str = ""
    timed: bool = True  # a target of something counted holds at any size and under any load

    def passed(self, speed: bool = True) -> bool:
        """Whether the figure reaches its target, and what is claimed to be equal is.

        Args:
            speed: judge what was timed, too.
        """
        if self.exact is False:
            return False
        if self.target is None or (self.timed and not speed):
            return True
        return self.figure <= self.target if self.at_most else self.figure >= self.target

    def cells(self, speed: bool = True) -> list[str]:
        """What stands in the columns of a table."""
        sign = "<=" if self.at_most else ">="
        judged = self.target is not None and (speed or not self.timed)
        verdict = "missed" if not self.passed(speed) else "ok" if judged or self.exact else ""
        exact = "" if self.exact is None else "yes" if self.exact else "NO"
        return [
            self.name,
            _number(self.figure) + (self.unit if self.unit == "x" else f" {self.unit}".rstrip()),
            "" if self.target is None else f"{sign} {self.target:g}",
            "" if self.goal is None else f"{self.goal:g}",
            _duration(self.time),
            _duration(self.lower_bound),
            exact,
            verdict,
            self.note,
        ]


HEADINGS = ["", "figure", "target", "goal", "time", "lower bound", "exact", "verdict", ""]
RULE = "| --- |" + " ---: |" * 5 + " --- |" * 3


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.3g}"


def _duration(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.2g} us"


def line(row: Row, speed: bool = True) -> str:
    """A row by itself: its name, its figure, what it has to reach, and whether it does."""
    name, figure, target, _, _, _, _, verdict, _ = row.cells(speed)
    return "  ".join(filter(None, [f"{name}:", figure, target and f"({target})", verdict]))


def text(rows: Sequence[Row], speed: bool = True) -> str:
    """The table for a terminal."""
    lines = [HEADINGS, *(row.cells(speed) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def markdown(rows: Sequence[Row], machine: dict[str, str], command: str) -> str:
    """The table as a page, with the machine that it was taken on and the command that wrote it."""
    lines = [
        "# Figures of one machine",
        "",
        f"Written by `{command}`; [performance.md](performance.md#measuring) says how to read it.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", f"| {' | '.join(HEADINGS)} |", RULE]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row.cells())} |" for row in rows]
    return "\n".join(lines) + "\n"
