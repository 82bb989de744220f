"""Pages with our own runs: what they print is what the rows beside them say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from pai_bench.report import writing
from pai_bench.runs import archive

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
        writing.write(runs, tmp_path, about.options(images=False))
        stems = renew.tasks(tmp_path)
        for stem in stems:
            assert renew.tables(tmp_path, stem, about, named=len(stems) > 1) in written
        assert renew.verdicts(runs) in written


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
