"""Tables of a report: means, marks and what is missing, in every format."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from report_rows import made, many, results, row, rows, script, table, write
from scipy.stats import ttest_rel

from pai_bench.errors import ConfigError
from pai_bench.report import accuracy_lost, costs, diagnostics, early_stop, findings, more_tables, plots, tables


def written(kind: ModuleType, *of: Any) -> str:
    """The table of a kind as Markdown."""
    table = kind.table(*of)
    assert table is not None
    return more_tables.markdown(table, "a task")


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


def test_a_bar_in_a_label_breaks_no_table() -> None:
    grid, table, looks = made(many())
    named = {key: replace(look, label=look.label.replace("snip", "|w|")) for key, look in looks.items()}
    assert "\n| \\|w\\| |" in tables.markdown(table, named)
    assert "\n| \\|w\\| |" in written(costs, grid, named)
    assert r"\textbar{}w\textbar{}" in tables.latex(table, named)


def test_costs_are_multiples_of_one_training_of_the_dense_network() -> None:
    dense = 6 * 500 * 400  # two operations for each of three times 500 multiply-adds, for 400 images
    runs = [
        row("dense", 0, score_flops=0, train_flops=dense),
        row("snip", 0, score_flops=dense // 100, macs_masked=50, train_flops=dense),
        row("magnitude", 0, score_flops=0, search_train_flops=3 * dense, macs_masked=50, train_flops=dense),
        row("rigl", 0, score_flops=0, train_macs_per_image=300, train_flops=dense),
        row("edge_popup", 0, score_flops=0, search_train_flops=dense, train_examples=0, train_flops=0),
        row("given", 0, mask="mask.safetensors", macs_masked=500, train_flops=dense),
        row("collapsed", 0, score_flops=0, macs_masked=50, train_flops=dense),
        row("collapsed", 1, score_flops=0, macs_masked=50, train_flops=0, train_examples=0, stopped="collapse"),
        row("stopped", 0, score_flops=0, train_flops=0, train_examples=0, stopped="collapse"),
    ]
    grid, _, looks = made(runs)
    text = written(costs, grid, looks)
    cells = dict(re.findall(r"^\| ([\w ]+?) +\| ([^|]+) \|$", text, flags=re.M))
    assert cells.pop("method") == "10×"
    assert cells == {
        "snip": "0.01 + 0.1", "magnitude": "3 + 0.1", "rigl": "0 + 0.2", "edge_popup": "1 + 0", "given": "? + 1",
        "collapsed": "0 + 0.1", "stopped": "0 + –",
    }  # fmt: skip
    assert "A question mark" in text
    for others in (
        [row("snip", 0)],
        [row("dense", 0)],
        [row("dense", 0, train_flops=0, train_examples=0), row("snip", 0)],
    ):
        without, _, looks = made(others)
        assert costs.table(without, looks) is None


def test_the_accuracy_lost_is_that_against_the_dense_network_of_the_same_seed() -> None:
    dense, snip, near = [0.95, 0.952, 0.957], [0.93, 0.935, 0.931], [0.949, 0.953, 0.956]
    runs = rows((0.9,), dense=dense, snip=snip, near=near, equal=dense, two=[0.951, 0.942])
    runs += [row("stopped", 0, 0.1, stopped="collapse"), row("stopped", 1), row("elsewhere", 7)]
    grid, _, looks = made(runs)
    text = written(accuracy_lost, grid, looks)
    cells = dict(re.findall(r"^\| ([\w ]+?) +\| ([^|]+) \|$", text, flags=re.M))
    lost = 100 * (np.array(dense) - np.array(snip))
    assert cells == {
        "method": "10×",
        "snip": f"{lost.mean():.2f} ± {lost.std(ddof=1):.2f} (n = 3)",
        "near": "0.03 ± 0.12 (n = 3) †",
        "equal": "0.00 ± 0.00 (n = 3) §",
        "two": "0.45 ± 0.78 (n = 2) §",
        "stopped": "–",
        "elsewhere": "–",
    }
    assert "n = 4 unless said otherwise" in text and "† A paired t test" in text and "§ Not tested" in text


def test_the_accuracy_lost_is_corrected_for_the_methods_of_their_column_alone() -> None:
    dense = [0.95, 0.952, 0.957, 0.951]
    lower = {
        f"m{i}": [value - 0.01 * (i + 1) - 0.001 * (seed % 2) for seed, value in enumerate(dense)] for i in range(4)
    }
    grid, _, _ = made(rows((0.9,), dense=dense, **lower))
    found = accuracy_lost.lost(grid, 0.9)
    by_hand = {name: ttest_rel(dense, values).pvalue for name, values in lower.items()}
    order = sorted(by_hand, key=by_hand.__getitem__)
    assert len(found) == 4
    for rank, name in enumerate(order):  # these p values rise so fast that no running maximum is needed
        assert found[f"{name}-1111bbbb"].p_holm == pytest.approx(min(1, (4 - rank) * by_hand[name]))


def test_without_a_dense_network_no_accuracy_is_lost() -> None:
    for runs in ([row("snip", 0)], [row("dense", 0)], [row("dense", 0), row("snip", 1)]):
        grid, _, looks = made(runs)
        assert accuracy_lost.table(grid, looks) is None


def test_early_stopping_is_told_by_epochs_and_the_accuracy_there() -> None:
    runs = [
        row("dense", 0, early_stop_epoch=8, test_top1_at_early_stop=0.95),
        row("dense", 1, early_stop_epoch=12, test_top1_at_early_stop=0.96),
        row("snip", 0, early_stop_epoch=4, test_top1_at_early_stop=0.9, stopped=None),
        row("snip", 1, early_stop_epoch=9, test_top1_at_early_stop=0.1, stopped="collapse"),
        row("random", 0, early_stop_epoch=None, test_top1_at_early_stop=None),
    ]
    grid, _, looks = made(runs)
    lines = written(early_stop, grid, looks).splitlines()
    assert lines[0] == "### Early stopping: a task"
    assert "dense: 10.0 ± 2.8 (95.50)" in lines
    assert "| snip | 4.0 (90.00) |" in lines and "| random | – |" in lines
    without, _, looks = made([row("dense", 0), row("snip", 0)])
    assert early_stop.table(without, looks) is None


def test_diagnostics_stand_beside_the_accuracies_before_and_after_training() -> None:
    def measured(method: str, seed: int, recall: float, **others: Any) -> Any:
        given = {"diagnostics": "planted", "untrained_test_top1": 0.25, "num_effective": 1500 + seed}
        return row(method, seed, 0.5, **given | {"measured": {"planted/recall": recall}} | others)

    runs = [
        measured("dense", 0, 1.0),
        measured("snip", 0, 0.1, sparsity=0.99),
        measured("snip", 1, 0.2, sparsity=0.99),
        measured("snip", 2, 0.7),
        measured("force", 0, 0.3, untrained_test_top1=None),
        measured("random", 0, 0.3, measured={"planted/recall": None}, num_effective=None),
        row("magnitude", 0, diagnostics=None, measured={"rewire/density": 0.1}),
        row("grasp", 0),
        measured("force", 1, 0.9, stopped="collapse"),
    ]
    grid, _, looks = made(runs)
    lines = written(diagnostics, grid, looks).splitlines()
    assert lines[0] == "### Diagnostics: a task"
    head = "| method | compression | n | before training, % | after training, % | weights on a path | planted/recall |"
    assert lines[2] == head
    assert sorted(lines[4:-2]) == [
        "| dense | 1× | 1 | 25.00 | 50.00 | 1,500 | 1 |",
        "| force | 10× | 1 | – | 50.00 | 1,500 | 0.3 |",
        "| random | 10× | 1 | 25.00 | 50.00 | – | – |",
        "| snip | 100× | 2 | 25.00 ± 0.00 | 50.00 ± 0.00 | 1,500 ± 1 | 0.15 ± 0.071 |",
        "| snip | 10× | 1 | 25.00 | 50.00 | 1,502 | 0.7 |",
    ]
    without, _, looks = made([row("dense", 0), row("magnitude", 0, diagnostics=None, measured={"rewire/density": 0.1})])
    assert diagnostics.table(without, looks) is None


def test_the_page_has_every_table(tmp_path: Path) -> None:
    given = {"diagnostics": "planted", "untrained_test_top1": 0.25, "num_effective": 1500}
    runs = [
        row("dense", 0, early_stop_epoch=8, test_top1_at_early_stop=0.95),
        row("snip", 0, **given, measured={"planted/recall": 0.7}),
    ]
    write(results(tmp_path / "results", runs), tmp_path / "report", images=False)
    page = (tmp_path / "report" / "index.html").read_text()
    (stem,) = {path.stem for path in (tmp_path / "report" / "tables").glob("*.tex")}
    for title, kind, cell, sorted_by in (
        ("Accuracy lost against the dense network", "accuracy-lost", "0.00 §", "0.00"),
        ("Costs", "costs", "0.001 + 2.4e-06", "0.001"),
        ("Early stopping", "early-stop", "–", ""),
        ("Diagnostics", "diagnostics", "1,500", "1500"),
    ):
        (part,) = re.findall(f"<summary>{title}</summary>.*?</details>", page, re.S)
        assert (
            f'<td class="n" data-value="{sorted_by}">{cell}</td>' in part and f'href="tables/{stem}-{kind}.md"' in part
        ), part
        assert cell in (tmp_path / "report" / "tables" / f"{stem}-{kind}.md").read_text()


def test_a_learned_mask_is_no_dense_network() -> None:
    grid, _, _ = made([row("dense", 0), row("edge_popup", 0, num_rounds=0)])
    assert [one.rows[0]["pruner"] for one in grid.dense] == ["dense"]
    assert grid.levels == [0.9]


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
    assert "Bold: the best mean" in text and "† A paired t test does not show it to be below the best mean" in text
    assert "There is no run of the dense network." in text and "test was made" not in text
    _, table, looks = made([*rows(**seeds), *rows((0.99,), snip=[0.5, 0.6], synflow=[0.6, 0.5, 0.4])])
    text = tables.markdown(table, looks)
    assert "- No test was made at 100×: that takes 3 seeds which two methods have in common." in text
    assert "Bold: the best mean of a column, of those with the most seeds." in text and "§" not in text
    _, table, looks = made(rows(**{name: values[:2] for name, values in seeds.items()}))
    text = tables.markdown(table, looks)
    assert "- 2 seeds: no test was made, because that takes 3." in text and "†" not in text and text.count("**") == 2


def test_where_nothing_is_tested_the_reason_is_named() -> None:
    def untested(runs: list[dict[str, Any]]) -> list[str]:
        return [words for words in made([*runs, row("dense")])[1].warnings if "o test was made" in words]

    seeds = "that takes 3 seeds which two methods have in common"
    best, worse = [0.90, 0.92, 0.95], [0.80, 0.82, 0.83]
    assert untested(rows(snip=best, synflow=worse)) == []
    shifted = rows(snip=best, synflow=[value - 0.05 for value in best])
    same = "where two methods have 3 seeds in common, their difference is the same in every seed"
    assert untested(shifted) == [f"No test was made at 10×: {same}."]
    stopped = rows((0.99,), snip=best, synflow=worse)
    stopped[0] |= {"stopped": "collapse", "test_top1": None}
    left = f"{seeds}, and no run of the two that on_collapse=stop left untrained"
    assert untested(stopped) == [f"No test was made at 100×: {left}."]
    apart = rows((0.5,), snip=best, synflow=worse[:2])
    assert untested([*shifted, *stopped, *apart]) == [
        f"No test was made at 2×: {seeds}.",
        f"No test was made at 10×: {same}.",
        f"No test was made at 100×: {left}.",
    ]


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
    assert "snip, synflow and random at compressions of 10× and 100×, 2 to 3 seeds each." in head
    best = re.findall(r"<dt>Best at ([^<]*)</dt><dd><svg.*?</svg> ([^<]*)</dd>", head)
    assert [(ratio, words[:13]) for ratio, words in best] == [("10×", "snip, 93.20 ±"), ("100×", "synflow, 90.4")]
    assert (
        "with fewer seeds snip is higher; no test shows it above random; it was not tested against snip" in best[1][1]
    )
    for word in ("cell", "protocol", "checksum", "cafecafe", "0000aaaa"):  # of insiders
        assert word not in head
    origin = text[text.index("Where the numbers come from") :]
    assert "protocol" in origin and "cafecafe" in origin
    assert "Best method by task" not in text
    write(results(folder, other), tmp_path / "both", images=False)
    text = (tmp_path / "both" / "index.html").read_text()
    overview = text[text.index("Best method by task") : text.index("</header>")]
    assert "Pruning methods on 2 tasks" in text
    assert re.findall(r"(\w+ \d+\.\d+)</td>", overview) == ["snip 93.20", "synflow 60.00"]
    assert "synflow 90.40 ↑</td>" in overview and "↑ Another one, with fewer seeds or untrained runs" in overview


def test_no_method_is_said_to_be_at_chance_where_one_with_fewer_seeds_is_above(tmp_path: Path) -> None:
    def best(runs: list[dict[str, Any]]) -> findings.Best:
        grid, table, looks = made(runs)
        assert not any("No method is above chance" in warning for warning in table.warnings)
        return findings.winners(grid, {}, looks)[0]

    fewer = rows(snip=[0.98], synflow=[0.97], random=[0.11, 0.10, 0.12])
    found = best(fewer)
    words = "no method with the most seeds is above chance (10 %); with fewer seeds snip and synflow are higher"
    assert (found.words, found.methods, found.at_chance, found.exceeded) == (words, (), False, True)
    untrained = rows(snip=[0.98, 0.98, 0.98], random=[0.11, 0.10, 0.12])
    untrained[0] |= {"stopped": "collapse", "test_top1": None}
    words = "no method with the most seeds is above chance (10 %); without untrained runs snip is higher"
    assert best(untrained).words == words
    other = [run | {"id": f"other-{run['seed']}", "task": "digits-vgg16-11112222"} for run in rows(snip=[0.1] * 3)]
    write(results(tmp_path / "results", fewer + other), tmp_path / "report", images=False)
    text = (tmp_path / "report" / "index.html").read_text()
    overview = text[text.index("Best method by task") : text.index("</header>")]
    assert overview.count("– ↑</td>") == 1 and overview.count("all at chance</td>") == 1


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
