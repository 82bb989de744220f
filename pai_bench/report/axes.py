"""Ranges and ticks of axes."""

import math
from collections.abc import Callable, Sequence

from pai_bench.report import names
from pai_bench.report.configurations import Grid, compression
from pai_bench.report.figure import Axis

_NARROWEST = 0.1  # the smallest range of a linear axis: 0.1 % or 0.1 epochs


def linear(label: str, low: float, high: float, least: float = -math.inf, most: float = math.inf) -> Axis:
    """A linear axis around a range. It ends at round numbers, or at the limits `least` and `most`."""
    missing = max(0.0, _NARROWEST - (high - low))
    low, high = low - missing / 2, high + missing / 2
    width = high - low
    step = 10 ** math.floor(math.log10(width / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 6)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    number = round((top - bottom) / step)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((bottom + i * step, f"{bottom + i * step:.{digits}f}") for i in range(number + 1))
    ticks = tuple(tick for tick in ticks if least - 1e-9 <= tick[0] <= most + 1e-9)
    return Axis(label, max(bottom, least), min(top, most), ticks)


def decades(label: str, values: Sequence[float], written: Callable[[float], str]) -> Axis:
    """A logarithmic axis over the positive values. It has a place for zero if some values are zero."""
    positive = [value for value in values if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(positive)) + 1e-9), math.ceil(math.log10(max(positive)) - 1e-9)
    last = max(last, first + 1)
    zero = any(value <= 0 for value in values)
    step = max(1, math.ceil((last - first) / 5))
    ticks = [(10.0**i, written(10.0**i)) for i in range(first, last + 1, step)]
    if zero:
        ticks.insert(0, (10.0 ** (first - step), "0"))
    margin = (10.0**last / ticks[0][0]) ** 0.03
    return Axis(label, ticks[0][0] / margin, 10.0**last * margin, tuple(ticks), True, ticks[0][0] if zero else None)


LEVELS: dict[str, Callable[[float], str]] = {
    "compression": names.compression, "sparsity": names.sparsity, "density": names.density,
}  # fmt: skip


def of_levels(grid: Grid, written: str = "compression") -> Axis:
    """The axis of compression, logarithmic, with ticks at as many levels as there is room for.

    Args:
        written: what the ticks say, a key of LEVELS.
    """
    label = f"{written} of filters" if grid.filters else written
    label += {"compression": " (1 / share kept)" if grid.filters else " (1 / density)"}.get(written, " (log scale)")
    ratios = [compression(level) for level in grid.levels] or [1.0, 10.0]
    low, high = min(ratios), max(ratios)
    low, high = (low / 1.5, high * 1.5) if low == high else (low, high)
    ticks: list[tuple[float, str]] = []
    for level, ratio in zip(grid.levels, ratios, strict=False):
        words = LEVELS[written](level)
        if not ticks or math.log(ratio / ticks[-1][0]) > 0.017 * len(words + ticks[-1][1]) * math.log(high / low):
            ticks.append((ratio, words))
    margin = (high / low) ** (0.12 if len(ratios) < 3 else 0.035)
    return Axis(label, low / margin, high * margin, tuple(ticks), log=True)


_MOST_NAMES = 24  # layers whose names have room at an axis


def of_layers(found: Sequence[str]) -> Axis:
    """An axis for the layers of a network, by their names where these have room, or else by their numbers."""
    if len(found) > _MOST_NAMES:
        return counting("layer, from input to output", len(found))
    ticks = tuple((float(i), name.removesuffix(".weight")) for i, name in enumerate(found, 1))
    return Axis("", 0.5, len(found) + 0.5, ticks, turned=True)


def counting(label: str, last: int) -> Axis:
    """An axis for the whole numbers from 1 to `last`, with at most nine ticks."""
    step = max(1, math.ceil(last / 8))
    ticks = [1, *(i for i in range(step, last + 1, step) if i > 1)]
    return Axis(label, 0.5, last + 0.5, tuple((float(i), str(i)) for i in ticks))
