"""Pages with our own runs: what they print is what the rows beside them say."""

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

import pytest
from conftest import ROOT

from pai_bench.report import writing
from pai_bench.runs import archive, status

RESULTS = ROOT / "docs" / "results"
ROWS = sorted(RESULTS.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def renew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("renew", RESULTS / "renew.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["renew"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_rows() -> None:
    assert ROWS


@pytest.mark.parametrize("file", ROWS, ids=lambda file: file.name.removesuffix(".tar.gz"))
def test_tables_and_verdicts_follow_from_the_rows(file: Path, renew: ModuleType, tmp_path: Path) -> None:
    name = file.name.removesuffix(".tar.gz")
    about = renew.PAGES[name]
    page = (ROOT / "docs" / about.file).read_text()
    written = page.partition(renew.begin(name))[2].partition(renew.END)[0]
    with archive.opened(file) as runs:
        there, num_missing = renew.rows(name, runs)
        assert {row["id"] for row in there} == {path.name for path in runs.iterdir()}
        assert f"{len(there)} runs of " in written
        assert (f"{num_missing} more are to come" in " ".join(written.split())) == bool(num_missing)
        writing.write(runs, tmp_path, about.options(there, images=False))
        stems = renew.tasks(tmp_path)
        for stem in stems:
            assert renew.tables(tmp_path, stem, about, named=len(stems) > 1) in written
        assert renew.verdicts(runs) in written


# Runs that are not of the experiment of a page, but that its text speaks of: the page, the accuracy, and its digits.
CONTROLS = {
    "grasp_abs": ("results/mnist_curves.md", "test_top1", 2),
    "planted_own_mask": ("planted.md", "test_top1", 1),
    "snip_lenet300": ("results/snip_tables.md", "best_test_top1", 2),
}


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation of fractions, in percent, as the pages write them."""
    return f"{100 * mean(values):.{digits}f} ± {100 * stdev(values):.{digits}f}"


@pytest.mark.parametrize("name", CONTROLS)
def test_what_the_text_says_of_controls_follows_from_their_rows(name: str) -> None:
    page, accuracy, digits = CONTROLS[name]
    groups: dict[tuple[str, ...], list[float]] = {}
    with archive.opened(RESULTS / "controls" / f"{name}.tar.gz") as runs:
        for row in status.read(runs):
            key = tuple(str(row[column]) for column in ("dataset", "model", "pruner", "ablation", "target_sparsity"))
            groups.setdefault(key, []).append(row[accuracy])
    text = (ROOT / "docs" / page).read_text()
    assert f"{name}.tar.gz" in text
    for values in groups.values():
        assert len(values) == 5
        assert spread(values, digits) in text


def test_the_recall_after_each_round_follows_from_the_curves() -> None:
    recalls: dict[str, list[list[float]]] = {}
    with archive.opened(RESULTS / "controls" / "planted_rounds.tar.gz") as runs:
        for row in status.read(runs):
            with (runs / row["id"] / "metrics.csv").open() as file:
                curve = [(float(point["epoch"]), point["planted/recall"]) for point in csv.DictReader(file)]
            after = [float(recall) for epoch, recall in curve if epoch in (11, 21, 31, 41, 51)]
            recalls.setdefault(f"{row['pruner']} {row['schedule']}", []).append(after)
    columns = [recalls[name] for name in ("magnitude rewind", "magnitude lr_rewind", "synflow lr_rewind")]
    page = (ROOT / "docs" / "planted.md").read_text()
    for number in range(5):
        cells = [spread([after[number] for after in column], 1) for column in columns]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("text", [None, "no marks", "<!-- docs/results/renew.py writes this of lottery_lenet -->"])
def test_without_a_place_on_the_page_nothing_is_overwritten(
    text: str | None, renew: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, page = tmp_path / "results" / "lottery_lenet.tar.gz", tmp_path / "results" / "lottery_lenet.md"
    rows.parent.mkdir()
    rows.write_text("rows")
    if text is not None:
        page.write_text(text)
    monkeypatch.setattr(renew, "DOCS", tmp_path)
    with archive.opened(RESULTS / "lottery_lenet.tar.gz") as runs:
        monkeypatch.setattr(sys, "argv", ["renew.py", "lottery_lenet", str(runs)])
        with pytest.raises(SystemExit, match="there is no such page" if text is None else "it lacks the lines"):
            renew.main()
    assert {path.name for path in rows.parent.iterdir()} == {rows.name} | (set() if text is None else {page.name})
    assert rows.read_text() == "rows"


def test_what_cannot_be_shown_is_said_in_one_line(
    renew: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for experiment, said in (("lottery_lenet", "it has no finished runs of lottery_lenet"), ("mine", "it has no page")):
        monkeypatch.setattr(sys, "argv", ["renew.py", experiment, str(tmp_path / "runs")])
        with pytest.raises(SystemExit, match=said):
            renew.main()


@pytest.mark.parametrize(("shown", "label"), [("magnitude", "| Lottery tickets |"), ("dense", "dense: 97")])
def test_a_part_of_the_runs_is_shown_before_the_others_are_there(
    shown: str, label: str, renew: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "docs" / "results" / "lottery_lenet.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"before\n{renew.begin('lottery_lenet')}\n{renew.END}\nafter\n")
    monkeypatch.setattr(renew, "DOCS", tmp_path / "docs")
    part = tmp_path / "part"
    part.mkdir()
    with archive.opened(RESULTS / "lottery_lenet.tar.gz") as runs:
        every = renew.rows("lottery_lenet", runs)[0]
        for row in [one for one in every if (one["pruner"], one["ablation"]) == (shown, "none")][:5]:
            (part / row["id"]).symlink_to(runs / row["id"], target_is_directory=True)
        monkeypatch.setattr(sys, "argv", ["renew.py", "lottery_lenet", str(part)])
        renew.main()
    text = page.read_text()
    assert "5 runs of lenet300" in text and "180 more are to come" in " ".join(text.split())
    assert label in text and "new weights" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "the following arguments are required: experiment, results"),
        (["lottery_lenet", "RUNS"], 4, "data error: .*result.json: it is damaged"),
    ],
)
def test_what_goes_wrong_is_one_line(
    words: list[str],
    code: int,
    said: str,
    renew: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "RUNS" / "run").mkdir(parents=True)
    (tmp_path / "RUNS" / "run" / "result.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["renew.py", *words])
    with pytest.raises(SystemExit) as stopped:
        renew.main()
    assert stopped.value.code == code and re.search(said, capsys.readouterr().err.splitlines()[-1])


def test_hardware_is_that_of_the_rows(renew: ModuleType) -> None:
    on_cpus = [{"hardware": "x86_64 cpu, 1 thread"}, {"hardware": "x86_64 cpu, 8 threads"}]
    assert renew.hardware(on_cpus) == "CPU cores"
    assert renew.hardware([{"hardware": "NVIDIA H100"}, *on_cpus]) == "CPU cores and NVIDIA H100"
    assert renew.hardware([{"hardware": "NVIDIA H100"}]) == "NVIDIA H100"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["b" * 40, "a" * 40, "b" * 40], "commit aaaaaaa, bbbbbbb"),
        (["b" * 40, None], "commit bbbbbbb and at others that some rows do not name"),
        (["b" * 40, ""], "commit bbbbbbb and at others that some rows do not name"),
        ([None, ""], "commits that the rows do not name"),
    ],
)
def test_commits_are_those_of_the_rows(named: list[str | None], said: str, renew: ModuleType, tmp_path: Path) -> None:
    for number, commit in enumerate(named):
        (tmp_path / str(number)).mkdir()
        if commit != "":  # else there is no such file
            (tmp_path / str(number) / "provenance.json").write_text(json.dumps({"commit": commit}))
    assert renew.commits(sorted(tmp_path.iterdir())) == said


def test_commits_with_changes_are_said_to_have_them(renew: ModuleType, tmp_path: Path) -> None:
    for number, (commit, dirty) in enumerate([("a", True), ("a", False), ("b", True), ("c", None)]):
        (tmp_path / str(number)).mkdir()
        origin = json.dumps({"commit": commit * 40, "dirty": dirty})
        (tmp_path / str(number) / "provenance.json").write_text(origin)
    found = renew.commits(list(tmp_path.iterdir()))
    assert found == "commit aaaaaaa, aaaaaaa with changes, bbbbbbb with changes, ccccccc"
