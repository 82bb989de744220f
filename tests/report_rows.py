"""Made-up rows of runs, and run directories that hold them."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

from pai_bench.report import names, tables, writing
from pai_bench.report.comparison import comparisons
from pai_bench.report.configurations import Grid, configurations, grids


def row(method: str = "snip", seed: int = 0, accuracy: float | None = 0.9, sparsity: float = 0.9, **others: Any) -> Any:
    """A result row as a run writes it; the pruner called dense is one without rounds."""
    dense = method == "dense"
    target = 0.0 if dense else sparsity
    made = {
        "task": "digits-resnet20-0000aaaa",
        "method": f"{method}-1111bbbb",
        "protocol": 1,
        "seed": seed,
        "group": "",
        "dataset": "digits",
        "model": "resnet20",
        "pruner": method.split("@")[0],
        "allocation": "global",
        "schedule": "none" if dense else "one_shot",
        "ablation": "none",
        "training": "digits",
        "target_sparsity": target,
        "sparsity": target,
        "density": 1 - target,
        "filter_sparsity": None,
        "effective_sparsity": target,
        "num_rounds": 0 if dense else 1,
        "epochs": 2,
        "num_classes": 10,
        "collapsed_layers": [],
        "output_depends_on_input": True,
        "stopped": None,
        "mask": None,
        "weights": None,
        "test_top1": accuracy,
        "best_test_top1": None if accuracy is None else accuracy + 0.01,
        "test_top1_at_best_validation": None,
        "macs_masked": 1000,
        "score_examples": 0 if dense else 100,
        "search_train_examples": 0,
        "train_examples": 400,
        "score_flops": 10**9,
        "search_train_flops": 0,
        "train_flops": 10**12,
        "prune_seconds": 0.5,
        "train_seconds": 8.0,
        "total_seconds": 10.0,
        "hardware": "a cpu",
        "dataset_checksum": "cafe" * 16,
    } | others
    name = f"{made['task']}-{made['method']}-s{made['target_sparsity']:g}-seed{seed}-{made['dataset_checksum'][:4]}"
    return {"id": name, **made}


ACCURACIES = {"snip": [0.91, 0.93, 0.92], "synflow": [0.95, 0.955, 0.945], "random": [0.80, 0.84, 0.83]}


def rows(sparsities: tuple[float, ...] = (0.9,), **accuracies: list[float]) -> list[Any]:
    return [
        row(method, seed, accuracy, sparsity)
        for method, values in (accuracies or ACCURACIES).items()
        for seed, accuracy in enumerate(values)
        for sparsity in sparsities
    ]


def only(rows: list[Any], statistic: str = "last") -> Grid:
    (grid,) = grids(configurations(rows, statistic))
    return grid


# What lies beside the rows --------------------------------------------------------------------------------------------


def directory(parent: Path, run: dict[str, Any], mask: dict[str, Any] | None = None, curve: Any = ()) -> Path:
    """A run directory: its row, its mask, and its test accuracy by epoch."""
    path = parent / run["id"]
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(run))
    mask = mask or {"conv.weight": np.array([[1, 0], [1, 1]]), "fc.weight": np.array([1, 0, 0, 0, 0])}
    layers = [{"name": n, "size": m.size, "kept": int(m.sum()), "density": float(m.mean())} for n, m in mask.items()]
    (path / "mask.json").write_text(json.dumps({"layers": layers}))
    norms = {"norm.weight": np.ones(2, bool)}  # held at zero too where filters are pruned
    save_file({name: m.astype(bool) for name, m in mask.items()} | norms, path / "mask.safetensors")
    lines = ["epoch,test_loss,test_top1", *(f"{epoch},1.5,{accuracy}" for epoch, accuracy in curve)]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    return path


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


# Tables ---------------------------------------------------------------------------------------------------------------


def made(runs: list[dict[str, Any]]) -> tuple[Grid, tables.Table, dict[str, names.Look]]:
    found = configurations(runs)
    looks = names.looks(found, {run["id"]: Path("nowhere") for run in runs})
    (grid,) = grids(found)
    differences = {level: comparisons(grid.at(level)) for level in grid.levels}
    return grid, tables.accuracy(grid, "digits, resnet20", differences, "last", looks), looks


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
