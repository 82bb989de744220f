"""What masks and trainings cost, in multiples of one training of the dense network."""

from collections.abc import Mapping
from statistics import fmean

from pai_bench.report import more_tables
from pai_bench.report.configurations import Configuration, Grid
from pai_bench.report.more_tables import MoreTable
from pai_bench.report.names import Look


def dense_flops(grid: Grid) -> float | None:
    """Floating-point operations of one training of the dense network. None: it has no run, or nothing is pruned."""
    if not grid.configurations:
        return None
    return max((one.average("train_flops") for one in grid.dense), default=0.0) or None


def shares(configuration: Configuration, dense: float) -> tuple[float, float | None]:
    """The costs of the search and of the training after it, as multiples of one training of the dense network.

    In the search every operation counts, as a GPU computes it. In the training zeros cost nothing. Runs that
    `on_collapse=stop` left untrained do not count there; None if no other is left.

    Args:
        dense: as from `dense_flops`.
    """
    # Two operations for a multiply-add. Rows without train_macs_per_image have masks that stay.
    training = [
        2 * row["train_examples"] * row.get("train_macs_per_image", 3 * row["macs_masked"])
        for row in configuration.rows
        if not row["stopped"]
    ]
    return configuration.search("flops") / dense, fmean(training) / dense if training else None


def table(grid: Grid, looks: Mapping[str, Look]) -> MoreTable | None:
    """Search + training, by method and compression. None: as `dense_flops`."""
    if (dense := dense_flops(grid)) is None:
        return None

    def cell(configuration: Configuration | None) -> str:
        if configuration is None:
            return "–"
        search, training = shares(configuration, dense)
        found = "?" if configuration.given else _number(search)
        return f"{found} + {'–' if training is None else _number(training)}"

    note = (
        "Search + training, in multiples of the floating-point operations of one training of the dense network. "
        "The search counts all operations, as a GPU computes them; in the training zeros cost nothing. Means over runs."
    )
    if any(one.given for one in grid.configurations.values()):
        note += " A question mark: the mask came from a file, and what it cost is not known."
    return MoreTable("costs", "Costs", more_tables.by_compression(grid, looks, cell), note)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 10 else f"{value:.0f}"
