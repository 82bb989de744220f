"""Compares finished runs with the numbers of papers, and says for each number whether it was reproduced.

  pai-bench verify results
  pai-bench verify results --only synflow "Figure 6" vgg16  # some of them
  pai-bench verify results --all                            # those without runs or experiment here, too
  pai-bench verify results --strict -o verdicts.csv         # or .md, .json
  pai-bench verify results.tar.gz                           # what pai-bench pack wrote

A run counts only if its whole config, except for the seed, equals the recipe of the paper. Other runs of the same
network and method are listed with the settings in which they differ. docs/published.md explains the verdicts, and how
to add papers.
"""

import argparse
from pathlib import Path

from pai_bench.errors import DataError, NotReproducedError
from pai_bench.launch import terminal
from pai_bench.published import matching, numbers, pages
from pai_bench.published.verdicts import Rule
from pai_bench.runs import archive, status


def _arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a results folder, or a file of pai-bench pack")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="numbers that every word fits: part of a paper's or a table's name, or a value",
    )
    parser.add_argument("--all", action="store_true", help="also list the numbers without a run")
    parser.add_argument(
        "--margin",
        type=float,
        default=100 * Rule.margin,
        metavar="POINTS",
        help="what a difference may be, in percentage points (%(default)g)",
    )
    parser.add_argument(
        "--spread",
        type=float,
        default=Rule.spread,
        metavar="N",
        help="or so many published standard deviations, where these are more (%(default)g)",
    )
    parser.add_argument(
        "--confidence", type=float, default=Rule.confidence, metavar="P", help="of the intervals (%(default)g)"
    )
    parser.add_argument(
        "--papers", type=Path, action="append", default=[], metavar="FOLDER", help="with papers of your own"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 5 unless every number with an experiment here was reproduced"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write what is listed, too: .csv, .md or .json"
    )
    return parser.parse_args()


def main() -> None:
    """Prints the comparisons. With --strict, exits with 5 if a number was not reproduced."""
    arguments = _arguments()
    terminal.start_process()
    with terminal.one_line_errors():
        rule = Rule(arguments.margin / 100, arguments.spread, arguments.confidence)
        rule.check()
        if arguments.output:
            pages.check_format(arguments.output)
        chosen = numbers.choose(numbers.read(numbers.PAPERS, *arguments.papers), arguments.only)
        with archive.opened(arguments.folder) as folder:
            rows = status.read(folder, **matching.COLUMNS)
            if not rows:
                raise DataError(f"{arguments.folder}: there are no finished runs; give a results folder that has some")
            comparisons = matching.compare(chosen, rows, folder, rule)
        listed = [comparison for comparison in comparisons if arguments.all or comparison.groups]
        print(pages.text(listed, rule) if listed else "no run here can be compared with a published number\n")
        print(f"{pages.stated(rule)}\n{pages.counted(comparisons)}")
        if arguments.output:
            pages.write(listed, arguments.output, rule, comparisons)
            print(f"written: {arguments.output}")
        failing = matching.not_reproduced(comparisons)
        if arguments.strict and failing:
            num_missing = sum(comparison.name == matching.MISSING for comparison in failing)
            raise NotReproducedError(
                f"{len(failing)} of {len(comparisons)} numbers were not reproduced, {num_missing} for want of a run"
            )
