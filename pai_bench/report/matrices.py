"""Makes figures that are matrices, as data: where networks collapse, and what masks have in common."""

from collections.abc import Callable, Mapping, Sequence

from pai_bench.report import names
from pai_bench.report.configurations import Configuration, Grid
from pai_bench.report.evidence import Overlap
from pai_bench.report.figure import Figure, Matrix, Square
from pai_bench.report.names import Look

_MOST_IN_MATRIX = 24  # methods


def levels_note(grid: Grid, shown: Sequence[float]) -> str:
    """Says how many compressions a figure leaves out; empty if none."""
    if len(shown) == len(grid.levels):
        return ""
    return f" Shown are {len(shown)} of {len(grid.levels)} compressions."


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
    panel = Matrix("", rows, columns, tuple(squares), "#D55E00")
    caption = (
        "Percent of seeds in which a layer keeps nothing, or the output no longer depends on the image. "
        "A dash: there is no run."
    )
    return Figure("collapse", "Collapse", caption, (panel,))


def _of(configuration: Configuration, happened: str) -> str:
    return f"{round(configuration.share(happened) * len(configuration.rows))} of {len(configuration.rows)} seeds"


def overlap(
    grid: Grid, looks: Mapping[str, Look], found: Mapping[float, tuple[int | None, Sequence[Overlap]]]
) -> Figure | None:
    """The Jaccard index of the masks of two methods, at some sparsities, and what chance gives, in panels of their own.

    Args:
        found: the overlaps of `evidence.overlaps`, by sparsity.
    """
    panels: list[Matrix] = []
    seeds: dict[str, int | None] = {}
    for level, (seed, pairs) in found.items():
        compared = {method for pair in pairs for method in (pair.first, pair.second)}
        methods = [method for method in grid.methods if method in compared][:_MOST_IN_MATRIX]
        if not methods:
            continue
        by_pair = {frozenset((pair.first, pair.second)): pair for pair in pairs}
        labels = tuple(looks[method].label for method in methods)
        for words, value in (
            ("both keep", lambda pair: pair.jaccard),
            ("by chance", lambda pair: pair.jaccard_by_chance),
        ):
            squares = _triangle(methods, by_pair, value, looks)
            title = f"{names.compression(level)}: {words}"
            panels.append(Matrix(title, labels[1:], labels[:-1], squares, "#0072B2"))
        seeds[names.compression(level)] = seed
    if not panels:
        return None
    same = set(seeds.values())
    whose = ", ".join(f"{seed} at {ratio}" for ratio, seed in seeds.items()) if len(same) > 1 else str(*same)
    caption = (
        "Percent of the weights kept by either of two masks that both keep (Jaccard index). On the right: what two "
        "masks would have in common that are random within layers and keep as many of each layer. Masks of seed "
        f"{whose}.{levels_note(grid, list(found))}"
    )
    return Figure("overlap", "What masks have in common", caption, tuple(panels))


def _triangle(
    methods: Sequence[str],
    by_pair: Mapping[frozenset[str], Overlap],
    value: Callable[[Overlap], float],
    looks: Mapping[str, Look],
) -> tuple[tuple[Square, ...], ...]:
    """A square for every pair of methods, below the diagonal; the others are empty."""
    squares = []
    for i, row in enumerate(methods[1:], 1):
        line = []
        for j, column in enumerate(methods[:-1]):
            pair = by_pair.get(frozenset((row, column)))
            if j >= i:
                line.append(Square(None, "", "", empty=True))
            elif pair is None:
                line.append(Square(None, "–", f"{looks[row].label} and {looks[column].label}\nnot comparable"))
            else:
                line.append(Square(value(pair), _brief(100 * value(pair)), _said_of_overlap(pair, looks)))
        squares.append(tuple(line))
    return tuple(squares)


def _brief(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}"


def _said_of_overlap(pair: Overlap, looks: Mapping[str, Look]) -> str:
    return (
        f"{looks[pair.first].label} and {looks[pair.second].label}, seed {pair.seed}\n"
        f"Jaccard {100 * pair.jaccard:.1f} %, by chance {100 * pair.jaccard_by_chance:.1f} %\n"
        f"{100 * pair.of_smaller:.1f} % of the smaller, by chance "
        f"{100 * pair.common_by_chance / min(pair.kept_first, pair.kept_second):.1f} %"
    )
