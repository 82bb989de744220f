"""Makes tables, figures and a page from a results folder.

Writes index.html, which opens from disk and needs no network, tables/ (Markdown, LaTeX), figures/ (PNG, PDF, SVG) and
CSV files. docs/results.md explains them.

  pai-bench report results -o report
  pai-bench report results -o report --statistic best --dataset cifar10 --pruner snip synflow
  pai-bench report results -o report --figures accuracy overlap
  pai-bench report results -o report --label resnet20=ResNet-20 --axis sparsity
"""

import argparse
import sys
from pathlib import Path

from pai_bench.launch import terminal
from pai_bench.report import axes, configurations, names, plots, writing


def _label(text: str) -> tuple[str, str]:
    """The two sides of KEY=TEXT."""
    key, equals, label = text.partition("=")
    if not (key and equals and label):
        raise argparse.ArgumentTypeError(f"{text}: give KEY=TEXT, as in snip=SNIP")
    return key, label


def main() -> None:
    """Writes the report, and prints what is in it. Exits with 1 if a part of the results could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a results folder, or a file of pai-bench pack")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write to; made if need be")
    parser.add_argument(
        "--statistic",
        choices=list(configurations.STATISTICS),
        default="last",
        help="which accuracy: of the last epoch, of the best test epoch, or of the epoch that a validation split "
        "chooses by accuracy (selected) or by loss (early_stop)",
    )
    for name, what in (("task", "ids of tasks"), ("dataset", "names"), ("model", "names")):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME", help=f"{what}; all if not given")
    parser.add_argument("--pruner", nargs="+", default=[], metavar="NAME", help="and dense networks; all if not given")
    parser.add_argument(
        "--figures",
        nargs="+",
        choices=plots.KINDS,
        default=list(plots.KINDS),
        metavar="KIND",
        help=f"some of {', '.join(plots.KINDS)}; all if not given",
    )
    parser.add_argument("--axis", choices=list(axes.LEVELS), default="compression", help="the labels of that axis")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        type=_label,
        metavar="KEY=TEXT",
        help="another name of a pruner, allocation, schedule, ablation, dataset, model, or id; may be repeated",
    )
    parser.add_argument("--no-images", action="store_true", help="the page and the tables, no PNG, PDF and SVG files")
    given = parser.parse_args()
    with terminal.one_line_errors():
        options = writing.Options(
            given.statistic,
            given.task,
            given.dataset,
            given.model,
            given.pruner,
            given.figures,
            not given.no_images,
            dict(given.label),
            given.axis,
        )
        report = writing.write(given.results, given.output, options)
        for word, lines, file in (
            ("not finished", report.unfinished, sys.stdout),
            ("left out", report.problems, sys.stderr),
        ):
            for line in lines[:20]:
                print(f"{word}: {line}", file=file)
            if len(lines) > 20:
                print(f"{word}: {len(lines) - 20} more, which the page names", file=file)
        print(
            f"{names.counted(report.num_runs, 'run')}, {names.counted(report.num_configurations, 'configuration')}, "
            f"{names.counted(report.num_tasks, 'task')}: {report.page}"
        )
        sys.exit(1 if report.problems else 0)
