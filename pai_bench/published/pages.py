"""Comparisons as text for a terminal, Markdown, CSV and JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pai_bench.errors import ConfigError
from pai_bench.published.matching import MISSING, NO_EXPERIMENT, NOT_COMPARABLE, Comparison
from pai_bench.published.numbers import EVIDENCE, NETWORK, QUANTITIES, Number, Table
from pai_bench.published.verdicts import DEVIATES, REPRODUCED, UNDERPOWERED, Rule, Sample
from pai_bench.system import files

ORDER = (REPRODUCED, DEVIATES, UNDERPOWERED, NOT_COMPARABLE, MISSING, NO_EXPERIMENT)
FORMATS = (".csv", ".json", ".md")


def text(comparisons: Sequence[Comparison], rule: Rule) -> str:
    """One text table for each table of a paper."""
    lines: list[str] = []
    for table, some in groupby(comparisons, key=lambda comparison: comparison.number.table):
        header, *rows = _cells(list(some), rule)
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines += [_heading(table), *(f"  {line}" for line in _about(table)), ""]
        for cells in (header, *rows):
            padded = [
                cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append(f"  {'  '.join(padded)}".rstrip())
        lines.append("")
    return "\n".join(lines)


def markdown(comparisons: Sequence[Comparison], rule: Rule, chosen: Sequence[Comparison] | None = None) -> str:
    """The same tables in Markdown, with headings, and the counts of verdicts.

    Args:
        chosen: all comparisons that were asked for, which are counted. None: those that are shown.
    """
    lines = ["# Published numbers and ours", "", f"{stated(rule)}.", ""]
    for table, some in groupby(comparisons, key=lambda comparison: comparison.number.table):
        header, *rows = _cells(list(some), rule)
        lines += [f"## {_heading(table)}", "", *(f"- {line}" for line in _about(table)), ""]
        alignments = ["---", *["---:"] * 4, *["---"] * (len(header) - 5)]
        lines += [*map(files.markdown_row, [header, alignments, *rows]), ""]
    return "\n".join([*lines, counted(comparisons if chosen is None else chosen), ""])


def stated(rule: Rule) -> str:
    """The rule in words."""
    return (
        f"margin {100 * rule.margin:g} points, or {rule.spread:g} published standard deviations where these are more, "
        "and half of the last printed digit; "
        f"{100 * rule.confidence:g} % intervals of the difference, ours minus theirs"
    )


def counted(comparisons: Sequence[Comparison]) -> str:
    """How many numbers got each verdict."""
    counts = Counter(comparison.name for comparison in comparisons)
    words = "   ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])
    return f"{words}   of {len(comparisons)} published {'number' if len(comparisons) == 1 else 'numbers'}"


def records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A flat record for each comparison. Accuracies are fractions."""
    return [_record(comparison) for comparison in comparisons]


def write(
    comparisons: Sequence[Comparison], path: Path, rule: Rule, chosen: Sequence[Comparison] | None = None
) -> None:
    """Writes comparisons to a file, whole or not at all. The ending of its name chooses the format.

    Args:
        chosen: as in `markdown`.

    Raises:
        ConfigError: the format is unknown, or the file cannot be written.
    """
    check_format(path)
    if path.suffix == ".md":
        content = markdown(comparisons, rule, chosen)
    elif path.suffix == ".json":
        found = {"rule": vars(rule), "comparisons": records(comparisons)}
        content = json.dumps(files.valid(found), indent=2, allow_nan=False) + "\n"
    else:
        content = files.csv_text(records(comparisons), list(_record(comparisons[0])) if comparisons else [])
    try:
        files.write_atomically(path, content.encode())
    except OSError as error:
        raise ConfigError(f"--output {path}: it cannot be written ({error.strerror}); give another file") from error


def check_format(path: Path) -> None:
    """Checks that the ending of a file's name is a known format.

    Raises:
        ConfigError: it is not.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--output {path}: give a name that ends in {', '.join(FORMATS)}")


def _heading(table: Table) -> str:
    where = f" (arXiv:{table.arxiv})" if table.arxiv else ""
    return f"{table.title}{where}, {table.name}"


def _about(table: Table) -> Iterator[str]:
    yield QUANTITIES[table.quantity][1]
    yield f"published: {table.source} [{table.evidence}: {EVIDENCE[table.evidence]}]"
    yield f"recipe: {' '.join(table.recipe)}" if table.recipe is not None else f"no experiment: {table.no_recipe}"
    if table.note:
        yield table.note


def _cells(comparisons: Sequence[Comparison], rule: Rule) -> list[list[str]]:
    """A header, and a line for each comparison."""
    lines = [["", "ours", "published", f"difference [{100 * rule.confidence:g} %]", "margin", "verdict", ""]]
    for comparison in comparisons:
        number, verdict = comparison.number, comparison.verdict
        scale, digits = (100, ".2f") if number.table.is_accuracy else (1, ".4f")

        def shown(sample: Sample, scale: int = scale, digits: str = digits) -> str:
            deviation = "" if sample.sd is None else f" ±{scale * sample.sd:{digits}}"
            return f"{scale * sample.mean:{digits}}{deviation} ({sample.num or '?'})"

        difference = margin = ""
        if verdict is not None and comparison.ours is not None:
            difference, margin = f"{scale * verdict.difference:+{digits}}", f"{scale * verdict.margin:{digits}}"
            if verdict.interval is not None:
                low, high = (f"{scale * end:+{digits}}" for end in verdict.interval)
                difference += f" [{low}, {high}]"
        published = shown(Sample(number.value, number.sd, number.num_runs))
        ours = shown(comparison.ours) if comparison.ours else "-"
        reason = comparison.reason if comparison.name != NO_EXPERIMENT else ""
        lines.append([_short(number), ours, published, difference, margin, comparison.name, reason])
    return lines


def _short(number: Number) -> str:
    words = [number.settings[key] for key in NETWORK]
    words += [f"{key}={value}" for key, value in number.settings.items() if key not in NETWORK]
    words += [number.target] if number.target else []
    return " ".join(words + ([f"layer {number.layer}"] if number.layer else []))


def _record(comparison: Comparison) -> dict[str, Any]:
    number, ours = comparison.number, comparison.ours
    verdict = comparison.verdict if ours else None
    table, interval = number.table, verdict.interval if verdict else None
    return {
        "paper": table.paper,
        "table": table.name,
        "arxiv": table.arxiv,
        "quantity": table.quantity,
        "evidence": table.evidence,
        "source": table.source,
        "recipe": " ".join(table.recipe or ()) or None,
        **{key: number.settings[key] for key in NETWORK},
        "settings": " ".join(f"{key}={value}" for key, value in number.settings.items() if key not in NETWORK) or None,
        "target": number.target,
        "density": number.density,
        "layer": number.layer,
        "ours": ours and ours.mean,
        "ours_sd": ours and ours.sd,
        "ours_num": ours and ours.num,
        "published": number.value,
        "published_sd": number.sd,
        "published_num": number.num_runs,
        "difference": verdict and verdict.difference,
        "low": interval and interval[0],
        "high": interval and interval[1],
        "margin": verdict and verdict.margin,
        "verdict": comparison.name,
        "num_needed": verdict and verdict.num_needed,
        "reason": comparison.reason or table.no_recipe,
        "groups": " ".join(comparison.groups) or None,
    }
