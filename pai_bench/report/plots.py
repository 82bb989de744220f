"""Cells -> figures as data: axes, lines and matrices in the units that are shown, whoever draws them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pai_bench.report import evidence, names
from pai_bench.report.cells import Cell, Grid, compression, spread
from pai_bench.report.evidence import Layer, Measured, Overlap, Unreadable
from pai_bench.report.names import Look

COSTS = {"examples": "images", "flops": "FLOPs", "seconds": "seconds"}
_MOST_IN_MATRIX = 24  # methods
_NARROWEST = 0.1  # range of a linear axis: a tenth of a percent, or of an epoch


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


# Axes -----------------------------------------------------------------------------------------------------------------


def _linear(label: str, low: float, high: float, least: float = -math.inf, most: float = math.inf) -> Axis:
    """A linear axis from one round number to another around a range, but not beyond what is possible."""
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


def _decades(label: str, values: Sequence[float], written: Callable[[float], str]) -> Axis:
    """A logarithmic axis over the positive values, with a place for zero where some are zero."""
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


def _of_compression(grid: Grid) -> Axis:
    """The axis of compression, with a tick at the levels, as many as there is room for."""
    label = "compression of filters (1 / share kept)" if grid.filters else "compression (1 / density)"
    ratios = [compression(level) for level in grid.levels] or [1.0, 10.0]
    low, high = min(ratios), max(ratios)
    low, high = (low / 1.5, high * 1.5) if low == high else (low, high)
    ticks: list[tuple[float, str]] = []
    for level, ratio in zip(grid.levels, ratios, strict=False):
        words = names.compression(level)
        if not ticks or math.log(ratio / ticks[-1][0]) > 0.017 * len(words + ticks[-1][1]) * math.log(high / low):
            ticks.append((ratio, words))
    margin = (high / low) ** 0.035
    return Axis(label, low / margin, high * margin, tuple(ticks), log=True)


# What is said of a point ----------------------------------------------------------------------------------------------


def said(cell: Cell, label: str) -> str:
    """A cell in words: method, compression, mean, standard deviation, number of seeds, and which."""
    lines = [label if cell.dense else f"{label} at {names.compression(cell.sparsity)}"]
    if cell.mean is None:
        lines.append("no trained run")
    else:
        deviation = f" ± {names.percent(cell.sd)} (sd)" if cell.sd is not None else ""
        lines.append(f"{names.percent(cell.mean)} %{deviation}")
        lines.append(f"n = {cell.n}: {_seeds(list(cell.values))}")
    if cell.untrained:
        lines.append(f"not trained: {_seeds(cell.untrained)}")
    return "\n".join(lines)


def _seeds(seeds: Sequence[int]) -> str:
    shown = ", ".join(map(str, seeds[:12])) + (", ..." if len(seeds) > 12 else "")
    return f"seed {shown}" if len(seeds) == 1 else f"seeds {shown}"


def _point(x: float, cell: Cell, text: str) -> Point:
    mean, sd = 100 * (cell.mean or 0.0), cell.sd
    if sd is None:
        return Point(x, mean, None, None, text)
    return Point(x, mean, max(0.0, mean - 100 * sd), min(100.0, mean + 100 * sd), text)


def _from_measured(x: float, value: Measured, text: str) -> Point:
    if value.sd is None:
        return Point(x, 100 * value.mean, None, None, text)
    low, high = max(0.0, value.mean - value.sd), min(1.0, value.mean + value.sd)
    return Point(x, 100 * value.mean, 100 * low, 100 * high, text)


def _extent(series: Sequence[Series]) -> tuple[float, float]:
    ends = [end for line in series for p in line.points for end in (p.y, p.low, p.high) if end is not None]
    return (min(ends), max(ends)) if ends else (0.0, 100.0)


_BAND = "Lines are means over seeds, bands one sample standard deviation to either side"


# Figures --------------------------------------------------------------------------------------------------------------


def accuracy(grid: Grid, looks: Mapping[str, Look]) -> Figure | None:
    """Accuracy against compression, and once more from near the top where some methods fall far below."""
    series = []
    for method in grid.methods:
        cells = [cell for (name, _), cell in sorted(grid.cells.items(), key=lambda item: item[0][1]) if name == method]
        points = [_point(c.compression, c, said(c, looks[method].label)) for c in cells if c.mean is not None]
        if points:
            series.append(Series(method, tuple(points)))
    if not series:
        return None
    x = _of_compression(grid)
    for cell in grid.dense:
        if cell.mean is not None:
            points = [_point(end, cell, said(cell, looks[cell.method].label)) for end in (x.low, x.high)]
            series.insert(0, Series(cell.method, tuple(points), markers=False, flat=True))
    low, high = _extent(series)
    label = "test accuracy (%)"
    panels = [Lines("all", x, _linear(label, low, high, 0, 100), tuple(series))]
    best = max(point.y for line in series for point in line.points)
    if best - low > 20:
        near = [p for line in series for p in line.points if p.y > best - 10]
        bottom = min([p.low if p.low is not None else p.y for p in near] + [best - 1])
        top = max(p.high if p.high is not None else p.y for p in near)
        y = _linear(label, max(bottom, best - 12), top, 0, 100)
        # The band of a point far below would cover the others.
        visible = [
            replace(s, points=tuple(p if p.y >= y.low else replace(p, low=None, high=None) for p in s.points))
            for s in series
        ]
        panels = [Lines("whole range", x, panels[0].y, tuple(series)), Lines("upper end", x, y, tuple(visible))]
    dense = "; the dashed line is the dense network" if any(line.flat for line in series) else ""
    caption = f"{_BAND}{dense}. Means of untrained runs are not shown."
    return Figure("accuracy", "Accuracy against compression", caption, tuple(panels), _legend(grid, series))


def _legend(grid: Grid, series: Sequence[Series]) -> tuple[str, ...]:
    there = {line.method for line in series}
    return tuple(method for method in [*(cell.method for cell in grid.dense), *grid.methods] if method in there)


def _levels_note(grid: Grid, shown: Sequence[float]) -> str:
    if len(shown) == len(grid.levels):
        return ""
    return f" Shown are {len(shown)} of {len(grid.levels)} compressions."


def layers(grid: Grid, looks: Mapping[str, Look], found: Mapping[tuple[str, float], Sequence[Layer]]) -> Figure | None:
    """Density of each layer at some sparsities.

    Args:
        found: what `evidence.layers` found, by method and sparsity.
    """
    panels, used = [], []
    levels = spread(grid.levels, evidence.LEVELS_SHOWN)
    values = [100 * layer.density.mean for in_cell in found.values() for layer in in_cell]
    if not values:
        return None
    y = _decades("density of the layer (%)", values, lambda value: f"{value:g}")
    for level in levels:
        series = []
        for method in grid.methods:
            in_cell = found.get((method, level))
            if in_cell:
                points = [
                    _from_measured(index, layer.density, _said_of_layer(layer, looks[method].label, level, index))
                    for index, layer in enumerate(in_cell, 1)
                ]
                series.append(Series(method, tuple(points)))
        if series:
            num_layers = max(len(line.points) for line in series)
            x = _counting("layer, from input to output", num_layers)
            panels.append(Lines(names.compression(level), x, y, tuple(series)))
            used += series
    caption = (
        f"{_BAND}, of at most {evidence.SEEDS_SHOWN} seeds. A layer at 0 has collapsed.{_levels_note(grid, levels)}"
    )
    return Figure("layers", "Density of each layer", caption, tuple(panels), _legend(grid, used))


def _counting(label: str, last: int) -> Axis:
    step = max(1, math.ceil(last / 8))
    ticks = [1, *(i for i in range(step, last + 1, step) if i > 1)]
    return Axis(label, 0.5, last + 0.5, tuple((float(i), str(i)) for i in ticks))


def _said_of_layer(layer: Layer, label: str, level: float, index: int) -> str:
    density = layer.density
    deviation = f" ± {100 * density.sd:.3g}" if density.sd is not None else ""
    return (
        f"{label} at {names.compression(level)}\nlayer {index}: {layer.name} ({layer.size:,})\n"
        f"{100 * density.mean:.3g} %{deviation} kept, n = {len(density.seeds)}"
    )


def curves(
    grid: Grid, looks: Mapping[str, Look], found: Mapping[tuple[str, float], Mapping[float, Measured]]
) -> Figure | None:
    """Test accuracy while training, at some sparsities, and that of the dense network.

    Args:
        found: what `evidence.curve` found, by method and sparsity.
    """
    panels, used = [], []
    levels = spread(grid.levels, evidence.LEVELS_SHOWN)
    everything = [
        (method, level, curve) for (method, level), curve in found.items() if len(curve) > 1 and method in looks
    ]
    if not everything:
        return None
    ends = [100 * value.mean for _, _, curve in everything for value in curve.values()]
    y = _linear("test accuracy (%)", min(ends), max(ends), 0, 100)
    x = _linear("epoch", 0, max(epoch for _, _, curve in everything for epoch in curve), 0)
    for level in levels or [0.0]:
        series = []
        for method in [*(cell.method for cell in grid.dense), *grid.methods]:
            dense = any(method == cell.method for cell in grid.dense)
            curve = found.get((method, 0.0 if dense else level))
            if not curve or len(curve) < 2:
                continue
            label = looks[method].label if dense else f"{looks[method].label} at {names.compression(level)}"
            points = [
                _from_measured(epoch, value, f"{label}\n{_said_of_epoch(epoch, value)}")
                for epoch, value in curve.items()
            ]
            series.append(Series(method, tuple(points), markers=False))
        if series:
            panels.append(Lines(names.compression(level) if levels else "dense", x, y, tuple(series)))
            used += series
    caption = (
        f"{_BAND}, of at most {evidence.SEEDS_SHOWN} seeds. Training before the mask counts."
        f"{_levels_note(grid, levels)}"
    )
    return Figure("curves", "Accuracy while training", caption, tuple(panels), _legend(grid, used))


def _said_of_epoch(epoch: float, value: Measured) -> str:
    deviation = f" ± {names.percent(value.sd)} (sd)" if value.sd is not None else ""
    return f"epoch {epoch:g}: {names.percent(value.mean)} %{deviation}, n = {len(value.seeds)}"


def collapse(grid: Grid, looks: Mapping[str, Look]) -> Figure | None:
    """Share of runs with a collapsed layer or without signal, by method and sparsity."""
    if not grid.cells:
        return None
    squares = []
    for method in grid.methods:
        line = []
        for level in grid.levels:
            where = f"{looks[method].label} at {names.compression(level)}"
            cell = grid.cells.get((method, level))
            if cell is None:
                line.append(Square(None, "–", f"{where}\nno run"))
                continue
            either = cell.share("either")
            text = f"{where}\ncollapsed layer: {_of(cell, 'collapsed')}\nno signal: {_of(cell, 'no_signal')}" + (
                f"\nnot trained: {len(cell.untrained)}" if cell.untrained else ""
            )
            line.append(Square(either, f"{100 * either:.0f}", text))
        squares.append(tuple(line))
    columns = tuple(map(names.compression, grid.levels))
    rows = tuple(looks[method].label for method in grid.methods)
    panel = Matrix("percent of seeds", rows, columns, tuple(squares), "#D55E00")
    caption = (
        "Percent of seeds in which a layer keeps nothing, or the output no longer depends on the image. "
        "A dash is a cell without a run."
    )
    return Figure("collapse", "Collapse", caption, (panel,))


def _of(cell: Cell, happened: str) -> str:
    return f"{round(cell.share(happened) * len(cell.rows))} of {len(cell.rows)} seeds"


def costs(grid: Grid, looks: Mapping[str, Look]) -> Figure | None:
    """Accuracy against what finding the mask took, at some sparsities."""
    if not grid.cells:
        return None
    levels = sorted({grid.levels[len(grid.levels) // 2], grid.levels[-1]})
    panels, used = [], []
    for level in levels:
        cells = [cell for cell in grid.at(level) if not (cell.dense or cell.given) and cell.mean is not None]
        for cost, unit in COSTS.items():
            series = [Series(c.method, (_costing(c, cost, looks),), bars=True) for c in cells]
            if series:
                x = _decades(f"{unit} to find the mask", [line.points[0].x for line in series], names.amount)
                low, high = _extent(series)
                y = _linear("test accuracy (%)", low, high, 0, 100)
                panels.append(Lines(f"{names.compression(level)}: {unit}", x, y, tuple(series)))
                used += series
    machines = sorted({row["hardware"] for cell in grid.cells.values() for row in cell.rows})
    mixed = f" Seconds are of {len(machines)} kinds of machine and not comparable." if len(machines) > 1 else ""
    caption = (
        "Bars are one sample standard deviation to either side. "
        "Images and operations count scoring and training before the mask, a multiply-add as two operations and a step "
        f"of training as three forward passes.{mixed}{_levels_note(grid, levels)}"
    )
    return Figure("cost", "Accuracy against the cost of the mask", caption, tuple(panels), _legend(grid, used))


def _costing(cell: Cell, cost: str, looks: Mapping[str, Look]) -> Point:
    spent = cell.search(cost)
    return _point(spent, cell, f"{said(cell, looks[cell.method].label)}\n{names.amount(spent)} {COSTS[cost]}")


def overlap(
    grid: Grid, looks: Mapping[str, Look], found: Mapping[float, tuple[int | None, Sequence[Overlap]]]
) -> Figure | None:
    """Jaccard index of the masks of pairs of methods above the diagonal, and what chance gives below it.

    Args:
        found: what `evidence.overlaps` found, by sparsity.
    """
    panels = []
    for level, (seed, pairs) in found.items():
        there = {method for pair in pairs for method in (pair.first, pair.second)}
        methods = [method for method in grid.methods if method in there][:_MOST_IN_MATRIX]
        if not methods:
            continue
        by_pair = {frozenset((pair.first, pair.second)): pair for pair in pairs}
        squares = []
        for i, row in enumerate(methods):
            line = []
            for j, column in enumerate(methods):
                pair = by_pair.get(frozenset((row, column)))
                if i == j or pair is None:
                    line.append(Square(None, "", looks[row].label if i == j else "not comparable"))
                else:
                    value = pair.jaccard if i < j else pair.jaccard_by_chance
                    line.append(Square(value, _brief(100 * value), _said_of_overlap(pair, looks)))
            squares.append(tuple(line))
        labels = tuple(looks[method].label for method in methods)
        title = f"{names.compression(level)}, seed {seed}"
        panels.append(Matrix(title, labels, labels, tuple(squares), "#0072B2"))
    if not panels:
        return None
    caption = (
        "Percent of the weights kept by either mask that both keep (Jaccard index), above the diagonal; below it, what "
        "masks would have in common that are random within layers and keep as many of each. Masks of one seed."
        f"{_levels_note(grid, list(found))}"
    )
    return Figure("overlap", "What masks have in common", caption, tuple(panels))


def _brief(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}"


def _said_of_overlap(pair: Overlap, looks: Mapping[str, Look]) -> str:
    return (
        f"{looks[pair.first].label} and {looks[pair.second].label}, seed {pair.seed}\n"
        f"Jaccard {100 * pair.jaccard:.1f} %, by chance {100 * pair.jaccard_by_chance:.1f} %\n"
        f"{100 * pair.of_smaller:.1f} % of the smaller, by chance "
        f"{100 * pair.common_by_chance / min(pair.kept_first, pair.kept_second):.1f} %"
    )


KINDS = ("accuracy", "layers", "curves", "collapse", "cost", "overlap")


@dataclass(frozen=True)
class Shown:
    """What was read from run directories for the figures of a grid, and goes into files too."""

    layers: Mapping[tuple[str, float], Sequence[Layer]]
    curves: Mapping[tuple[str, float], Mapping[float, Measured]]
    overlaps: Mapping[float, tuple[int | None, Sequence[Overlap]]]


def look_up(grid: Grid, directories: Mapping[str, Path], kinds: Sequence[str], unreadable: Unreadable) -> Shown:
    """Reads what the figures of some kinds show, and no more."""
    levels = spread(grid.levels, evidence.LEVELS_SHOWN)
    cells = {key: cell for key, cell in grid.cells.items() if key[1] in levels}
    with_dense = {**{(cell.method, 0.0): cell for cell in grid.dense}, **cells}
    return Shown(
        {k: evidence.layers(c, directories, unreadable) for k, c in cells.items()} if "layers" in kinds else {},
        {k: evidence.curve(c, directories, unreadable) for k, c in with_dense.items()} if "curves" in kinds else {},
        {level: evidence.overlaps(grid, level, directories, unreadable) for level in levels}
        if "overlap" in kinds
        else {},
    )


def figures(grid: Grid, looks: Mapping[str, Look], shown: Shown, kinds: Sequence[str]) -> list[Figure]:
    """The figures of a grid, in the order of KINDS, leaving out those that have nothing to show."""
    made = {
        "accuracy": lambda: accuracy(grid, looks),
        "layers": lambda: layers(grid, looks, shown.layers),
        "curves": lambda: curves(grid, looks, shown.curves),
        "collapse": lambda: collapse(grid, looks),
        "cost": lambda: costs(grid, looks),
        "overlap": lambda: overlap(grid, looks, shown.overlaps),
    }
    found = [made[kind]() for kind in KINDS if kind in kinds]
    return [figure for figure in found if figure is not None and figure.panels]
