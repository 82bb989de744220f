"""Pages with our own runs: what they print is what the rows beside them say."""

import importlib.util
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
        writing.write(runs, tmp_path, writing.Options(statistic=about.statistic, images=False))
        stems = renew.tasks(tmp_path)
        for stem in stems:
            assert renew.tables(tmp_path, stem, about, named=len(stems) > 1) in written
        assert renew.verdicts(runs) in written
