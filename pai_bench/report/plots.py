"""Makes figures, as data, from configurations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pai_bench.report import axes, evidence, names
from pai_bench.report.configurations import Configuration, Grid, spread
from pai_bench.report.evidence import Layer, Measured, Overlap, Unreadable
from pai_bench.report.figure import Figure, Lines, Matrix, Point, Series, Square
from pai_bench.report.names import Look

COSTS = {"examples": "images", "flops": "FLOPs", "seconds": "seconds"}
_MOST_IN_MATRIX = 24  # methods


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


_BAND = "Lines are means over seeds, bands one sample standard deviation to either side"


# Figures --------------------------------------------------------------------------------------------------------------


def accuracy(grid: Grid, looks: Mapping[str, Look]) -> Figure | None:
    """Accuracy against compression. If some methods are far below the best, a second panel shows the upper end."""
    series = []
    for method in grid.methods:
        configurations = [
            configuration
            for (name, _), configuration in sorted(grid.configurations.items(), key=lambda item: item[0][1])
            if name == method
        ]
        points = [_point(c.compression, c, said(c, looks[method].label)) for c in configurations if c.mean is not None]
        if points:
            series.append(Series(method, tuple(points)))
    if not series:
        return None
    x = axes.of_compression(grid)
    for configuration in grid.dense:
        if configuration.mean is not None:
            points = [
                _point(end, configuration, said(configuration, looks[configuration.method].label))
                for end in (x.low, x.high)
            ]
            series.insert(0, Series(configuration.method, tuple(points), markers=False, flat=True))
    low, high = _extent(series)
    label = "test accuracy (%)"
    panels = [Lines("all", x, axes.linear(label, low, high, 0, 100), tuple(series))]
    best = max(point.y for line in series for point in line.points)
    if best - low > 20:
        near = [p for line in series for p in line.points if p.y > best - 10]
        bottom = min([p.low if p.low is not None else p.y for p in near] + [best - 1])
        top = max(p.high if p.high is not None else p.y for p in near)
        y = axes.linear(label, max(bottom, best - 12), top, 0, 100)
        # The band of a point far below would cover the other points.
        visible = [
            replace(s, points=tuple(p if p.y >= y.low else replace(p, low=None, high=None) for p in s.points))
            for s in series
        ]
        panels = [Lines("whole range", x, panels[0].y, tuple(series)), Lines("upper end", x, y, tuple(visible))]
    dense = "; the dashed line is the dense network" if any(line.flat for line in series) else ""
    caption = f"{_BAND}{dense}. Means of untrained runs are not shown."
    return Figure("accuracy", "Accuracy against compression", caption, tuple(panels), _legend(grid, series))


def _legend(grid: Grid, series: Sequence[Series]) -> tuple[str, ...]:
    drawn = {line.method for line in series}
    return tuple(
        method for method in [*(configuration.method for configuration in grid.dense), *grid.methods] if method in drawn
    )


def _levels_note(grid: Grid, shown: Sequence[float]) -> str:
    if len(shown) == len(grid.levels):
        return ""
    return f" Shown are {len(shown)} of {len(grid.levels)} compressions."


def layers(grid: Grid, looks: Mapping[str, Look], found: Mapping[tuple[str, float], Sequence[Layer]]) -> Figure | None:
    """Density of each layer at some sparsities.

    Args:
        found: the layers of `evidence.layers`, by method and sparsity.
    """
    panels, used = [], []
    levels = spread(grid.levels, evidence.LEVELS_SHOWN)
    values = [100 * layer.density.mean for in_configuration in found.values() for layer in in_configuration]
    if not values:
        return None
    y = axes.decades("density of the layer (%)", values, lambda value: f"{value:g}")
    for level in levels:
        series = []
        for method in grid.methods:
            in_configuration = found.get((method, level))
            if in_configuration:
                points = [
                    _from_measured(index, layer.density, _said_of_layer(layer, looks[method].label, level, index))
                    for index, layer in enumerate(in_configuration, 1)
                ]
                series.append(Series(method, tuple(points)))
        if series:
            num_layers = max(len(line.points) for line in series)
            x = axes.counting("layer, from input to output", num_layers)
            panels.append(Lines(names.compression(level), x, y, tuple(series)))
            used += series
    caption = (
        f"{_BAND}, of at most {evidence.SEEDS_SHOWN} seeds. A layer at 0 has collapsed.{_levels_note(grid, levels)}"
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
    y = axes.linear("test accuracy (%)", min(ends), max(ends), 0, 100)
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
        f"{_BAND}, of at most {evidence.SEEDS_SHOWN} seeds. Training before the mask counts."
        f"{_levels_note(grid, levels)}"
    )
    return Figure("curves", "Accuracy while training", caption, tuple(panels), _legend(grid, used))


def _said_of_epoch(epoch: float, value: Measured) -> str:
    deviation = f" ± {names.percent(value.sd)} (sd)" if value.sd is not None else ""
    return f"epoch {epoch:g}: {names.percent(value.mean)} %{deviation}, n = {len(value.seeds)}"


def collapse(grid: Grid, looks: Mapping[str, Look]) -> Figure | None:
    """Share of runs with a collapsed layer or without signal, by method and sparsity."""
    if not grid.configurations:
        return None
    squares = []
    for method in grid.methods:
        line = []
        for level in grid.levels:
            where = f"{looks[method].label} at {names.compression(level)}"
            configuration = grid.configurations.get((method, level))
            if configuration is None:
                line.append(Square(None, "–", f"{where}\nno run"))
                continue
            either = configuration.share("either")
            text = f"{where}\ncollapsed layer: {_of(configuration, 'collapsed')}"
            text += f"\nno signal: {_of(configuration, 'no_signal')}"
            text += f"\nnot trained: {len(configuration.untrained)}" if configuration.untrained else ""
            line.append(Square(either, f"{100 * either:.0f}", text))
        squares.append(tuple(line))
    columns = tuple(map(names.compression, grid.levels))
    rows = tuple(looks[method].label for method in grid.methods)
    panel = Matrix("percent of seeds", rows, columns, tuple(squares), "#D55E00")
    caption = (
        "Percent of seeds in which a layer keeps nothing, or the output no longer depends on the image. "
        "A dash: there is no run."
    )
    return Figure("collapse", "Collapse", caption, (panel,))


def _of(configuration: Configuration, happened: str) -> str:
    return f"{round(configuration.share(happened) * len(configuration.rows))} of {len(configuration.rows)} seeds"


def costs(grid: Grid, looks: Mapping[str, Look]) -> Figure | None:
    """Accuracy against the cost of finding the mask, at some sparsities."""
    if not grid.configurations:
        return None
    levels = sorted({grid.levels[len(grid.levels) // 2], grid.levels[-1]})
    panels, used = [], []
    for level in levels:
        configurations = [
            configuration
            for configuration in grid.at(level)
            if not (configuration.dense or configuration.given) and configuration.mean is not None
        ]
        for cost, unit in COSTS.items():
            series = [Series(c.method, (_cost_point(c, cost, looks),), bars=True) for c in configurations]
            if series:
                x = axes.decades(f"{unit} to find the mask", [line.points[0].x for line in series], names.amount)
                low, high = _extent(series)
                y = axes.linear("test accuracy (%)", low, high, 0, 100)
                panels.append(Lines(f"{names.compression(level)}: {unit}", x, y, tuple(series)))
                used += series
    machines = sorted({row["hardware"] for configuration in grid.configurations.values() for row in configuration.rows})
    mixed = f" Seconds are of {len(machines)} kinds of machine and not comparable." if len(machines) > 1 else ""
    caption = (
        "Bars are one sample standard deviation to either side. "
        "Images and operations count scoring and training before the mask, a multiply-add as two operations and a step "
        f"of training as three forward passes.{mixed}{_levels_note(grid, levels)}"
    )
    return Figure("cost", "Accuracy against the cost of the mask", caption, tuple(panels), _legend(grid, used))


def _cost_point(configuration: Configuration, cost: str, looks: Mapping[str, Look]) -> Point:
    spent = configuration.search(cost)
    return _point(
        spent,
        configuration,
        f"{said(configuration, looks[configuration.method].label)}\n{names.amount(spent)} {COSTS[cost]}",
    )


def overlap(
    grid: Grid, looks: Mapping[str, Look], found: Mapping[float, tuple[int | None, Sequence[Overlap]]]
) -> Figure | None:
    """The Jaccard index of the masks of two methods. Above the diagonal: the index; below it: what chance gives.

    Args:
        found: the overlaps of `evidence.overlaps`, by sparsity.
    """
    panels = []
    for level, (seed, pairs) in found.items():
        compared = {method for pair in pairs for method in (pair.first, pair.second)}
        methods = [method for method in grid.methods if method in compared][:_MOST_IN_MATRIX]
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


def figures(grid: Grid, looks: Mapping[str, Look], shown: Shown, kinds: Sequence[str]) -> list[Figure]:
    """The figures of a grid, in the order of KINDS. Empty figures are left out."""
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
