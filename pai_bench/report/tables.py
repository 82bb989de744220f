"""Tables of a report. For people: Markdown, LaTeX and the page, in percent. For programs: CSV, in fractions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pai_bench.report import findings, names
from pai_bench.report.comparison import FEWEST, Difference, best, critical, not_below_best
from pai_bench.report.configurations import Configuration, Grid, compression
from pai_bench.report.names import Look
from pai_bench.report.plots import Shown
from pai_bench.system.files import csv_text, markdown_row

UNTOLD, UNTESTED, UNTRAINED, ASTERISK = "†", "§", "‡", "*"


@dataclass(frozen=True)
class Entry:
    """One entry of a table. None: there is no such value."""

    mean: float | None  # percent
    sd: float | None
    n: int
    bold: bool = False
    marks: str = ""
    few: bool = False  # whether it has fewer seeds than some other configuration
    run: bool = True  # whether there is a run at all


@dataclass(frozen=True)
class Table:
    """Accuracy by method and sparsity."""

    title: str
    columns: tuple[tuple[str, str], ...]  # compression and sparsity
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]  # by method's id
    dense: tuple[tuple[str, Entry], ...]
    warnings: tuple[str, ...]  # what a reader must know first
    notes: tuple[str, ...]


def accuracy(
    grid: Grid, title: str, differences: Mapping[float, Sequence[Difference]], statistic: str, looks: Mapping[str, Look]
) -> Table:
    """The table of a grid.

    Args:
        differences: all comparisons at each sparsity.
        statistic: a key of configurations.STATISTICS.
    """
    full = len(grid.seeds)
    bold = {level: best(grid, level) for level in grid.levels}
    marked = {level: not_below_best(grid, level, differences.get(level, ())) for level in grid.levels}

    def entry(configuration: Configuration | None) -> Entry:
        if configuration is None:
            return Entry(None, None, 0, run=False)
        untold, untested = marked.get(configuration.sparsity, ((), ()))
        marks = UNTOLD * (configuration.method in untold) + UNTESTED * (configuration.method in untested)
        marks += (UNTRAINED if configuration.untrained else "") + (ASTERISK if configuration.share("either") else "")
        mean, sd = (None if value is None else 100 * value for value in (configuration.mean, configuration.sd))
        return Entry(
            mean,
            sd,
            configuration.n,
            configuration.method in bold.get(configuration.sparsity, ()),
            marks,
            configuration.n < full,
        )

    rows = tuple(
        (method, tuple(entry(grid.configurations.get((method, level))) for level in grid.levels))
        for method in grid.methods
    )
    dense = tuple((configuration.method, entry(configuration)) for configuration in grid.dense)
    entries = [*(entry for _, line in rows for entry in line), *(entry for _, entry in dense)]
    columns = tuple((names.compression(level), names.sparsity(level)) for level in grid.levels)
    warnings = tuple(findings.warnings(grid, differences, looks))
    return Table(title, columns, rows, dense, warnings, _notes(grid, entries, statistic, looks))


_MEANING = {
    "last": "after the last epoch",
    "best": "in the epoch that is best on the test set itself, which flatters",
    "selected": "in the epoch that is best on the validation split",
    "early_stop": "in the epoch with the lowest loss on the validation split",
}


def _notes(grid: Grid, entries: Sequence[Entry], statistic: str, looks: Mapping[str, Look]) -> tuple[str, ...]:
    full = len(grid.seeds)
    spread = "mean ± sample standard deviation (n - 1)" if full > 1 else "one seed, so no deviation"
    notes = [f"Test accuracy in percent {_MEANING[statistic]}: {spread}; n = {full} unless said otherwise."]
    if grid.filters:
        notes.append("Columns are the share of filters that is pruned, and its compression; not that of weights.")
    if any(entry.bold for entry in entries):
        most = any(entry.few and entry.run for entry in entries)
        notes.append(f"Bold: the best mean of a column{', of those with the most seeds' if most else ''}.")
    if any(UNTOLD in entry.marks for entry in entries):
        notes.append(
            f"{UNTOLD} A paired t test does not show it to be below the best mean at 5 % (Holm, over all pairs of the "
            "column), which with few seeds says little."
        )
    if any(UNTESTED in entry.marks for entry in entries):
        notes.append(
            f"{UNTESTED} It was not tested against the best mean: the two have fewer than {FEWEST} seeds in common, or "
            "the same difference in every seed."
        )
    if any(not entry.run for entry in entries):
        notes.append("A dash: there is no run.")
    if any(UNTRAINED in entry.marks for entry in entries):
        notes.append(
            f"{UNTRAINED} on_collapse=stop left runs untrained. They count in no mean, and what has them is in no test."
        )
    if any(ASTERISK in entry.marks for entry in entries):
        notes.append(f"{ASTERISK} In some seed a layer keeps nothing or the output does not depend on the image.")
    without = sum(len(configuration.without_value) for configuration in [*grid.configurations.values(), *grid.dense])
    if without:
        notes.append(f"Without a validation split, and not counted: {names.counted(without, 'run')}.")
    few = [
        f"{looks[method].label}{f' at {names.compression(level)}' if level else ''} without {_list(absent)}"
        for method, level, absent in grid.missing()
        if len(absent) < len(grid.seeds)
    ]
    if few:
        rest = f", and {names.counted(len(few) - 8, 'more configuration')}" if len(few) > 8 else ""
        notes.append(f"Seeds that are missing: {'; '.join(few[:8])}{rest}.")
    return tuple(notes)


def _list(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))


# For people -----------------------------------------------------------------------------------------------------------


def number(entry: Entry) -> str:
    """An entry as plain text: 93.10 ± 0.12 (n = 2) †."""
    if entry.mean is None:
        return f"– {entry.marks}".strip()
    deviation = f" ± {entry.sd:.2f}" if entry.sd is not None else ""
    few = f" (n = {entry.n})" if entry.few else ""
    return f"{entry.mean:.2f}{deviation}{few}" + (f" {entry.marks}" if entry.marks else "")


def markdown(table: Table, looks: Mapping[str, Look]) -> str:
    """A table for GitHub and notebooks."""

    def shown(entry: Entry) -> str:
        text = number(entry).replace(ASTERISK, "\\*")
        return f"**{text}**" if entry.bold else text

    lines = [f"### {table.title}", ""]
    lines += [f"- {warning}" for warning in table.warnings] + [""] * bool(table.warnings)
    lines += [f"{looks[method].label}: {shown(entry)}" for method, entry in table.dense]
    if table.rows:
        lines += ["", markdown_row(["method", *(f"{ratio} ({share})" for ratio, share in table.columns)])]
        lines.append("| --- |" + " ---: |" * len(table.columns))
        for method, entries in table.rows:
            lines.append(markdown_row([looks[method].label, *map(shown, entries)]))
    notes = [note.replace(ASTERISK, "\\*") for note in table.notes]
    return "\n".join([*lines, "", *notes, ""])


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$", "±": r"$\pm$", "†": r"$^\dagger$",
    "‡": r"$^\ddagger$", "§": r"$^\S$", "–": "--", "*": r"$^*$", "|": r"\textbar{}",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def latex(table: Table, looks: Mapping[str, Look]) -> str:
    r"""A table for \usepackage{booktabs}."""

    def shown(entry: Entry) -> str:
        if entry.mean is None:
            return _latex(number(entry))
        figure = f"{entry.mean:.2f}" + (rf" \pm {entry.sd:.2f}" if entry.sd is not None else "")
        figure = rf"$\mathbf{{{figure}}}$" if entry.bold else f"${figure}$"
        few = f" ($n = {entry.n}$)" if entry.few else ""
        return figure + few + _latex(entry.marks)

    width = max(1, len(table.columns))
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_latex(' '.join([f'{table.title}.', *table.warnings, *table.notes]))}}}",
        rf"  \begin{{tabular}}{{l{'r' * width}}}",
        r"    \toprule",
    ]
    if table.rows:
        lines.append("    method & " + " & ".join(_latex(ratio) for ratio, _ in table.columns) + r" \\")
        lines.append("    & " + " & ".join(_latex(share) for _, share in table.columns) + r" \\")
        lines.append(r"    \midrule")
    for method, entry in table.dense:
        lines.append(rf"    {_latex(looks[method].label)} & \multicolumn{{{width}}}{{c}}{{{shown(entry)}}} \\")
    if table.dense and table.rows:
        lines.append(r"    \midrule")
    for method, entries in table.rows:
        lines.append(f"    {_latex(looks[method].label)} & " + " & ".join(map(shown, entries)) + r" \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


# For programs ---------------------------------------------------------------------------------------------------------


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV with a header. None gives an empty field; a sequence is joined by spaces."""
    joined = [{k: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in row.items()} for row in rows]
    return csv_text(joined, columns)


CONFIGURATION_COLUMNS = (
    "task", "protocol", "dataset", "model", "training", "dataset_checksum", "method", "label", "pruner",
    "allocation", "schedule", "ablation", "rewire", "transfer", "pruned", "sparsity", "compression", "statistic",
    "n", "seeds", "mean", "sd", "ci_low", "ci_high", "min", "max", "untrained_seeds", "seeds_without_value",
    "collapsed_share", "no_signal_share", "weight_density", "effective_sparsity", "macs_masked", "search_examples",
    "search_flops", "search_seconds", "total_seconds",
)  # fmt: skip


def configuration_row(configuration: Configuration, looks: Mapping[str, Look]) -> dict[str, Any]:
    """A configuration as a line of configurations.csv. The interval is the 95 % interval of the mean (Student's t)."""
    row = configuration.rows[0]
    half = critical(configuration.n) * configuration.sd / configuration.n**0.5 if configuration.sd is not None else None
    mean = configuration.mean
    interval = (None, None) if half is None or mean is None else (mean - half, mean + half)
    same = {name: row[name] for name in CONFIGURATION_COLUMNS[:7]}
    return same | {
        "label": looks[configuration.method].label,
        **{name: row[name] for name in CONFIGURATION_COLUMNS[8:12]},
        "rewire": row.get("rewire", "none"),
        "transfer": row.get("transfer", "none"),
        "pruned": "nothing" if configuration.dense else "filters" if configuration.filters else "weights",
        "sparsity": configuration.sparsity,
        "compression": configuration.compression,
        "statistic": configuration.statistic,
        "n": configuration.n,
        "seeds": list(configuration.values),
        "mean": mean,
        "sd": configuration.sd,
        "ci_low": interval[0],
        "ci_high": interval[1],
        "min": min(configuration.values.values(), default=None),
        "max": max(configuration.values.values(), default=None),
        "untrained_seeds": configuration.untrained,
        "seeds_without_value": configuration.without_value,
        "collapsed_share": configuration.share("collapsed"),
        "no_signal_share": configuration.share("no_signal"),
        "weight_density": configuration.average("density"),
        "effective_sparsity": configuration.effective_sparsity,
        "macs_masked": configuration.average("macs_masked"),
        **{f"search_{cost}": configuration.search(cost) for cost in ("examples", "flops", "seconds")},
        "total_seconds": configuration.seconds,
    }


PLACE_COLUMNS = ("task", "dataset_checksum", "pruned")
COMPARISON_COLUMNS = (
    *PLACE_COLUMNS, "sparsity", "compression", "first", "second", "first_method", "second_method", "n", "seeds",
    "difference", "sd", "ci_low", "ci_high", "p", "p_holm", "significant", "resolvable", "seeds_needed", "remark",
)  # fmt: skip
MISSING_COLUMNS = (*PLACE_COLUMNS, "sparsity", "compression", "label", "method", "seeds")
LAYER_COLUMNS = (
    *PLACE_COLUMNS, "sparsity", "compression", "label", "method", "index", "layer", "size", "density", "sd", "seeds",
)  # fmt: skip
CURVE_COLUMNS = (*PLACE_COLUMNS, "sparsity", "compression", "label", "method", "epoch", "mean", "sd", "seeds")
OVERLAP_COLUMNS = (
    *PLACE_COLUMNS, "sparsity", "compression", "seed", "first", "second", "first_method", "second_method",
    "kept_first", "kept_second", "common", "common_by_chance", "jaccard", "jaccard_by_chance", "of_smaller",
)  # fmt: skip


def _place(grid: Grid, level: float) -> dict[str, Any]:
    pruned = "filters" if grid.filters else "weights"
    return {
        "task": grid.first.task,
        "dataset_checksum": grid.first.checksum,
        "pruned": pruned,
        "sparsity": level,
        "compression": compression(level),
    }


def comparison_rows(
    grid: Grid, differences: Mapping[float, Sequence[Difference]], looks: Mapping[str, Look]
) -> list[dict[str, Any]]:
    """Lines of comparisons.csv."""
    rows = []
    for level, found in differences.items():
        for d in found:
            low, high = d.interval or (None, None)
            rows.append(
                _place(grid, level)
                | {
                    "first": looks[d.first].label,
                    "second": looks[d.second].label,
                    "first_method": d.first,
                    "second_method": d.second,
                    "n": len(d.seeds),
                    "seeds": d.seeds,
                    "difference": d.mean,
                    "sd": d.sd,
                    "ci_low": low,
                    "ci_high": high,
                    "p": d.p,
                    "p_holm": d.p_holm,
                    "significant": None if d.p is None else int(d.significant),
                    "resolvable": d.resolvable,
                    "seeds_needed": d.seeds_needed,
                    "remark": d.remark,
                }
            )
    return rows


def missing_rows(grid: Grid, looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Lines of missing.csv."""
    return [
        _place(grid, level) | {"label": looks[method].label, "method": method, "seeds": seeds}
        for method, level, seeds in grid.missing()
    ]


def layer_rows(grid: Grid, shown: Shown, looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Lines of layers.csv."""
    return [
        _place(grid, level)
        | {
            "label": looks[method].label,
            "method": method,
            "index": index,
            "layer": layer.name,
            "size": layer.size,
            "density": layer.density.mean,
            "sd": layer.density.sd,
            "seeds": layer.density.seeds,
        }
        for (method, level), found in shown.layers.items()
        for index, layer in enumerate(found, 1)
    ]


def curve_rows(grid: Grid, shown: Shown, looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Lines of curves.csv."""
    return [
        _place(grid, level)
        | {
            "label": looks[method].label,
            "method": method,
            "epoch": epoch,
            "mean": value.mean,
            "sd": value.sd,
            "seeds": value.seeds,
        }
        for (method, level), curve in shown.curves.items()
        for epoch, value in curve.items()
    ]


def overlap_rows(grid: Grid, shown: Shown, looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Lines of overlaps.csv."""
    return [
        _place(grid, level)
        | {
            "seed": pair.seed,
            "first": looks[pair.first].label,
            "second": looks[pair.second].label,
            "first_method": pair.first,
            "second_method": pair.second,
            "kept_first": pair.kept_first,
            "kept_second": pair.kept_second,
            "common": pair.common,
            "common_by_chance": pair.common_by_chance,
            "jaccard": pair.jaccard,
            "jaccard_by_chance": pair.jaccard_by_chance,
            "of_smaller": pair.of_smaller,
        }
        for level, (_, pairs) in shown.overlaps.items()
        for pair in pairs
    ]
