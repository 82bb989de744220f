"""Makes figures of lines and points, as data, from configurations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pai_bench.report import axes, evidence, matrices, names
from pai_bench.report.configurations import Configuration, Grid, spread
from pai_bench.report.evidence import Layer, Measured, Overlap, Unreadable
from pai_bench.report.figure import Axis, Figure, Lines, Point, Series
from pai_bench.report.names import Look

_ACCURACY = "test accuracy (%)"
_FEW = 4  # points of a line; with fewer than this, bars show the deviation and not a band


# What is said of a point ----------------------------------------------------------------------------------------------


def said(configuration: Configuration, label: str) -> str:
    """A configuration in words: method, compression, mean, standard deviation, number of seeds, and the seeds."""
    lines = [label if configuration.dense else f"{label} at {names.compression(configuration.sparsity)}"]
    if configuration.mean is None:
        lines.append("no trained run")
    else:
        deviation = f" ± {names.percent(configuration.sd)} (sd)" if configuration.sd is not None else ""
        lines.append(f"{names.percent(configuration.mean)} %{deviation}")
        lines.append(f"n = {configuration.n}: {_seeds(list(configuration.values))}")
    if configuration.untrained:
        lines.append(f"not trained: {_seeds(configuration.untrained)}")
    return "\n".join(lines)


def _seeds(seeds: Sequence[int]) -> str:
    shown = ", ".join(map(str, seeds[:12])) + (", ..." if len(seeds) > 12 else "")
    return f"seed {shown}" if len(seeds) == 1 else f"seeds {shown}"


def _point(x: float, configuration: Configuration, text: str) -> Point:
    mean, sd = 100 * (configuration.mean or 0.0), configuration.sd
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


def _spread(series: Sequence[Series]) -> str:
    """The words of a caption that explain lines and their bands or bars."""
    words = "Points are means over seeds, bars" if any(s.bars for s in series) else "Lines are means over seeds, bands"
    return f"{words} one sample standard deviation to either side"


# Figures --------------------------------------------------------------------------------------------------------------


def accuracy(grid: Grid, looks: Mapping[str, Look], axis: str = "compression") -> Figure | None:
    """Accuracy against compression. If some methods are far below the best, a second panel shows the others alone.

    Args:
        axis: what the axis of compression is labelled with, a key of axes.LEVELS.
    """
    series = []
    few = len(grid.levels) < _FEW
    for method in grid.methods:
        found = [one for level in grid.levels if (one := grid.configurations.get((method, level))) is not None]
        points = [_point(c.compression, c, said(c, looks[method].label)) for c in found if c.mean is not None]
        if points:
            series.append(Series(method, tuple(points), bars=few))
    if not series:
        return None
    x = axes.of_levels(grid, axis)
    for configuration in grid.dense:
        if configuration.mean is not None:
            words = said(configuration, looks[configuration.method].label)
            points = [_point(end, configuration, words) for end in (x.low, x.high)]
            series.insert(0, Series(configuration.method, tuple(points), markers=False, flat=True))
    low, high = _extent(series)
    y = axes.linear(_ACCURACY, low, high, 0, 100)
    zoom, outside = _zoom(x, series, looks)
    panels = [Lines("whole range", x, y, tuple(series)), zoom] if zoom else [Lines("", x, y, tuple(series))]
    dense = "; the dashed line is the dense network" if any(line.flat for line in series) else ""
    caption = f"{_spread(series)}{dense}. Untrained runs are not counted.{outside}"
    return Figure("accuracy", f"Accuracy against {axis}", caption, tuple(panels), _legend(grid, series))


def _zoom(x: Axis, series: Sequence[Series], looks: Mapping[str, Look]) -> tuple[Lines | None, str]:
    """A panel of the best 10 points of accuracy, and what lies outside it. None if all is near the best."""
    best = max(point.y for line in series for point in line.points)
    if best - _extent(series)[0] <= 20:
        return None, ""
    near = [p for line in series for p in line.points if p.y > best - 10]
    if sum(any(p in near for p in line.points) for line in series if not line.flat) < 2:
        return None, ""  # there is nothing to tell apart
    bottom = min([p.low if p.low is not None else p.y for p in near] + [best - 1])
    top = max(p.high if p.high is not None else p.y for p in near)
    y = axes.linear(_ACCURACY, max(bottom, best - 12), top, 0, 100)
    # The band of a point far below would cover the other points.
    visible = [
        replace(s, points=tuple(p if p.y >= y.low else replace(p, low=None, high=None) for p in s.points))
        for s in series
    ]
    below = {line.method: [p for p in line.points if p.y < y.low] for line in series}
    lost = [looks[line.method].label for line in series if len(below[line.method]) == len(line.points)]
    partly = [looks[m].label for m, points in below.items() if points and looks[m].label not in lost]
    title = f"zoom: above {y.low:g} %"
    words = f" The zoom leaves out {names.listed(lost)}" if lost else ""
    if partly:
        words += f"{', and' if lost else ' The zoom leaves out'} points of {names.listed(partly)}"
    return Lines(title, x, y, tuple(visible)), f"{words}, below {y.low:g} %." if words else ""


def _legend(grid: Grid, series: Sequence[Series]) -> tuple[str, ...]:
    drawn = {line.method for line in series}
    return tuple(
        method for method in [*(configuration.method for configuration in grid.dense), *grid.methods] if method in drawn
    )


def layers(grid: Grid, looks: Mapping[str, Look], found: Mapping[tuple[str, float], Sequence[Layer]]) -> Figure | None:
    """Density of each layer at some sparsities, without deviations, which a logarithmic axis cannot show.

    Args:
        found: the layers of `evidence.layers`, by method and sparsity.
    """
    panels, used = [], []
    levels = spread(grid.levels, evidence.LEVELS_SHOWN)
    for level in levels:
        shown = {method: layers for method in grid.methods if (layers := found.get((method, level)))}
        if not shown:
            continue
        series = []
        for method, in_configuration in shown.items():
            points = [
                Point(
                    index,
                    100 * layer.density.mean,
                    None,
                    None,
                    _said_of_layer(layer, looks[method].label, level, index),
                )
                for index, layer in enumerate(in_configuration, 1)
            ]
            series.append(Series(method, tuple(points), thin=True))
        values = [point.y for line in series for point in line.points]
        y = axes.decades("density (%), log scale", values, lambda value: f"{value:g}")
        x = axes.of_layers([layer.name for layer in max(shown.values(), key=len)])
        panels.append(Lines(names.compression(level), x, y, tuple(series)))
        used += series
    if not panels:
        return None
    caption = (
        f"Points are means over at most {evidence.SEEDS_SHOWN} seeds, from input to output. A layer at 0 has "
        f"collapsed.{matrices.levels_note(grid, levels)}"
    )
    return Figure("layers", "Density of each layer", caption, tuple(panels), _legend(grid, used))


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
    """Test accuracy during training, at some sparsities and of the dense network.

    Args:
        found: the curves of `evidence.curve`, by method and sparsity.
    """
    panels, used = [], []
    levels = spread(grid.levels, evidence.LEVELS_SHOWN)
    everything = [
        (method, level, curve) for (method, level), curve in found.items() if len(curve) > 1 and method in looks
    ]
    if not everything:
        return None
    ends = [100 * value.mean for _, _, curve in everything for value in curve.values()]
    y = axes.linear(_ACCURACY, min(ends), max(ends), 0, 100)
    x = axes.linear("epoch", 0, max(epoch for _, _, curve in everything for epoch in curve), 0)
    for level in levels or [0.0]:
        series = []
        for method in [*(configuration.method for configuration in grid.dense), *grid.methods]:
            dense = any(method == configuration.method for configuration in grid.dense)
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
        f"{_spread(used)}, of at most {evidence.SEEDS_SHOWN} seeds. Training before the mask counts."
        f"{matrices.levels_note(grid, levels)}"
    )
    return Figure("curves", "Accuracy while training", caption, tuple(panels), _legend(grid, used))


def _said_of_epoch(epoch: float, value: Measured) -> str:
    deviation = f" ± {names.percent(value.sd)} (sd)" if value.sd is not None else ""
    return f"epoch {epoch:g}: {names.percent(value.mean)} %{deviation}, n = {len(value.seeds)}"


def costs(grid: Grid, looks: Mapping[str, Look]) -> Figure | None:
    """Accuracy against the time that it takes to find the mask, at some sparsities."""
    panels, used = [], []
    levels = sorted({grid.levels[(len(grid.levels) - 1) // 2], grid.levels[-1]}) if grid.levels else []
    for level in levels:
        found = [
            one
            for method in grid.methods
            if (one := grid.configurations.get((method, level))) is not None and not one.given and one.mean is not None
        ]
        series = [Series(c.method, (_cost_point(c, looks),), bars=True) for c in found]
        if series:
            x = axes.decades("seconds to find the mask", [line.points[0].x for line in series], names.amount)
            low, high = _extent(series)
            y = axes.linear(_ACCURACY, low, high, 0, 100)
            panels.append(Lines(names.compression(level), x, y, tuple(series)))
            used += series
    machines = {row["hardware"] for configuration in grid.configurations.values() for row in configuration.rows}
    mixed = f" They are of {len(machines)} kinds of machine and not comparable." if len(machines) > 1 else ""
    left_out = matrices.levels_note(grid, levels)
    caption = (
        "Points are means over seeds, bars one sample standard deviation to either side. Seconds count scoring and "
        f"training before the mask.{mixed} The table of costs has images and operations.{left_out}"
    )
    return Figure("cost", "Accuracy against the cost of the mask", caption, tuple(panels), _legend(grid, used))


def _cost_point(configuration: Configuration, looks: Mapping[str, Look]) -> Point:
    spent = {cost: configuration.search(cost) for cost in ("seconds", "examples", "flops")}
    words = said(configuration, looks[configuration.method].label)
    words += f"\n{names.amount(spent['seconds'])} seconds, {names.amount(spent['examples'])} images"
    return _point(spent["seconds"], configuration, f"{words}, {names.amount(spent['flops'])} FLOPs")


KINDS = ("accuracy", "layers", "curves", "collapse", "cost", "overlap")


@dataclass(frozen=True)
class Shown:
    """Data from run directories for the figures of a grid. It goes into CSV files too."""

    layers: Mapping[tuple[str, float], Sequence[Layer]]
    curves: Mapping[tuple[str, float], Mapping[float, Measured]]
    overlaps: Mapping[float, tuple[int | None, Sequence[Overlap]]]


def look_up(grid: Grid, directories: Mapping[str, Path], kinds: Sequence[str], unreadable: Unreadable) -> Shown:
    """Reads the data that some kinds of figures need, and nothing else."""
    levels = spread(grid.levels, evidence.LEVELS_SHOWN)
    configurations = {key: configuration for key, configuration in grid.configurations.items() if key[1] in levels}
    with_dense = {**{(configuration.method, 0.0): configuration for configuration in grid.dense}, **configurations}
    return Shown(
        {k: evidence.layers(c, directories, unreadable) for k, c in configurations.items()}
        if "layers" in kinds
        else {},
        {k: evidence.curve(c, directories, unreadable) for k, c in with_dense.items()} if "curves" in kinds else {},
        {level: evidence.overlaps(grid, level, directories, unreadable) for level in levels}
        if "overlap" in kinds
        else {},
    )


def figures(
    grid: Grid, looks: Mapping[str, Look], shown: Shown, kinds: Sequence[str], axis: str = "compression"
) -> list[Figure]:
    """The figures of a grid, in the order of KINDS. Empty figures are left out."""
    made = {
        "accuracy": lambda: accuracy(grid, looks, axis),
        "layers": lambda: layers(grid, looks, shown.layers),
        "curves": lambda: curves(grid, looks, shown.curves),
        "collapse": lambda: matrices.collapse(grid, looks),
        "cost": lambda: costs(grid, looks),
        "overlap": lambda: matrices.overlap(grid, looks, shown.overlaps),
    }
    found = [made[kind]() for kind in KINDS if kind in kinds]
    return [figure for figure in found if figure is not None and figure.panels]
