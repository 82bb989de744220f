"""Makes what our runs of an experiment show anew: `python docs/results/renew.py EXPERIMENT RESULTS`.

RESULTS has the runs of an experiment of PAGES. Their rows go to docs/results/EXPERIMENT.tar.gz, their pictures beside
the page. Of the page, what lies between the marks is replaced: tables, and verdicts where papers have numbers. The text
around it is for a person to write: what it needs is printed.
"""

import argparse
import csv
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

from pai_bench.launch import compose, terminal
from pai_bench.published import matching, numbers, pages
from pai_bench.published.verdicts import Rule
from pai_bench.report import names, writing
from pai_bench.runs import archive, status

DOCS = Path(__file__).parents[1]
END = "<!-- down to here -->"


@dataclass(frozen=True)
class Page:
    """What is shown of an experiment."""

    file: str  # below docs/
    overrides: Sequence[str] = ()  # that choose a part of the experiment
    pictures: Sequence[str] = ("accuracy",)  # kinds of figures
    statistic: str = "last"
    accuracies: bool = True  # whether the table of accuracies is shown
    more: Sequence[str] = ()  # further tables of the report, by the ends of their names
    labels: Mapping[str, str] = field(default_factory=dict)  # instead of the names of methods

    def options(self, found: Sequence[dict[str, Any]], *, images: bool = True) -> writing.Options:
        """The options of its report on these rows: a part of the runs may lack what some label is of."""
        words = names.words(found)
        labels = {key: text for key, text in self.labels.items() if key in words}
        return writing.Options(statistic=self.statistic, figures=list(self.pictures), images=images, labels=labels)


PAGES = {
    "digits_baselines": Page("findings.md", pictures=("accuracy", "layers", "overlap")),
    "lottery_lenet": Page(
        "results/lottery_lenet.md",
        more=("early-stop",),
        labels={"magnitude": "Lottery tickets", "reinit": "new weights"},
    ),
    "mnist_curves": Page("results/mnist_curves.md", pictures=("accuracy", "layers")),
    "more_methods_mnist": Page(
        "results/more_methods_mnist.md",
        pictures=(),
        more=("accuracy-lost", "costs"),
        labels={
            "dense-e875c0a7": "AC/DC",
            "magnitude-f86d477c": "Magnitude, early bird",
            "random-1770d359": "SNFS, from ERK",
            "random-380792c7": "Random, ERK, weights rescaled",
            "random-3e6bb62b": "Random, pyramid",
            "random-6c68f3a5": "MEST, from ERK",
            "random-764cd4a3": "Random, ERK, weights drawn for their fan-in",
            "random-7b68cf4e": "Random, balanced",
            "random-941585d4": "SET with ITOP, from ERK",
            "random-b147587c": "GraNet, from ERK",
            "random-cfb85330": "Random, ERK+",
            "random-dce79bfa": "Random, constant fan-in",
            "random-fb27b9bd": "RigL with ITOP, from ERK",
            "random-fc466895": "MEST with a surplus, from ERK",
            "snip-4b034159": "SNIP, weights rescaled",
            "snip-bab25790": "SNIP, flow repaired",
            "snip-eb5767e8": "SNIP, to an effective sparsity",
        },
    ),
    "planted_helix": Page("planted.md", pictures=(), accuracies=False, more=("diagnostics",)),
    "planted_relu": Page("planted.md", pictures=(), accuracies=False, more=("diagnostics",)),
    "planted_tickets": Page("planted.md", pictures=(), accuracies=False, more=("diagnostics",)),
    "reviewer_table_mnist": Page(
        "results/reviewer_table_mnist.md",
        pictures=("accuracy", "cost"),
        more=("accuracy-lost", "costs"),
        labels={
            "dense-b6fee75c": "Gradual pruning",
            "magnitude-5af69a0f": "Magnitude",
            "magnitude-a9e9429a": "Lottery tickets",
            "random-4f15fbf3": "Random, ERK",
            "random-ac86efd9": "SET, from ERK",
            "random-c7b3bda4": "RigL, from ERK",
            "random-fd157be1": "Random, IGQ",
        },
    ),
    "snip_tables": Page(
        "results/snip_tables.md", ("dataset=mnist",), statistic="best", labels={"reinit": "new weights"}
    ),
}


def begin(experiment: str) -> str:
    """The mark above what is written of an experiment."""
    return f"<!-- docs/results/renew.py writes this of {experiment} -->"


def sweep(experiment: str) -> list[str]:
    """The overrides of the runs that are shown."""
    return [f"experiment={experiment}", *PAGES[experiment].overrides, "tracker=none"]


@cache  # composing hundreds of runs takes seconds
def wanted(experiment: str) -> tuple[str, ...]:
    """The names of the runs that are shown, in the order of the experiment."""
    return tuple(dict.fromkeys(config.id for config in compose.expand(sweep(experiment))[0]))


def rows(experiment: str, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of the runs that are there, in the order of the experiment, and the number of those that are not."""
    found = {row["id"]: row for row in status.read(folder)}
    there = [found[name] for name in wanted(experiment) if name in found]
    return there, len(wanted(experiment)) - len(there)


def chosen(experiment: str, folder: Path, place: Path) -> Path:
    """A folder with these runs alone."""
    place.mkdir()
    for row in rows(experiment, folder)[0]:
        (place / row["id"]).symlink_to((folder / row["id"]).resolve(), target_is_directory=True)
    return place


def about(experiment: str, folder: Path) -> str:
    """What the runs are: how many, of what, and at which commits."""
    found, num_missing = rows(experiment, folder)
    models, epochs = sorted({row["model"] for row in found}), sorted({row["epochs"] for row in found})
    shapes = {tuple(row["input_shape"][1:]) for row in found}
    seeds, hours = {row["seed"] for row in found}, sum(row["total_seconds"] for row in found) / 3600
    few = f"; {num_missing} more are to come" if num_missing else ""
    pixels = "" if shapes == {(1, 1)} else f" at {' and '.join(f'{h}x{w}' for h, w in sorted(shapes))} pixels"
    text = (
        f"{len(found)} runs of {' and '.join(models)} on {found[0]['dataset']}{pixels}, "
        f"{' or '.join(map(str, epochs))} epochs, {len(seeds)} seed{'s' * (len(seeds) > 1)}, at "
        f"{commits([folder / row['id'] for row in found])}{few}. They took {hours:.1f} hours together, on "
        f"{hardware(found)}."
    )
    return fill(text, 124)


def commits(directories: Sequence[Path]) -> str:
    """The commits of runs in words. Older rows and those of an installed package name none."""
    files = [path / "provenance.json" for path in directories]
    origins = [json.loads(path.read_text()) if path.exists() else {"commit": None} for path in files]
    named = [one for one in origins if one["commit"] is not None]
    known = ", ".join(sorted({f"{one['commit'][:7]}{' with changes' if one.get('dirty') else ''}" for one in named}))
    if not known:
        return "commits that the rows do not name"
    return f"commit {known}" + (" and at others that some rows do not name" if len(named) < len(origins) else "")


def hardware(found: Sequence[dict[str, Any]]) -> str:
    """What runs were made on, in words."""
    machines = {"CPU cores" if " cpu, " in row["hardware"] else row["hardware"] for row in found}
    return " and ".join(sorted(machines))


def tabled(experiment: str, report: Path) -> list[str]:
    """The tables of a report, and its pictures, which are copied, as Markdown."""
    page, parts = PAGES[experiment], []
    page_folder = (DOCS / page.file).parent
    pictures = page_folder if page_folder != DOCS else DOCS / "pictures"
    stems = tasks(report)
    for stem in stems:
        name = experiment if len(stems) == 1 else f"{experiment}-{stem.split('-')[1]}"
        for number, kind in enumerate(page.pictures):
            drawn, picture = report / "figures" / f"{stem}-{kind}.png", pictures / f"{name}-{kind}.png"
            if not drawn.is_file():  # nothing that is pruned is there yet
                continue
            picture.write_bytes(drawn.read_bytes())
            if number == 0:
                parts.append(f"![Test {kind} against compression]({picture.relative_to(page_folder)})")
        parts.append(tables(report, stem, page, named=len(stems) > 1))
    return parts


def tasks(report: Path) -> list[str]:
    """The names of the tables of accuracies, one for each task."""
    return sorted(path.stem for path in (report / "tables").glob("*.tex"))


def tables(report: Path, stem: str, page: Page, *, named: bool) -> str:
    """The table of accuracies and the others of the page; titled if there are several tasks."""
    parts = []
    if page.accuracies:
        text = (report / "tables" / f"{stem}.md").read_text()
        parts.append(text.strip() if named else text.partition("\n")[2].strip())
    for path in [report / "tables" / f"{stem}-{kind}.md" for kind in page.more]:
        if not path.is_file():  # nothing that it shows is there yet
            continue
        title, _, body = path.read_text().strip().partition("\n")
        head = f"{title if named else title.partition(':')[0]}\n" if page.accuracies else ""
        parts.append(f"{head}{body}".strip())
    return "\n\n".join(parts)


def verdicts(folder: Path) -> str:
    """The published numbers that the runs can be compared with, as Markdown; empty if there are none."""
    rule = Rule()
    found = matching.compare(numbers.read(numbers.PAPERS), status.read(folder, **matching.COLUMNS), folder, rule)
    listed = [comparison for comparison in found if comparison.groups]
    if not listed:
        return ""
    body = pages.markdown(listed, rule).partition("\n")[2].strip()
    return "### Published numbers and ours\n\n" + re.sub("^## ", "#### ", body, flags=re.M)


def facts(report: Path) -> list[str]:
    """Differences that the tests find, and the accuracies at the highest compression."""
    with (report / "comparisons.csv").open() as file:
        certain = [line for line in csv.DictReader(file) if line["significant"] == "1"]
    with (report / "configurations.csv").open() as file:
        every = list(csv.DictReader(file))
    last = max(every, key=lambda line: float(line["compression"]))["compression"]
    return [
        *(
            f"{one['first']} - {one['second']} at {one['compression']}: {one['difference']}, {one['p_holm']}"
            for one in certain
        ),
        *(
            f"{one['label']} at {last}: {100 * float(one['mean']):.1f} ± {100 * float(one['sd'] or 'nan'):.1f}"
            for one in every
            if one["compression"] == last
        ),
    ]


def marked(experiment: str) -> str:
    """A pattern of what is written of an experiment, with its marks."""
    return f"{re.escape(begin(experiment))}.*?{re.escape(END)}"


def check(experiment: str, folder: Path) -> None:
    """Ends the program with one line if there are no runs, or no place for what they show."""
    if experiment not in PAGES:
        raise SystemExit(f"{experiment}: it has no page; give one of {', '.join(PAGES)}")
    page = DOCS / PAGES[experiment].file
    if not page.is_file():
        raise SystemExit(f"{page}: there is no such page; write it, with the lines {begin(experiment)} and {END}")
    if not re.search(marked(experiment), page.read_text(), re.S):
        raise SystemExit(f"{page}: it lacks the lines {begin(experiment)} and {END}; add them where the tables go")
    if not rows(experiment, folder)[0]:
        raise SystemExit(f"{folder}: it has no finished runs of {experiment}; give their results_dir")


def main() -> None:
    """What the command does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help=", ".join(PAGES))
    parser.add_argument("results", type=Path, help="the folder with its runs")
    given = parser.parse_args()
    with terminal.one_line_errors():
        renew(given.experiment, given.results)


def renew(experiment: str, folder: Path) -> None:
    """Writes the page, the pictures and the rows, and prints the facts."""
    check(experiment, folder)
    page = DOCS / PAGES[experiment].file
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        runs, report = chosen(experiment, folder, place / "runs"), place / "report"
        writing.write(runs, report, PAGES[experiment].options(rows(experiment, folder)[0]))
        parts = [begin(experiment), about(experiment, folder), *tabled(experiment, report), verdicts(runs), END]
        text = "\n\n".join(filter(None, parts))
        archive.pack(runs, DOCS / "results" / f"{experiment}.tar.gz")
        page.write_text(re.sub(marked(experiment), lambda _: text, page.read_text(), flags=re.S))
        print("\n".join(facts(report)))


if __name__ == "__main__":
    main()
