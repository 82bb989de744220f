"""The notebooks run as they stand, and what they show holds nothing of the machine that ran them."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(?:home|root|tmp|work|usr|opt|var|Users|mnt)/|[A-Za-z]:\\\\")

nbformat = pytest.importorskip("nbformat")


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_results_and_no_machine(path: Path) -> None:
    text = path.read_text()
    assert not MACHINE.search(text) and len(text) < 500_000
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from the top"
    shown = outputs(notebook)
    assert not [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in shown)
    linked = re.findall(r"\]\(([\w./]+\.(?:md|ipynb))", text)
    assert linked and all((path.parent / target).is_file() for target in linked)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, _, _ = (pytest.importorskip(name) for name in ("nbclient", "ipykernel", "pandas"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, 4)
    before = [len(cell.get("outputs", [])) > 0 for cell in notebook.cells]
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises the error of a cell
    ran = outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in ran)
    # What was shown is shown again. Warnings were taken out.
    after = [any(o.get("name") != "stderr" for o in cell.get("outputs", [])) for cell in notebook.cells]
    assert after == before


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_look", "my_own_pruner"]
