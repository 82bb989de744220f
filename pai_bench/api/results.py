"""Finished runs as a table of pandas."""

from pathlib import Path
from typing import TYPE_CHECKING

from pai_bench.errors import DataError, check_installed
from pai_bench.runs import archive, status

if TYPE_CHECKING:
    from pandas import DataFrame


def load(folder: str | Path = "results") -> "DataFrame":
    """The rows of all finished runs below a folder, sorted by id: one line a run, one column a number.

    docs/results.md explains the columns. Accuracies are fractions. The files of a run are in folder / id.

    Args:
        folder: the results_dir of the runs, or a file of `pai-bench pack`.

    Raises:
        ConfigError: pandas is not installed.
        DataError: there is no such folder or archive, it is a run's own directory, or a row in it cannot be read.

    Example:
        >>> pai_bench.load("results").groupby(["pruner", "sparsity"]).test_top1.mean()
    """
    check_installed("pai_bench.load gives a DataFrame of", "pandas", "notebook")
    root = Path(folder).expanduser()
    if not root.exists():
        raise DataError(f"{folder}: there is no such folder; give the results_dir of finished runs")
    if (root / status.RESULT).is_file():
        raise DataError(f"{folder}: it is a run's own directory; give the folder that it lies in")
    with archive.opened(root) as opened:
        if not opened.is_dir():
            raise DataError(f"{folder}: it is no folder and no .tar.gz; give the results_dir of finished runs")
        rows = status.read(opened)
    from pandas import DataFrame

    return DataFrame(rows)
