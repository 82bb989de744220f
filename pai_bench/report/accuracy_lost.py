"""How much accuracy methods lose against the dense network, seed by seed."""

from collections.abc import Mapping
from dataclasses import replace

from pai_bench.report import more_tables
from pai_bench.report.comparison import FEWEST, Difference, difference, holm
from pai_bench.report.configurations import Configuration, Grid
from pai_bench.report.more_tables import MoreTable
from pai_bench.report.names import Look
from pai_bench.report.tables import UNTESTED, UNTOLD

_NOTE = (
    "Test accuracy of the dense network minus that of the method, in points: mean ± sample standard deviation (n - 1) "
    "of the differences between runs of one seed; n = {n} unless said otherwise. A dash: no seed in common with the "
    "dense network, or runs that were not trained."
)
_MARKS = {
    UNTOLD: "A paired t test does not show a difference from the dense network at 5 % (Holm, over the methods of the "
    "column).",
    UNTESTED: f"Not tested: fewer than {FEWEST} seeds in common, or the same difference in every seed.",
}


def lost(grid: Grid, level: float) -> dict[str, Difference]:
    """The dense network minus each method at a sparsity, by the method's id, corrected for the number of methods.

    A method with untrained runs is left out, because its trained seeds are a favourable choice.
    """
    methods = [one for one in grid.at(level) if not one.dense and not one.untrained]
    found = [one for method in methods if (one := difference(grid.dense[0], method)) is not None]
    tested = [one for one in found if one.p is not None]
    corrected = dict(
        zip((one.second for one in tested), holm([one.p for one in tested if one.p is not None]), strict=True)
    )
    return {one.second: replace(one, p_holm=corrected.get(one.second)) for one in found}


def table(grid: Grid, looks: Mapping[str, Look]) -> MoreTable | None:
    """Points lost, by method and compression. None: there is no dense network, or nothing to compare with it."""
    found = {level: lost(grid, level) for level in grid.levels} if grid.dense else {}
    if not any(found.values()):
        return None

    def cell(configuration: Configuration | None) -> str:
        one = found[configuration.sparsity].get(configuration.method) if configuration else None
        return "–" if one is None else _text(one, len(grid.seeds))

    lines = more_tables.by_compression(grid, looks, cell)
    marks = [
        f"{mark} {words}" for mark, words in _MARKS.items() if any(mark in cell for line in lines for cell in line[1:])
    ]
    several = (f"Against {looks[grid.dense[0].method].label}.",) if len(grid.dense) > 1 else ()
    return MoreTable(
        "accuracy-lost",
        "Accuracy lost against the dense network",
        lines,
        "\n".join([_NOTE.format(n=len(grid.seeds)), *marks]),
        several,
    )


def _text(loss: Difference, num_seeds: int) -> str:
    spread = "" if loss.sd is None else f" ± {100 * loss.sd:.2f}"
    few = "" if len(loss.seeds) == num_seeds else f" (n = {len(loss.seeds)})"
    mark = UNTESTED if loss.p_holm is None else "" if loss.significant else UNTOLD
    mean = round(100 * loss.mean, 2) + 0.0  # no -0.00
    return f"{mean:.2f}{spread}{few}{f' {mark}' if mark else ''}"
