"""Tables beside that of accuracies: what they consist of, and how they are written for GitHub."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pai_bench.report import names
from pai_bench.report.configurations import Configuration, Grid
from pai_bench.report.names import Look
from pai_bench.system.files import markdown_row

Lines = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class MoreTable:
    """A table of texts, with a line for each method. The first line has the names of the columns."""

    kind: str  # the end of its file's name
    title: str
    lines: Lines
    note: str
    above: tuple[str, ...] = ()  # sentences before it


def by_compression(grid: Grid, looks: Mapping[str, Look], cell: Callable[[Configuration | None], str]) -> Lines:
    """What `cell` says of each configuration, by method and compression; no line if nothing was pruned."""
    if not grid.configurations:
        return ()
    found = [
        (looks[method].label, *(cell(grid.configurations.get((method, level))) for level in grid.levels))
        for method in grid.methods
    ]
    return (("method", *map(names.compression, grid.levels)), *found)


def markdown(table: MoreTable, title: str) -> str:
    """The table for GitHub.

    Args:
        title: of what it is about.
    """
    lines = [markdown_row(line) for line in table.lines]
    if lines:
        lines.insert(1, "| --- |" + " ---: |" * (len(table.lines[0]) - 1))
    return "\n".join(
        [f"### {table.title}: {title}", "", *(f"{line}\n" for line in table.above), *lines, "", table.note, ""]
    )
