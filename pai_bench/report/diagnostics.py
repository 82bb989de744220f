"""What `diagnostics` measured at the end of runs, beside the accuracies before and after training."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pai_bench.report import names
from pai_bench.report.configurations import Configuration, Grid, deviation
from pai_bench.report.more_tables import MoreTable
from pai_bench.report.names import Look

_ACCURACIES = {"before training, %": "untrained_test_top1", "after training, %": "test_top1"}


def table(grid: Grid, looks: Mapping[str, Look]) -> MoreTable | None:
    """A line for each method and compression. None: no run has measured anything."""
    pruned = (grid.configurations.get((method, level)) for level in grid.levels for method in grid.methods)
    every = [one for one in (*grid.dense, *pruned) if one is not None and _measured(one)]
    if not every:
        return None
    columns = list(dict.fromkeys(name for one in every for row in _measured(one) for name in row["measured"]))
    head = ("method", "compression", "n", *_ACCURACIES, "weights on a path", *columns)
    note = (
        "Test accuracies in percent, weights on a path from the input to an output, and what was measured with the "
        "last evaluation: mean ± sample standard deviation (n - 1) of n seeds. A dash: it is not known."
    )
    return MoreTable("diagnostics", "Diagnostics", (head, *(_line(one, columns, looks) for one in every)), note)


def _measured(configuration: Configuration) -> list[Mapping[str, Any]]:
    """The runs that were trained and have measured something."""
    every = (row for row in configuration.rows if not row["stopped"])
    return [row for row in every if row.get("diagnostics") and row.get("measured")]


def _line(configuration: Configuration, columns: Sequence[str], looks: Mapping[str, Look]) -> tuple[str, ...]:
    rows = _measured(configuration)
    return (
        looks[configuration.method].label,
        names.compression(configuration.sparsity),
        str(len(rows)),
        *(_number([row[key] and 100 * row[key] for row in rows], ".2f") for key in _ACCURACIES.values()),
        _number([row["num_effective"] for row in rows], ",.0f"),
        *(_number([row["measured"].get(name) for row in rows], ".3g", ".2g") for name in columns),
    )


def _number(values: Sequence[float | None], form: str, form_of_spread: str | None = None) -> str:
    """Mean and deviation. A dash if a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    spread = deviation(known)
    return f"{fmean(known):{form}}" + ("" if spread is None else f" ± {spread:{form_of_spread or form}}")
