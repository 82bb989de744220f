"""The page of a report: one HTML file. It needs no network and no other file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from pai_bench.report import drawing, findings, names, tables
from pai_bench.report.comparison import Difference, best, resolvable
from pai_bench.report.configurations import Configuration, Grid
from pai_bench.report.drawing import Drawing
from pai_bench.report.figure import Figure
from pai_bench.report.findings import Best
from pai_bench.report.more_tables import MoreTable
from pai_bench.report.names import Look
from pai_bench.report.plots import Shown
from pai_bench.report.tables import Table

_HERE = Path(__file__).parent
_NUMBERS_OF_SEEDS = (3, 5, 10, 20)
_STATISTICS = {
    "last": "Test accuracies are those of the last epoch",
    "best": "Test accuracies are those of the best test epoch, which flatters",
    "selected": "Test accuracies are those of the epoch selected on the validation split",
    "early_stop": "Test accuracies are those of the epoch with the lowest loss on the validation split",
}
_EXCEEDED = "↑"  # in the table of the best methods
_MOST_COMPARISONS = 150  # of one grid, on the page; comparisons.csv has all


@dataclass(frozen=True)
class Section:
    """The part of a report about one grid."""

    stem: str
    grid: Grid
    table: Table
    more: Sequence[MoreTable]
    differences: Mapping[float, Sequence[Difference]]  # by sparsity
    shown: Shown
    figures: Sequence[tuple[Figure, Drawing]]
    commands: Mapping[str, str]  # by kind of figure


@dataclass(frozen=True)
class Heading:
    """The facts about a report itself."""

    title: str
    folder: str
    date: str
    command: str
    statistic: str
    num_runs: int
    num_configurations: int
    unfinished: tuple[str, ...]
    problems: tuple[str, ...]
    images: bool


def render(
    heading: Heading, sections: Sequence[Section], looks: Mapping[str, Look], directories: Mapping[str, Path]
) -> str:
    """The whole page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": tables.number, "counted": names.counted, "leading": _leading}
    template = environment.get_template("page.html")
    swatches = {method: f"swatch-{index}" for index, method in enumerate(looks)}
    return template.render(
        heading=heading,
        statistic=_STATISTICS[heading.statistic],
        sections=[_described(section, looks, directories) for section in sections],
        overview=_overview(sections, looks) if len(sections) > 1 else None,
        looks=looks,
        numbers_of_seeds=_NUMBERS_OF_SEEDS,
        swatches=swatches,
        symbols=[drawing.swatch(looks[method], name) for method, name in swatches.items()],
        style=(_HERE / "page.css").read_text(),
        script=(_HERE / "page.js").read_text(),
    )


def _leading(text: str) -> str:
    """The number at the beginning of a text, by which its column is sorted; empty if there is none."""
    found = re.match(r"[-+\d.,e]+", text)
    return found.group().replace(",", "") if found else ""


def _described(section: Section, looks: Mapping[str, Look], directories: Mapping[str, Path]) -> dict[str, Any]:
    """The words and numbers that the template prints for a section."""
    grid = section.grid
    row = grid.first.rows[0]
    every = [*grid.dense, *grid.configurations.values()]
    differences, left_out = _chosen(section)
    return {
        "stem": section.stem,
        "table": section.table,
        "more": section.more,
        "facts": [
            ("training", f"{row['training']}, {names.counted(row['epochs'], 'epoch')}"),
            ("seeds", ", ".join(map(str, grid.seeds[:20])) + (" ..." if len(grid.seeds) > 20 else "")),
            ("runs", f"{sum(len(one.rows) for one in every):,}"),
        ],
        "compared": findings.compared(grid, looks),
        "best": [
            (names.compression(one.level), one.methods[0] if len(one.methods) == 1 else None, one.words)
            for one in findings.winners(grid, section.differences, looks)
        ],
        "identity": [
            ("task", row["task"]),
            ("protocol", str(row["protocol"])),
            ("checksum of the images", row["dataset_checksum"][:8]),
            ("configurations (a method at a sparsity)", f"{len(every):,}"),
        ],
        "figures": [(figure, drawn, section.commands[figure.kind]) for figure, drawn in section.figures],
        "comparisons": [_compared(level, found, looks) for level, found in differences],
        "left_out": left_out,
        "tested": any(d.p is not None for _, d in differences),
        "resolution": _resolution(section),
        "costs": [_cost(configuration, looks) for configuration in every],
        "missing": [
            (looks[method].label, names.compression(level) if level else "", ", ".join(map(str, seeds)), len(seeds))
            for method, level, seeds in grid.missing()
        ],
        "origin": _origin(grid, directories),
    }


def _overview(sections: Sequence[Section], looks: Mapping[str, Look]) -> dict[str, Any]:
    """The best method of every task at every sparsity."""
    found = [
        (section, {one.level: one for one in findings.winners(section.grid, section.differences, looks)})
        for section in sections
    ]
    levels = sorted({level for _, winners in found for level in winners})

    def entry(winners: Mapping[float, Best], level: float) -> tuple[str | None, str]:
        one = winners.get(level)
        mark = f" {_EXCEEDED}" if one is not None and one.exceeded else ""
        if one is None or one.mean is None:
            return None, "all at chance" if one is not None and one.at_chance else f"–{mark}"
        labels = ", ".join(looks[method].label for method in one.methods)
        return one.methods[0] if len(one.methods) == 1 else None, f"{labels} {one.mean:.2f}{mark}"

    rows = []
    for section, winners in found:
        dense = max((c.mean for c in section.grid.dense if c.mean is not None), default=None)
        words = "–" if dense is None else names.percent(dense)
        rows.append((section.stem, section.table.title, words, [entry(winners, level) for level in levels]))
    exceeded = any(one.exceeded for _, winners in found for one in winners.values())
    return {
        "columns": [names.compression(level) for level in levels],
        "rows": rows,
        "mark": _EXCEEDED if exceeded else None,
    }


def _chosen(section: Section) -> tuple[list[tuple[float, Difference]], int]:
    """The comparisons for the page with their sparsities, and the number of comparisons that are left out.

    If there are too many, only those with the best method or the dense network stay.
    """
    found = [(level, difference) for level, group in section.differences.items() for difference in group]
    shown = found
    if len(found) > _MOST_COMPARISONS:
        special = {
            (level, configuration.method) for level in section.grid.levels for configuration in section.grid.dense
        }
        special |= {(level, method) for level in section.grid.levels for method in best(section.grid, level)}
        shown = [(level, d) for level, d in found if {(level, d.first), (level, d.second)} & special]
    return shown, len(found) - len(shown)


def _compared(level: float, d: Difference, looks: Mapping[str, Look]) -> dict[str, Any]:
    first, second, sign = (d.first, d.second, 1) if d.mean >= 0 else (d.second, d.first, -1)
    interval = None
    if d.interval is not None:
        interval = tuple(sorted(100 * sign * end for end in d.interval))
    return {
        "ratio": names.compression(level),
        "level": level,
        "first": looks[first].label,
        "second": looks[second].label,
        "n": len(d.seeds),
        "mean": 100 * sign * d.mean,
        "sd": None if d.sd is None else 100 * d.sd,
        "interval": interval,
        "p": d.p,
        "p_holm": d.p_holm,
        "significant": d.significant,
        "resolvable": None if d.resolvable is None else 100 * d.resolvable,
        "seeds_needed": d.seeds_needed,
        "remark": d.remark,
    }


def _resolution(section: Section) -> list[dict[str, Any]]:
    """The differences that given numbers of seeds can find at each sparsity, for the median spread of the pairs."""
    lines = []
    for level, group in section.differences.items():
        tested = sorted(d.sd for d in group if d.p is not None and d.sd is not None)
        if tested:
            sd = median_low(tested)
            found = [100 * sd * resolvable(n) for n in _NUMBERS_OF_SEEDS]
            lines.append({"ratio": names.compression(level), "sd": 100 * sd, "pairs": len(tested), "found": found})
    return lines


def _cost(configuration: Configuration, looks: Mapping[str, Look]) -> dict[str, Any]:
    values = [
        configuration.search("examples"),
        configuration.search("flops"),
        configuration.search("seconds"),
        configuration.seconds,
        configuration.average("macs_masked"),
    ]
    effective = configuration.effective_sparsity
    return {
        "label": looks[configuration.method].label,
        "level": configuration.sparsity,
        "ratio": names.compression(configuration.sparsity),
        "values": [("", "–") if value is None else (value, names.amount(value)) for value in values],
        "density": 100 * configuration.average("density"),
        "effective": None if effective is None else 100 * (1 - effective),
        "mean": configuration.mean,
    }


def _origin(grid: Grid, directories: Mapping[str, Path]) -> dict[str, list[str]]:
    """The commands and commits of one run of each method, and the machines of all runs."""
    commands: dict[str, None] = {}
    commits: dict[str, None] = {}
    for configuration in {
        configuration.method: configuration for configuration in [*grid.dense, *grid.configurations.values()]
    }.values():
        try:
            found = json.loads((directories[configuration.rows[0]["id"]] / "provenance.json").read_text())
            if "command" in found:  # a packed run has none
                commands[" ".join(["python", *map(str, found["command"])])] = None
            commits[f"{(found['commit'] or 'unknown')[:12]}{', with changes' if found['dirty'] else ''}"] = None
        except (OSError, ValueError, KeyError, TypeError):
            commits["unknown: a run has no provenance.json"] = None
    machines = sorted(
        {
            row["hardware"]
            for configuration in [*grid.dense, *grid.configurations.values()]
            for row in configuration.rows
        }
    )
    return {"commands": list(commands)[:12], "commits": list(commits), "machines": machines}
