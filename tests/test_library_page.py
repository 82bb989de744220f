"""The examples of docs/library.md and the notebooks run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, composed, options

import pai_bench as pb
from pai_bench.core import TrainingLength
from pai_bench.masks import masks

PAGE = (ROOT / "docs" / "library.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_the_examples_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    found = []
    for block in BLOCKS:
        if "pb.load" in block:
            pytest.importorskip("pandas")
        exec(block, names)
        found.append((masks.sparsity(names["mask"]) if names.get("mask") else None, names.get("model")))
    sparsities = [round(sparsity, 2) for sparsity, _ in found if sparsity is not None]
    assert sparsities[:7] == [0.9, 0.9, 0.95, 0.9, 0.9, round(1 - 0.8**3, 2), 0.9]
    assert len(names["rows"]) == 4 and len(names["table"]) == 4  # the single run is one of the sweep
    assert {path.name for path in tmp_path.iterdir()} == {"mask.pt", "results"}


def test_every_public_function_is_on_the_page() -> None:
    for name in set(pb.__all__) - {"__version__"}:
        assert f"pb.{name}(" in PAGE, name


def test_what_needs_training_is_what_the_page_says() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(("| `filter_*`", "| `schedule=`"))]
    schedules = set(re.findall(r"`(\w+)`", rows[1].split("|")[1]))
    pruners = [name for name in options("pruner") if name != "dense"]
    for name in pruners:
        cfg = composed(f"pruner={name}", "sparsity=0.5")
        trains = any(one.until_epoch > 0 for one in cfg.schedule(0.5, TrainingLength(160, 100)))
        assert trains == name.startswith("filter_"), name
    for name in set(options("schedule")) - {"none", "front_loaded"}:
        schedule = composed("pruner=magnitude", "sparsity=0.5", "training=cifar", f"schedule={name}").schedule
        trains = any(one.until_epoch > 0 for one in schedule(0.5, TrainingLength(160, 100)))
        assert trains == (name in schedules), name
