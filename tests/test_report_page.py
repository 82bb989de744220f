"""Reports as files: tables, figures and the page, from made-up rows and from real runs."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT, RunCli
from report_rows import directory, many, results, row, rows, script, table, write

from pai_bench.errors import ConfigError
from pai_bench.report import plots, tables


class Page(HTMLParser):
    """What a page refers to, and whether its tags are closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.references += [value for key in ("src", "href") if (value := named.get(key))]
        self.ids += [value for value in [named.get("id")] if value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_report_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "report"
    report = write(results(tmp_path / "results", many()), output)
    assert (report.num_runs, report.num_configurations, report.num_tasks, report.problems) == (20, 7, 1, ())
    stem = "digits-resnet20-0000aaaa"
    assert {str(path.relative_to(output)) for path in output.rglob("*.*")} == {
        "index.html",
        ".pai_bench_report",
        f"tables/{stem}.md",
        f"tables/{stem}.tex",
        f"tables/{stem}-accuracy-lost.md",
        f"tables/{stem}-costs.md",
        *(f"{name}.csv" for name in ("configurations", "comparisons", "missing", "layers", "curves", "overlaps")),
        *(f"figures/{stem}-{kind}.{suffix}" for kind in plots.KINDS for suffix in ("png", "pdf", "svg")),
    }
    page = Page((output / "index.html").read_text())
    local = {reference for reference in page.references if not reference.startswith("#")}
    assert local and all((output / reference).is_file() for reference in local)
    assert len(set(page.ids)) == len(page.ids)
    for path in (output / "figures").iterdir():
        if path.suffix == ".svg":
            ElementTree.parse(path)
        else:
            assert path.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF-"}[path.suffix])


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    write(results(tmp_path / "results", many()), tmp_path / "report", images=False)
    text = (tmp_path / "report" / "index.html").read_text()
    assert not re.search(r"https?:|@import|url\((?!#)|<link|src=|fetch\(|XMLHttpRequest", text)


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    folder = results(tmp_path / "results", many())
    first, second = tmp_path / "1" / "report", tmp_path / "2" / "report"
    for output in (first, second):
        write(folder, output, figures=["accuracy", "collapse"])
    for path in first.rglob("*.*"):
        ours, theirs = path.read_bytes(), (second / path.relative_to(first)).read_bytes()
        if path.name == "index.html":  # which names its own folder
            theirs = theirs.replace(bytes(second), bytes(first))
        assert ours == theirs, path.name


def test_what_is_drawn_can_be_chosen(tmp_path: Path) -> None:
    folder, output = results(tmp_path / "results", many()), tmp_path / "report"
    write(folder, output, figures=["collapse"], pruner=["snip"], images=False)
    assert not list(output.rglob("*.png")) and not table(output, "overlaps") and not table(output, "layers")
    assert {line["label"] for line in table(output, "configurations")} == {"dense", "snip"}
    assert set(re.findall(r'<figure id="[^"]*" class="(\w+)"', (output / "index.html").read_text())) == {"collapse"}


def test_the_command_below_a_figure_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = results(tmp_path / "results", many()), tmp_path / "report"
    write(folder, output)
    commands = re.findall(
        r"<code>pai-bench (report [^<]*--figures accuracy)</code>", (output / "index.html").read_text()
    )
    (command,) = commands
    assert script(monkeypatch, *command.split()[1:]) == 0
    name = "figures/digits-resnet20-0000aaaa-accuracy.png"
    assert (tmp_path / "report-accuracy" / name).read_bytes() == (output / name).read_bytes()


def test_a_report_removes_what_the_one_before_it_left_and_nothing_else(tmp_path: Path) -> None:
    folder, output = results(tmp_path / "results", many()), tmp_path / "report"
    write(folder, output)
    (output / "figures" / "mine.png").write_bytes(b"mine")
    (output / "thesis.tex").write_text("mine")
    with (output / ".pai_bench_report").open("a") as file:
        file.write("thesis.tex\n")
    write(folder, output, figures=["collapse"])
    assert (output / "thesis.tex").is_file()
    names = {path.name.rpartition("-")[2] for path in (output / "figures").iterdir()}
    assert names == {"collapse.png", "collapse.pdf", "collapse.svg", "mine.png"}


# What a user may do wrong ---------------------------------------------------------------------------------------------


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = results(tmp_path / "results", [row("snip"), row("dense")]), str(tmp_path / "report")

    def ends(*arguments: str) -> tuple[int, str]:
        code = script(monkeypatch, *arguments, "--no-images")
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    assert ends(str(folder), "-o", output)[0] == 0
    (tmp_path / "empty").mkdir()
    code, said = ends(str(tmp_path / "empty"), "-o", str(tmp_path / "other"))
    assert code == 4 and said.count("\n") == 1 and "there are no runs" in said and not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("")
    code, said = ends(str(folder), "-o", str(tmp_path / "file" / "report"))
    assert code == 2 and said.count("\n") == 1 and "--output" in said
    code, said = ends(str(folder), "-o", str(folder))
    assert code == 2 and "the results folder" in said
    code, said = ends(str(folder), "-o", output, "--statistic", "selected")
    assert code == 2 and "dataset.validation" in said
    code, said = ends(str(folder), "-o", output, "--dataset", "cifar10")
    assert code == 4 and "no run has the task" in said


def test_a_broken_row_is_named_and_the_report_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(tmp_path / "results", [row("snip"), row("synflow")])
    broken = directory(folder, row("grasp"))
    (broken / "result.json").write_text('{"id": ')
    output = tmp_path / "report"
    assert script(monkeypatch, str(folder), "-o", str(output), "--no-images") == 1
    assert f"left out: {broken / 'result.json'}: it cannot be read" in capsys.readouterr().err
    assert broken.name in (output / "index.html").read_text()
    assert {line["label"] for line in table(output, "configurations")} == {"snip", "synflow"}


def test_an_unwritable_output_is_one_line(tmp_path: Path) -> None:
    folder = results(tmp_path / "results", [row("snip")])
    (tmp_path / "report" / "index.html").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--output .*: it cannot be written to"):
        write(folder, tmp_path / "report", images=False)


def test_only_unfinished_runs_make_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "results" / "one").mkdir(parents=True)
    (tmp_path / "results" / "one" / "status.json").write_text('{"state": "failed", "error": "no luck\\nat all"}')
    report = write(tmp_path / "results", tmp_path / "report")
    assert report.unfinished == ("one: failed, no luck",)
    assert "one: failed, no luck" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    "runs",
    [
        [row("dense")],
        [row("snip")],
        [row("snip", 0, 0.1, collapsed_layers=["3.weight"], output_depends_on_input=False, stopped="collapse")],
        rows(snip=[0.1, 0.1, 0.1], random=[0.1, 0.1, 0.1]),
        [row("snip", 0, 0.9, sparsity=0.0), row("snip", 0, 0.0, sparsity=0.5)],
        [row("snip", hardware="a"), row("random", hardware="b", score_examples=0, score_flops=0, prune_seconds=0.0)],
    ],
    ids=["dense", "one run", "not trained", "no variance", "sparsity 0", "no cost"],
)
def test_small_folders_make_reports(tmp_path: Path, runs: list[dict[str, Any]]) -> None:
    write(results(tmp_path / "results", runs), tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    Page(text)
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_runs_without_masks_and_curves_make_a_report_that_says_so(tmp_path: Path) -> None:
    folder = results(tmp_path / "results", [row("snip"), row("random")])
    for path in folder.glob("*/*"):
        if path.name != "result.json":
            path.unlink()
    report = write(folder, tmp_path / "report", images=False)
    assert len(report.problems) == 4 and all(line.endswith("No such file") for line in report.problems)
    kinds = set(re.findall(r'<figure id="[^"]*" class="(\w+)"', (tmp_path / "report" / "index.html").read_text()))
    assert kinds == {"accuracy", "collapse", "cost"}


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    name = "</script><b onclick='x'>&_%a$x_{$"
    runs = [row("snip", 0), row("snip", 0) | {"pruner": name, "method": "odd-00001111", "id": "odd"}]
    write(results(tmp_path / "results", runs), tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert name not in text and "<b onclick" not in text
    page = Page(text)
    said = [point[3] for script in page.scripts if script.startswith("[") for point in json.loads(script)]
    assert any(name in text for text in said)
    latex = (tmp_path / "report" / "tables" / "digits-resnet20-0000aaaa.tex").read_text()
    assert r"\&\_\%" in latex


# Real runs ------------------------------------------------------------------------------------------------------------

SMALL = ["model.widths=[4,8,8]", "model.blocks=[1,1,1]", "training.epochs=1", "training.batch_size=128", "tracker=none"]


def test_real_runs_make_a_report_and_the_page_on_results_names_every_column(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("-m", *SMALL, "pruner=snip,filter_magnitude", "schedule=one_shot", "sparsity=0.5")
    assert done.returncode == 0, done.stderr
    folder, output = tmp_path / "results", tmp_path / "report"
    report = write(folder, output)
    assert (report.num_runs, report.num_configurations, report.num_tasks, report.problems) == (2, 2, 1, ())
    assert {(c["label"], c["pruned"], c["n"]) for c in table(output, "configurations")} == {
        ("SNIP", "weights", "1"),
        ("Magnitude (filters)", "filters", "1"),
    }
    assert len(list((output / "tables").glob("*-filters.md"))) == 1
    path = next(folder.glob("*snip*"))
    documented = (ROOT / "docs" / "results.md").read_text()
    columns = documented.split("## The row\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", columns, re.M) == list(json.loads((path / "result.json").read_text()))
    kept = documented.split("## A run directory\n")[1].split("\n## ")[0]
    assert {p.name for p in path.iterdir()} <= set(re.findall(r"^\| `([\w./]+)` \|", kept, re.M))


@pytest.mark.parametrize("name", ["CONFIGURATION", "COMPARISON", "MISSING", "LAYER", "CURVE", "OVERLAP"])
def test_the_page_on_results_names_every_column_of_the_csv_files(name: str) -> None:
    documented = (ROOT / "docs" / "results.md").read_text().split("## The files of a report\n")[1].split("\n## ")[0]
    words = set(re.findall(r"`(\w+)`", documented))
    assert set(getattr(tables, f"{name}_COLUMNS")) <= words
