"""What is not installed is named in a line, and only by what needs it."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from pai_bench.runs.provenance import _PACKAGES, provenance


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        (
            "hydra_plugins.hydra_joblib_launcher",
            ["hydra/launcher=parallel"],
            "hydra/launcher=parallel: .*not installed",
        ),
        ("wandb", ["tracker=wandb"], "tracker=wandb: wandb is not installed; pip install wandb, or give tracker=none"),
        ("submitit", ["hydra/launcher=slurm", "tracker=none"], "hydra/launcher=slurm: submitit is not installed"),
    ],
)
def test_what_is_not_installed_is_named_in_a_line(package: str, words: list[str], said: str, tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest)
sys.modules[{package!r}] = None
from pai_bench.launch import cli
cli.main()
"""
    done = without(code, ["-m", "model=lenet300", "pruner=magnitude", "sparsity=0.5", *words], tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.match(f"config error: .*{said}", done.stderr) and len(done.stderr.splitlines()) == 1


def test_the_default_run_does_without_wandb_and_says_so(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "wandb" else real(name, *rest)
sys.modules["wandb"] = None
from pai_bench.launch import cli
cli.main()
"""
    words = ["-m", "model=lenet300", "training.epochs=1", "pruner=magnitude", "sparsity=0.5", "seed=0,1"]
    done = without(code, words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W&B is not installed: the run directory is the only record") == 1
    asked = without(code, [*words, "tracker.mode=online"], tmp_path)
    assert asked.returncode == 2 and "wandb is not installed" in asked.stderr


def without(code: str, words: list[str], tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *words, f"results_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_run_without_a_tracker_needs_no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "wandb":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr("pai_bench.runs.provenance.version", version)
    assert provenance()["versions"] == dict.fromkeys(_PACKAGES, "1") | {"wandb": None}
