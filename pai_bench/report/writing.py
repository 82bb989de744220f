"""A results folder -> a report. Read `write` downwards."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from pai_bench.errors import ConfigError, check_installed
from pai_bench.report import comparison, drawing, names, page, plots, reading, tables
from pai_bench.report.cells import STATISTICS, Grid, cells, grids, is_dense
from pai_bench.report.evidence import Unreadable
from pai_bench.report.page import Section
from pai_bench.report.reading import Results, Row
from pai_bench.system import files

# What the report in a folder consists of, and the line by which such a list is known.
_MANIFEST, _MAGIC = ".pai_bench_report", "files of a report of pai_bench"


@dataclass(frozen=True)
class Options:
    """What a report is of; an empty list of names stands for all."""

    statistic: str = "last"
    task: list[str] = field(default_factory=list)
    dataset: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    pruner: list[str] = field(default_factory=list)  # dense networks are always taken
    figures: list[str] = field(default_factory=lambda: list(plots.KINDS))
    images: bool = True  # PNG and SVG files beside the page

    def wants(self, row: Row) -> bool:
        """Whether a row is to be in the report."""
        by_name = all(
            not wanted or row[key] in wanted
            for key, wanted in (("task", self.task), ("dataset", self.dataset), ("model", self.model))
        )
        return by_name and (not self.pruner or row["pruner"] in self.pruner or is_dense(row))

    def command(self, folder: Path, output: Path, task: str | None = None, kind: str | None = None) -> str:
        """The command line that makes this report, or one figure of it."""
        # A figure made alone leaves the whole report alone.
        words = ["python", "scripts/report.py", str(folder), "-o", f"{output}-{kind}" if kind else str(output)]
        if self.statistic != "last":
            words += ["--statistic", self.statistic]
        for key, wanted in (
            ("task", [task] if task else self.task),
            ("dataset", [] if task else self.dataset),
            ("model", [] if task else self.model),
            ("pruner", self.pruner),
            ("figures", [kind] if kind else self.figures if self.figures != list(plots.KINDS) else []),
        ):
            words += [f"--{key}", *wanted] if wanted else []
        return shlex.join(words)


@dataclass(frozen=True)
class Report:
    """What was written, for the terminal."""

    num_rows: int
    num_cells: int
    num_settings: int
    problems: tuple[str, ...]  # rows left out and files that cannot be read
    unfinished: tuple[str, ...]
    page: Path


def write(folder: Path, output: Path, options: Options) -> Report:
    """Writes tables, figures and a page on the runs of a results folder.

    Raises:
        ConfigError: a library is missing, the output cannot be written, an option is wrong, or no run has the accuracy
            asked for.
        DataError: there are no runs.
    """
    _check(folder, output, options)
    results = reading.read(folder, options.wants)
    found = cells(results.rows, options.statistic)
    looks = names.looks(found, results.directories)
    compared = grids(found)
    titles = names.settings(compared, results.directories)
    unreadable = Unreadable()

    sections = []
    for grid in compared:
        title = titles[grid.first.task, grid.first.checksum] + (", by filters" if grid.filters else "")
        differences = {level: comparison.comparisons(grid.at(level)) for level in grid.levels}
        shown = plots.look_up(grid, results.directories, options.figures, unreadable)
        figures = plots.figures(grid, looks, shown, options.figures)
        table = tables.accuracy(grid, title, differences, options.statistic, looks)
        commands = {f.kind: options.command(folder, output, grid.first.task, f.kind) for f in figures}
        stem = _stem(grid, compared)
        sections.append(Section(stem, grid, table, differences, shown, figures, commands))

    output = _prepared(output)
    written: list[str] = []

    def put(name: str, content: str | bytes) -> None:
        files.write_atomically(output / name, content.encode() if isinstance(content, str) else content)
        written.append(name)

    problems = [*results.refused.values(), *(f"{path}: {why}" for path, why in unreadable.paths.items())]
    unfinished = _unfinished(results)
    try:
        for section in sections:
            put(f"tables/{section.stem}.md", tables.markdown(section.table, looks))
            put(f"tables/{section.stem}.tex", tables.latex(section.table, looks))
            for figure in section.figures if options.images else []:
                for suffix, content in drawing.files(figure, looks).items():
                    put(f"figures/{section.stem}-{figure.kind}.{suffix}", content)
        lines = {
            "cells": ([tables.cell_row(cell, looks) for cell in found], tables.CELL_COLUMNS),
            "comparisons": (
                [row for s in sections for row in tables.comparison_rows(s.grid, s.differences, looks)],
                tables.COMPARISON_COLUMNS,
            ),
            "missing": ([row for s in sections for row in tables.missing_rows(s.grid, looks)], tables.MISSING_COLUMNS),
            "layers": (
                [row for s in sections for row in tables.layer_rows(s.grid, s.shown, looks)], tables.LAYER_COLUMNS
            ),
            "curves": (
                [row for s in sections for row in tables.curve_rows(s.grid, s.shown, looks)], tables.CURVE_COLUMNS
            ),
            "overlaps": (
                [row for s in sections for row in tables.overlap_rows(s.grid, s.shown, looks)], tables.OVERLAP_COLUMNS
            ),
        }  # fmt: skip
        for name, (rows, columns) in lines.items():
            put(f"{name}.csv", tables.as_csv(rows, columns))
        heading = page.Heading(
            str(folder), date.today().isoformat(), options.command(folder, output), options.statistic,
            len(results.rows), len(found), tuple(unfinished), tuple(problems), options.images,
        )  # fmt: skip
        put("index.html", page.render(heading, sections, looks, results.directories))
        _forget(output, written)
    except OSError as error:
        raise ConfigError(f"--output {output}: it cannot be written to ({error.strerror}); give another") from error
    return Report(
        len(results.rows), len(found), len(titles), tuple(problems), tuple(unfinished), output / "index.html"
    )  # fmt: skip


def _check(folder: Path, output: Path, options: Options) -> None:
    if options.statistic not in STATISTICS:
        raise ConfigError(f"--statistic {options.statistic}: give one of {', '.join(STATISTICS)}")
    if unknown := [kind for kind in options.figures if kind not in plots.KINDS]:
        raise ConfigError(f"--figures {unknown[0]}: give some of {', '.join(plots.KINDS)}")
    needed = {"scipy": "", "jinja2": ""} | ({"matplotlib": ", or give --no-images"} if options.images else {})
    for name, instead in needed.items():
        check_installed("a report needs", name, "report", instead)
    if folder.resolve() == output.resolve():
        raise ConfigError(f"--output {output}: that is the results folder; give another folder")


def _prepared(folder: Path) -> Path:
    """The output folder and those in it, made if need be."""
    try:
        for inner in (folder, folder / "tables", folder / "figures"):
            inner.mkdir(parents=True, exist_ok=True)
            if not os.access(inner, os.W_OK | os.X_OK):
                raise ConfigError(f"--output {inner}: it is not writable; give another folder")
    except OSError as error:
        raise ConfigError(f"--output {folder}: it cannot be made ({error.strerror}); give another folder") from error
    return folder


def _forget(output: Path, written: Sequence[str]) -> None:
    """Removes what an earlier report wrote into the folder and this one did not."""
    manifest = output / _MANIFEST
    magic, *earlier = manifest.read_text().splitlines() or [""] if manifest.is_file() else [""]
    for name in set(earlier) - set(written) if magic == _MAGIC else ():
        if re.fullmatch(r"\w+\.csv|tables/[\w.-]+\.(md|tex)|figures/[\w.-]+\.(png|svg)", name):
            (output / name).unlink(missing_ok=True)
    files.write_atomically(manifest, "".join(f"{line}\n" for line in (_MAGIC, *written)).encode())


def _stem(grid: Grid, among: Sequence[Grid]) -> str:
    """What files of a grid are called: the task, and what tells it from others of the same task."""
    others = [other for other in among if other.first.task == grid.first.task]
    words = [grid.first.task]
    if len({other.first.checksum for other in others}) > 1:
        words.append(grid.first.checksum[:8])
    if grid.filters:
        words.append("filters")
    return "-".join(words)


def _unfinished(results: Results) -> list[str]:
    """A line for each run directory without a result."""
    return [
        f"{name}: {state.name}" + (f", {state.error.partition(chr(10))[0]}" if state.error else "")
        for name, state in sorted(results.unfinished.items(), key=lambda item: (item[1].name, item[0]))
    ]
