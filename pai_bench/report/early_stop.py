"""When training should have stopped: the epoch with the lowest loss on held-out images, and the accuracy there."""

from collections.abc import Mapping
from statistics import fmean

from pai_bench.report import more_tables
from pai_bench.report.configurations import Configuration, Grid, deviation
from pai_bench.report.more_tables import MoreTable
from pai_bench.report.names import Look

_EPOCH, _ACCURACY = "early_stop_epoch", "test_top1_at_early_stop"


def table(grid: Grid, looks: Mapping[str, Look]) -> MoreTable | None:
    """Epoch (test accuracy there), by method and compression. None: no run held images out."""
    every = [*grid.dense, *grid.configurations.values()]
    if not any(_rows(one) for one in every):
        return None
    note = (
        "Epoch of the recipe with the lowest loss on the held-out images, and in brackets the test accuracy there in "
        "percent: means over seeds, of epochs ± sample standard deviation (n - 1)."
    )
    dense = tuple(f"{looks[one.method].label}: {_cell(one)}" for one in grid.dense)
    return MoreTable("early-stop", "Early stopping", more_tables.by_compression(grid, looks, _cell), note, dense)


def _rows(configuration: Configuration) -> list[tuple[float, float]]:
    """The epoch and the accuracy of each run that was trained and held images out."""
    rows = [row for row in configuration.rows if not row["stopped"] and row.get(_EPOCH) is not None]
    return [(row[_EPOCH], row[_ACCURACY]) for row in rows]


def _cell(configuration: Configuration | None) -> str:
    found = _rows(configuration) if configuration is not None else []
    if not found:
        return "–"
    epochs, accuracies = zip(*found, strict=True)
    spread = deviation(epochs)
    return f"{fmean(epochs):.1f}{'' if spread is None else f' ± {spread:.1f}'} ({100 * fmean(accuracies):.2f})"
