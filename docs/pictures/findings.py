"""The first table and the pictures of docs/findings.md: `python docs/pictures/findings.py RESULTS` makes them anew.

RESULTS has the runs of `pai-bench experiment=digits_baselines`, all of them. What lies between the marks on the page is
replaced. The text below it is for a person to write: what it needs is printed.
"""

import csv
import json
import re
import sys
import tempfile
from pathlib import Path
from textwrap import fill
from typing import Any

from pai_bench.launch import compose
from pai_bench.report import writing

DOCS = Path(__file__).parents[1]
BEGIN, END = "<!-- docs/pictures/findings.py writes this -->", "<!-- down to here -->"
SWEEP = ["experiment=digits_baselines", "tracker=none"]
HIGHEST = "300"  # compression that README.md names


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the sweep, in its order."""
    files = [folder / cfg.id / "result.json" for cfg in compose.expand(SWEEP)[0]]
    if missing := sum(not file.is_file() for file in files):
        sys.exit(f"{missing} of {len(files)} runs are missing in {folder}: pai-bench {' '.join(SWEEP)}")
    return list({file: json.loads(file.read_text()) for file in files}.values())


def about(folder: Path) -> str:
    """What the runs are: how many, of what, and at which commit."""
    found = rows(folder)
    commits = {json.loads((folder / row["id"] / "provenance.json").read_text())["commit"][:7] for row in found}
    ((_, height, width),) = {tuple(row["input_shape"]) for row in found}
    (epochs,), num_seeds = {row["epochs"] for row in found}, len({row["seed"] for row in found})
    hours = sum(row["total_seconds"] for row in found) / 3600
    return fill(
        f"{len(found)} runs of ResNet-20 on the 1,797 digits of scikit-learn at {height}x{width} pixels, {epochs} "
        f"epochs, {num_seeds} seeds, at commit {', '.join(sorted(commits))}. They took {hours:.1f} hours together, on "
        "cores that did other work too.",
        124,
    )


def written(folder: Path, report: Path) -> str:
    """Copies the pictures of a report, and returns its table as Markdown."""
    for kind in ("accuracy", "layers", "overlap"):
        (picture,) = (report / "figures").glob(f"*-{kind}.png")
        (DOCS / "pictures" / f"digits-{kind}.png").write_bytes(picture.read_bytes())
    (table,) = (report / "tables").glob("*.md")
    picture = "![Test accuracy against compression](pictures/digits-accuracy.png)"
    return f"{about(folder)}\n\n{picture}\n\n{table.read_text().partition(chr(10))[2].strip()}"


def facts(report: Path) -> list[str]:
    """Differences that the tests find, and the accuracies at the highest compression."""
    with (report / "comparisons.csv").open() as file:
        certain = [line for line in csv.DictReader(file) if line["significant"] == "1"]
    with (report / "configurations.csv").open() as file:
        last = [line for line in csv.DictReader(file) if line["compression"].startswith(HIGHEST)]
    return [
        *(
            f"{one['first']} - {one['second']} at {one['compression']}: {one['difference']}, {one['p_holm']}"
            for one in certain
        ),
        *(f"{one['label']} {100 * float(one['mean']):.1f} ± {100 * float(one['sd']):.1f}" for one in last),
    ]


def main() -> None:
    """Writes the page and the pictures, and prints the facts."""
    folder, page = Path(sys.argv[1]), DOCS / "findings.md"
    rows(folder)  # ends here if one is missing
    with tempfile.TemporaryDirectory() as place:
        writing.write(folder, Path(place), writing.Options())
        text = f"{BEGIN}\n\n{written(folder, Path(place))}\n\n{END}"
        page.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: text, page.read_text(), flags=re.S))
        print("\n".join(facts(Path(place))))


if __name__ == "__main__":
    main()
