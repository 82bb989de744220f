"""A folder for a machine without a network: its wheels come from a folder here, and nothing is fetched."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from pai_bench.errors import UserError


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_offline", ROOT / "scripts" / "prepare_offline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """A wheel with nothing in it."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel(folder, "alpha", "1.0", "beta>=2", "torch")
    wheel(folder, "beta", "2.0")
    wheel(folder, "beta", "1.0")
    wheel(folder, "torch", "2.5", "nvidia-cublas-cu12")
    wheel(folder, "nvidia-cublas-cu12", "12.0")
    return folder


@pytest.mark.parametrize("with_torch", [False, True])
def test_all_that_is_needed_is_gathered(script: ModuleType, shelf: Path, tmp_path: Path, with_torch: bool) -> None:
    options = ["--no-index", "--find-links", str(shelf)]
    pinned = script.wheels(["alpha"], tmp_path / "wheels", options, with_torch)
    expected = {"alpha-1.0", "beta-2.0"} | ({"torch-2.5", "nvidia_cublas_cu12-12.0"} if with_torch else set())
    assert {file.name.removesuffix("-py3-none-any.whl") for file in (tmp_path / "wheels").iterdir()} == expected
    assert len(pinned) == len(expected) and "alpha==1.0" in pinned


def test_what_pip_does_not_find_is_said_in_a_line(script: ModuleType, shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^pip install failed: ERROR: .*gamma.*$"):
        script.wheels(["gamma"], tmp_path / "wheels", ["--no-index", "--find-links", str(shelf)], False)


def test_the_requirements_are_those_of_the_package(script: ModuleType) -> None:
    found = script.requirements(ROOT / "pyproject.toml")
    names = {line.split(">")[0].split("=")[0] for line in found}
    assert {"torch", "hydra-core", "scikit-learn", "submitit", "torch-pruning", "pytest"} <= names
    assert not [line for line in found if "pai_bench" in line] and "torchcodec" not in names


def test_a_folder_is_prepared(script: ModuleType, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    folder = tmp_path / "carried"
    monkeypatch.setattr(script, "requirements", lambda file: ["alpha"])
    monkeypatch.setattr(script.terminal, "start_process", lambda: None)
    words = [str(folder), "dataset=digits", "--find-links", str(shelf)]
    monkeypatch.setattr(sys, "argv", ["prepare_offline.py", *words])
    script.main()
    assert len(list((folder / "wheels").iterdir())) == 2
    assert (folder / "code" / "run.py").read_bytes() == (ROOT / "run.py").read_bytes()
    assert (folder / "code" / "conf" / "config.yaml").is_file() and not (folder / "code" / ".git").exists()
    text = (folder / "README.txt").read_text()
    assert "run.py dataset=digits pruner=synflow" in text and "their wheels are not here" in text


def test_a_word_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_offline.py"), str(tmp_path / "x"), "seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert done.stderr.strip().endswith("seed=1: give dataset=, model=, training= or a setting of theirs")
