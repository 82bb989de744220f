"""Makes a report from a results folder. Begin to read at `write`."""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from pai_bench.errors import ConfigError, check_installed
from pai_bench.report import (
    accuracy_lost,
    axes,
    comparison,
    costs,
    diagnostics,
    drawing,
    early_stop,
    more_tables,
    names,
    page,
    plots,
    reading,
    tables,
)
from pai_bench.report.configurations import STATISTICS, Configuration, Grid, configurations, grids, is_dense
from pai_bench.report.evidence import Unreadable
from pai_bench.report.names import Look
from pai_bench.report.page import Section
from pai_bench.report.reading import Results, Row
from pai_bench.runs import archive
from pai_bench.system import files

# The file that lists the files of a report, and the first line of that file.
_MANIFEST, _MAGIC = ".pai_bench_report", "files of a report of pai_bench"


@dataclass(frozen=True)
class Options:
    """What goes into a report. An empty list means all."""

    statistic: str = "last"
    task: list[str] = field(default_factory=list)
    dataset: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    pruner: list[str] = field(default_factory=list)  # dense networks are always included
    figures: list[str] = field(default_factory=lambda: list(plots.KINDS))
    images: bool = True  # PNG, PDF and SVG files beside the page
    labels: dict[str, str] = field(default_factory=dict)  # instead of the names in tables and figures
    axis: str = "compression"  # what the axis of compression is labelled with

    def wants(self, row: Row) -> bool:
        """Whether a row belongs in the report."""
        by_name = all(
            not wanted or row[key] in wanted
            for key, wanted in (("task", self.task), ("dataset", self.dataset), ("model", self.model))
        )
        return by_name and (not self.pruner or row["pruner"] in self.pruner or is_dense(row))

    def command(self, folder: Path, output: Path, task: str | None = None, kind: str | None = None) -> str:
        """The command line that makes this report, or one figure of it."""
        # A single figure goes to another folder, so that it does not replace the report.
        words = ["pai-bench", "report", str(folder), "-o", f"{output}-{kind}" if kind else str(output)]
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
        words += [] if self.images else ["--no-images"]
        words += ["--axis", self.axis] if self.axis != "compression" else []
        for key, text in self.labels.items():
            words += ["--label", f"{key}={text}"]
        return shlex.join(words)


@dataclass(frozen=True)
class Report:
    """What was written: the facts for the terminal."""

    num_runs: int
    num_configurations: int
    num_tasks: int
    problems: tuple[str, ...]  # rows that were left out, and files that cannot be read
    unfinished: tuple[str, ...]
    page: Path


def write(folder: Path, output: Path, options: Options) -> Report:
    """Writes tables, figures and a page about the runs of a results folder.

    Raises:
        ConfigError: a library is missing, the output cannot be written, an option is wrong, or no run has the wanted
            accuracy.
        DataError: there are no runs.
    """
    with archive.opened(folder) as runs:
        return _written(runs, folder, output, options)


def _written(runs: Path, folder: Path, output: Path, options: Options) -> Report:
    _check(folder, output, options)
    results = reading.read(runs, options.wants)
    found = configurations(results.rows, options.statistic)
    _check_labels(options, results.rows)
    looks = names.looks(found, results.directories, options.labels)
    compared = grids(found)
    titles = names.tasks(compared, results.directories, options.labels)
    unreadable = Unreadable()
    absent = [kind for kind in options.figures if kind in _OF_FILES and not _holds(runs, folder, _OF_FILES[kind])]
    kinds = [kind for kind in options.figures if kind not in absent]
    about = _About(folder, output, options, kinds, results, looks)
    sections = [
        _section(grid, titles[grid.first.task, grid.first.checksum], _stem(grid, compared), about, unreadable)
        for grid in compared
    ]
    problems = [*results.refused.values(), *(f"{path}: {why}" for path, why in unreadable.paths.items())]
    if absent:
        wanted = " and ".join(_OF_FILES[kind] for kind in absent)
        problems.append(f"the figures {' and '.join(absent)}: {folder} was packed without {wanted}")
    heading = page.Heading(
        title=f"Pruning methods on {sections[0].table.title if len(sections) == 1 else f'{len(sections)} tasks'}",
        folder=str(folder),
        date=date.today().isoformat(),
        command=options.command(folder, output),
        statistic=options.statistic,
        num_runs=len(results.rows),
        num_configurations=len(found),
        unfinished=tuple(_unfinished(results)),
        problems=tuple(problems),
        images=options.images,
    )
    contents = {
        **_tables_and_figures(sections, looks),
        **_csv_files(found, sections, looks),
        "index.html": page.render(heading, sections, looks, results.directories),
    }
    _put(output, contents)
    return Report(
        heading.num_runs,
        heading.num_configurations,
        len(titles),
        heading.problems,
        heading.unfinished,
        output / "index.html",
    )


# What a file of pai-bench pack may lack, and the figures that are made of it.
_OF_FILES = {"curves": "metrics.csv", "overlap": "mask.safetensors"}


def _holds(runs: Path, folder: Path, name: str) -> bool:
    """Whether some run has a file of this name. In a folder each run ought to."""
    return runs == folder or any(runs.glob(f"*/{name}"))


@dataclass(frozen=True)
class _About:
    """What every section of a report needs."""

    folder: Path
    output: Path
    options: Options
    kinds: Sequence[str]  # of figures
    results: Results
    looks: Mapping[str, Look]


# Each is None where it would be empty.
_MORE_TABLES = (accuracy_lost.table, costs.table, early_stop.table, diagnostics.table)


def _section(grid: Grid, title: str, stem: str, about: _About, unreadable: Unreadable) -> Section:
    """The section of a report about one grid, with its figures."""
    options, kinds, looks = about.options, about.kinds, about.looks
    title += ", by filters" if grid.filters else ""
    differences = {level: comparison.comparisons(grid.at(level)) for level in grid.levels}
    shown = plots.look_up(grid, about.results.directories, kinds, unreadable)
    figures = [
        (figure, drawing.draw(figure, looks, f"{stem}-{figure.kind}", options.images))
        for figure in plots.figures(grid, looks, shown, kinds, options.axis)
    ]
    table = tables.accuracy(grid, title, differences, options.statistic, looks)
    commands = {f.kind: options.command(about.folder, about.output, grid.first.task, f.kind) for f, _ in figures}
    more = [found for make in _MORE_TABLES if (found := make(grid, looks)) is not None]
    return Section(stem, grid, table, more, differences, shown, figures, commands)


def _tables_and_figures(sections: Sequence[Section], looks: Mapping[str, Look]) -> dict[str, str | bytes]:
    """The contents of the tables for people and of the pictures, by file name."""
    contents: dict[str, str | bytes] = {}
    for section in sections:
        contents[f"tables/{section.stem}.md"] = tables.markdown(section.table, looks)
        contents[f"tables/{section.stem}.tex"] = tables.latex(section.table, looks)
        for more in section.more:
            contents[f"tables/{section.stem}-{more.kind}.md"] = more_tables.markdown(more, section.table.title)
        for figure, drawn in section.figures:
            if drawn.png is not None:
                contents[f"figures/{section.stem}-{figure.kind}.png"] = drawn.png
                contents[f"figures/{section.stem}-{figure.kind}.svg"] = drawn.svg
            if drawn.pdf is not None:
                contents[f"figures/{section.stem}-{figure.kind}.pdf"] = drawn.pdf
    return contents


def _csv_files(
    found: Sequence[Configuration], sections: Sequence[Section], looks: Mapping[str, Look]
) -> dict[str, str]:
    """The contents of the CSV files, by file name."""
    makers: dict[str, tuple[Callable[[Section], list[dict[str, Any]]], Sequence[str]]] = {
        "comparisons": (lambda s: tables.comparison_rows(s.grid, s.differences, looks), tables.COMPARISON_COLUMNS),
        "missing": (lambda s: tables.missing_rows(s.grid, looks), tables.MISSING_COLUMNS),
        "layers": (lambda s: tables.layer_rows(s.grid, s.shown, looks), tables.LAYER_COLUMNS),
        "curves": (lambda s: tables.curve_rows(s.grid, s.shown, looks), tables.CURVE_COLUMNS),
        "overlaps": (lambda s: tables.overlap_rows(s.grid, s.shown, looks), tables.OVERLAP_COLUMNS),
    }
    contents = {
        "configurations.csv": tables.as_csv(
            [tables.configuration_row(configuration, looks) for configuration in found], tables.CONFIGURATION_COLUMNS
        )
    }
    for name, (rows, columns) in makers.items():
        contents[f"{name}.csv"] = tables.as_csv([row for section in sections for row in rows(section)], columns)
    return contents


def _put(output: Path, contents: Mapping[str, str | bytes]) -> None:
    """Writes the files of a report, and removes the other files of an earlier report."""
    _prepare(output)
    try:
        for name, content in contents.items():
            files.write_atomically(output / name, content.encode() if isinstance(content, str) else content)
        _forget(output, list(contents))
    except OSError as error:
        raise ConfigError(f"--output {output}: it cannot be written to ({error.strerror}); give another") from error


def _check(folder: Path, output: Path, options: Options) -> None:
    if options.statistic not in STATISTICS:
        raise ConfigError(f"--statistic {options.statistic}: give one of {', '.join(STATISTICS)}")
    if unknown := [kind for kind in options.figures if kind not in plots.KINDS]:
        raise ConfigError(f"--figures {unknown[0]}: give some of {', '.join(plots.KINDS)}")
    if options.axis not in axes.LEVELS:
        raise ConfigError(f"--axis {options.axis}: give one of {', '.join(axes.LEVELS)}")
    for name in ("scipy", "jinja2", "matplotlib"):
        check_installed("a report needs", name, "report")
    if folder.resolve() == output.resolve():
        raise ConfigError(f"--output {output}: that is the results folder; give another folder")


def _check_labels(options: Options, rows: Sequence[Row]) -> None:
    known = names.words(rows)
    for key, text in options.labels.items():
        if key not in known:
            raise ConfigError(f"--label {key}={text}: the report has no {key}; give one of {', '.join(sorted(known))}")
        if not (text and text.isprintable()):
            raise ConfigError(f"--label {key}={text}: give a text that can be printed")


def _prepare(folder: Path) -> None:
    """Makes the output folder and the folders in it."""
    try:
        for inner in (folder, folder / "tables", folder / "figures"):
            inner.mkdir(parents=True, exist_ok=True)
            if not os.access(inner, os.W_OK | os.X_OK):
                raise ConfigError(f"--output {inner}: it is not writable; give another folder")
    except OSError as error:
        raise ConfigError(f"--output {folder}: it cannot be made ({error.strerror}); give another folder") from error


def _forget(output: Path, written: Sequence[str]) -> None:
    """Removes the files of an earlier report that this report did not write."""
    manifest = output / _MANIFEST
    magic, *earlier = manifest.read_text().splitlines() or [""] if manifest.is_file() else [""]
    for name in set(earlier) - set(written) if magic == _MAGIC else ():
        if re.fullmatch(r"\w+\.csv|tables/[\w.-]+\.(md|tex)|figures/[\w.-]+\.(png|pdf|svg)", name):
            (output / name).unlink(missing_ok=True)
    files.write_atomically(manifest, "".join(f"{line}\n" for line in (_MAGIC, *written)).encode())


def _stem(grid: Grid, among: Sequence[Grid]) -> str:
    """The beginning of a grid's file names: the task, and whatever distinguishes grids of the same task."""
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
