"""Reports as files: tables, figures and the page, from made-up rows and from real runs."""

import csv
import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT, RunCli
from test_report import directory, row, rows

from pai_bench.errors import ConfigError
from pai_bench.report import names, plots, tables, writing
from pai_bench.report.comparison import comparisons
from pai_bench.report.configurations import Grid, configurations, grids

DENSITIES = {"dense": 1.0, "random": 0.3, "snip": 0.2, "synflow": 0.1}


def results(parent: Path, runs: list[dict[str, Any]]) -> Path:
    """A results folder; masks are random, of one density for each pruner."""
    rng = np.random.default_rng(0)
    for run in runs:
        density = DENSITIES.get(run["pruner"], 0.5)
        mask = {f"{i}.weight": rng.random(60) < density for i in range(3)}
        mask["3.weight"] = np.zeros(60, bool) if run["collapsed_layers"] else np.ones(60, bool)
        accuracy = run["test_top1"] or 0.0
        directory(parent, run, mask, [(float(epoch), accuracy * epoch / 4) for epoch in range(5)])
    return parent


def many() -> list[dict[str, Any]]:
    """Three methods and the dense network, two compressions, three seeds; some collapse, one run is missing."""
    runs = rows((0.9, 0.99), snip=[0.93, 0.935, 0.931], synflow=[0.90, 0.907, 0.905], random=[0.1, 0.85, 0.86])
    runs += rows(dense=[0.95, 0.952, 0.957])
    for run in runs:
        if run["pruner"] == "random" and run["seed"] == 0:
            run |= {"collapsed_layers": ["3.weight"], "output_depends_on_input": False}
    return [run for run in runs if not (run["pruner"] == "snip" and run["seed"] == 2 and run["sparsity"] == 0.99)]


def write(folder: Path, output: Path, **options: Any) -> writing.Report:
    return writing.write(folder, output, writing.Options(**options))


def table(output: Path, name: str) -> list[dict[str, str]]:
    with (output / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


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


def script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of scripts/report.py."""
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts" / "report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return int(ended.value.code or 0)


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


# Tables ---------------------------------------------------------------------------------------------------------------


def made(runs: list[dict[str, Any]]) -> tuple[Grid, tables.Table, dict[str, names.Look]]:
    found = configurations(runs)
    looks = names.looks(found, {run["id"]: Path("nowhere") for run in runs})
    (grid,) = grids(found)
    differences = {level: comparisons(grid.at(level)) for level in grid.levels}
    return grid, tables.accuracy(grid, "digits, resnet20", differences, "last", looks), looks


def test_markdown_shows_means_deviations_and_what_is_missing() -> None:
    _, table, looks = made(many())
    lines = tables.markdown(table, looks).splitlines()
    assert "dense: 95.30 ± 0.36" in lines
    assert "| method | 10× (90 %) | 100× (99 %) |" in lines
    (snip,) = (line for line in lines if line.startswith("| snip"))
    mean, sd = 100 * np.mean([0.93, 0.935]), 100 * np.std([0.93, 0.935], ddof=1)
    assert f"{mean:.2f} ± {sd:.2f} (n = 2)" in snip
    (noisy,) = (line for line in lines if line.startswith("| random"))
    assert noisy.count("\\*") == 2
    assert "Seeds that are missing: snip at 100× without seed 2." in "\n".join(lines)


def test_configurations_without_a_run_are_dashes_and_untrained_ones_marked() -> None:
    runs = [row("snip", 0), row("snip", 1, 0.1, stopped="collapse"), row("synflow", 0, sparsity=0.99)]
    _, table, looks = made(runs)
    text = tables.markdown(table, looks)
    assert "| snip | 90.00 (n = 1) ‡ | – |" in text and "| synflow | – | 90.00 (n = 1) |" in text
    assert "left runs untrained" in text and "A dash: there is no run" in text


def test_marks_say_what_is_best_and_what_cannot_be_told_from_it() -> None:
    seeds = {"snip": [0.93, 0.935, 0.931], "synflow": [0.931, 0.93, 0.932], "random": [0.2, 0.21, 0.215]}
    _, table, looks = made(rows(**seeds))
    text = tables.markdown(table, looks)
    assert "| **93.20 ± 0.26** |" in text and "| 93.10 ± 0.10 † |" in text and "| 20.83 ± 0.76 |" in text
    assert "Bold: the best mean" in text and "† A paired t test cannot tell it from the best mean" in text
    assert "There is no run of the dense network." in text and "no test was made" not in text
    _, table, looks = made(rows(**{name: values[:2] for name, values in seeds.items()}))
    text = tables.markdown(table, looks)
    assert "- 2 seeds: no test was made, because that takes 3." in text and "†" not in text and text.count("**") == 2


@pytest.mark.parametrize("dense", [True, False])
def test_the_dense_network_is_drawn_or_missing(tmp_path: Path, dense: bool) -> None:
    runs = rows(snip=[0.93, 0.935], synflow=[0.9, 0.91], **({"dense": [0.95, 0.952]} if dense else {}))
    write(results(tmp_path / "results", runs), tmp_path / "report", images=False)
    text = (tmp_path / "report" / "index.html").read_text()
    assert ("the dashed line is the dense network" in text) == dense
    missing = [(line["label"], line["seeds"]) for line in table(tmp_path / "report", "missing")]
    assert missing == ([] if dense else [("dense", "0 1")])


def test_a_share_of_paths_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    runs = [row("snip", 0, effective_sparsity=None), row("snip", 1)]
    assert not write(results(tmp_path / "results", runs), tmp_path / "report", images=False).problems
    (configuration,) = table(tmp_path / "report", "configurations")
    assert configuration["effective_sparsity"] == ""


@pytest.mark.parametrize("library", ["matplotlib", "scipy", "jinja2"])
def test_a_library_that_is_missing_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results(tmp_path / "results", rows(snip=[0.93, 0.935, 0.91], synflow=[0.9, 0.91, 0.92]))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"a report needs {library}, which is not installed: pip install {library}"):
        write(folder, tmp_path / "report", images=False)
    assert not (tmp_path / "report").exists()


def test_latex_is_a_booktabs_table_with_its_entries_in_place() -> None:
    _, table, looks = made(many())
    text = tables.latex(table, looks)
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1 and r"\begin{tabular}{lrr}" in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("synflow"))
    means = re.findall(r"(\d+\.\d+) \\pm", line)
    assert means == ["90.40", "90.40"] and line.count("&") == 2
    assert not re.search(r"(?<!\\)[%_#]", text.partition("\n")[2])


def test_bold_in_every_format_is_the_same_entry() -> None:
    runs = rows(snip=[0.93, 0.935, 0.931, 0.936], synflow=[0.80, 0.807, 0.801, 0.805])
    _, table, looks = made(runs)
    bold = [(method, entry.bold) for method, (entry,) in table.rows]
    assert bold == [("snip-1111bbbb", True), ("synflow-1111bbbb", False)]
    assert tables.markdown(table, looks).count("**") == 2 and tables.latex(table, looks).count(r"\mathbf") == 1


def test_csv_files_hold_fractions_that_add_up(tmp_path: Path) -> None:
    output = tmp_path / "report"
    write(results(tmp_path / "results", many()), output, images=False)
    (snip,) = (c for c in table(output, "configurations") if c["label"] == "snip" and c["sparsity"] == "0.9")
    assert float(snip["mean"]) == pytest.approx(np.mean([0.93, 0.935, 0.931])) and snip["seeds"] == "0 1 2"
    assert float(snip["ci_high"]) - float(snip["mean"]) == pytest.approx(4.302652730 * float(snip["sd"]) / 3**0.5)
    (versus,) = (
        c
        for c in table(output, "comparisons")
        if {c["first"], c["second"]} == {"snip", "synflow"} and c["sparsity"] == "0.9"
    )
    sign = 1 if versus["first"] == "snip" else -1
    assert sign * float(versus["difference"]) == pytest.approx(np.mean([0.03, 0.028, 0.026]))
    assert [c["seeds"] for c in table(output, "missing")] == ["2"]
    pairs = table(output, "overlaps")
    assert len(pairs) == 6 and {c["seed"] for c in pairs} == {"0"}
    layers = {(c["label"], c["index"]): float(c["density"]) for c in table(output, "layers") if c["sparsity"] == "0.9"}
    assert layers["snip", "4"] == 1 and layers["random", "4"] == pytest.approx(2 / 3)


def test_the_table_starts_with_the_best_at_the_highest_compression() -> None:
    runs = rows(dense=[0.9] * 3)
    for method, at in {"low": (0.8, 0.3), "high": (0.6, 0.5), "chance": (0.7, 0.1), "luck": (0.2, 0.12)}.items():
        runs += [row(method, s, a, sparsity) for s in range(3) for a, sparsity in zip(at, (0.9, 0.99), strict=True)]
    runs.append(row("alone", 0, 0.9, 0.9))
    grid, table, looks = made(runs)
    # All means near chance are equal there, so that the lower compression decides.
    order = ["high", "low", "chance", "luck", "alone"]
    assert [looks[method].label for method, _ in table.rows] == order
    assert [name for name, _ in table.dense] == ["dense-1111bbbb"]
    figure = plots.accuracy(grid, looks)
    assert figure is not None and [looks[method].label for method in figure.methods] == ["dense", *order]


def test_nothing_is_bold_at_chance() -> None:
    _, table, looks = made(rows(snip=[0.12, 0.14, 0.13], synflow=[0.10, 0.11, 0.10]))
    text = tables.markdown(table, looks)
    assert "**" not in text and "†" not in text and "- No method is above chance (10 %) at 10×." in text
    many_classes = [run | {"num_classes": 100} for run in rows(snip=[0.12, 0.14, 0.13], synflow=[0.10, 0.11, 0.10])]
    _, table, looks = made(many_classes)
    text = tables.markdown(table, looks)
    assert text.count("**") == 2 and "chance" not in text
    of_targets = [run | {"num_classes": 1, "regression": True} for run in many_classes]
    _, table, looks = made(of_targets)
    assert tables.markdown(table, looks) == text  # nobody guesses the targets of a regression


def test_warnings_come_first_and_name_what_collapsed() -> None:
    _, table, looks = made([run for run in many() if run["pruner"] != "dense"])
    assert table.warnings == (
        "There is no run of the dense network.",
        "Networks collapsed at 10×: random (1 of 3 seeds).",
        "Networks collapsed at 100×: random (1 of 3 seeds).",
    )
    lines = tables.markdown(table, looks).splitlines()
    assert lines[2:5] == [f"- {warning}" for warning in table.warnings]
    assert table.warnings[0] in tables.latex(table, looks)


def test_the_page_begins_with_what_was_compared_and_the_best_methods(tmp_path: Path) -> None:
    other = [run | {"task": "digits-vgg16-11112222", "model": "vgg16"} for run in rows(synflow=[0.5, 0.6, 0.7])]
    for run in other:
        run["id"] = f"other-{run['seed']}"
    folder = results(tmp_path / "results", many())
    write(folder, tmp_path / "report", images=False)
    text = (tmp_path / "report" / "index.html").read_text()
    head = text[text.index("<h1>") : text.index("</header>")]
    assert "Pruning methods on digits, resnet20" in head
    assert "snip, synflow and random at 10× and 100× compression, 3 seeds each." in head
    best = re.findall(r"<dt>Best at ([^<]*)</dt><dd><svg.*?</svg> ([^<]*)</dd>", head)
    assert [(ratio, words[:13]) for ratio, words in best] == [("10×", "snip, 93.20 ±"), ("100×", "snip, 93.25 ±")]
    for word in ("cell", "protocol", "checksum", "cafecafe", "0000aaaa"):  # of insiders
        assert word not in head
    origin = text[text.index("Where the numbers come from") :]
    assert "protocol" in origin and "cafecafe" in origin
    assert "Best method by task" not in text
    write(results(folder, other), tmp_path / "both", images=False)
    text = (tmp_path / "both" / "index.html").read_text()
    overview = text[text.index("Best method by task") : text.index("</header>")]
    assert "Pruning methods on 2 tasks" in text
    assert re.findall(r"(\w+ \d+\.\d+)</td>", overview) == ["snip 93.20", "snip 93.25", "synflow 60.00"]


def test_names_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder, output = results(tmp_path / "results", many()), tmp_path / "report"
    words = ["--label", "snip=SNIP", "--label", "resnet20=ResNet-20", "--label", "dense=Dense", "--no-images"]
    assert script(monkeypatch, str(folder), "-o", str(output), *words, "--axis", "sparsity") == 0
    assert {line["label"] for line in table(output, "configurations")} == {"Dense", "SNIP", "synflow", "random"}
    text = (output / "index.html").read_text()
    assert "digits, ResNet-20" in text and "Accuracy against sparsity" in text
    assert "--axis sparsity --label snip=SNIP --label resnet20=ResNet-20" in text
    capsys.readouterr()
    assert script(monkeypatch, str(folder), "-o", str(output), "--label", "snipp=SNIP") == 2
    assert "--label snipp=SNIP: the report has no snipp; give one of" in capsys.readouterr().err


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
