"""Published numbers, and finished runs of their recipes as files, without any training."""

import copy
import json
import math
from pathlib import Path
from typing import Any

from pai_bench.config import composition
from pai_bench.config.schema import made, plain
from pai_bench.published import matching, numbers
from pai_bench.published.numbers import Number
from pai_bench.published.verdicts import (
    Rule,
)

NUMBERS = numbers.read(numbers.PAPERS)
RECIPES = matching.Recipes()


def of(table: str, density: float | None = None, **settings: str) -> list[Number]:
    """The numbers of a table with some settings; __ stands for a dot. An empty value: without this setting."""
    wanted = {key.replace("__", "."): value for key, value in settings.items()}
    return [
        n
        for n in NUMBERS
        if n.table.name == table
        and all(n.settings.get(key, "") == value for key, value in wanted.items())
        and (density is None or (n.density is not None and math.isclose(n.density, density, rel_tol=0.002)))
    ]


def written(
    root: Path, number: Number, accuracies: list[float], changes: dict[str, Any] | None = None, **row: Any
) -> list[dict[str, Any]]:
    """Writes runs of a number's recipe at its target, one for each accuracy; settings can be changed. Returns rows."""
    rows = []
    for seed, accuracy in enumerate(accuracies):
        settings = copy.deepcopy(plain(RECIPES.of(number))) | {"seed": seed}
        if number.density is not None:
            settings["sparsity"] = round(1 - number.density, 12)
        for key, changed in (changes or {}).items():
            *path, last = key.split(".")
            part = settings
            for name in path:
                part = part[name]
            part[last] = changed
        cfg = made(settings)
        directory = root / "results" / cfg.id
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(composition.rerunnable(cfg))
        content = {
            "id": cfg.id,
            "group": cfg.group,
            "seed": seed,
            "target_sparsity": cfg.sparsity,
            **{key: getattr(cfg, key).name for key in ("dataset", "model", "pruner", "ablation")},
            "search_train_examples": 0,
            "collapsed_layers": [],
            "dataset_checksum": "0123abcd",
            "num_classes": {"mnist": 10, "cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}.get(
                number.settings["dataset"], 1000
            ),
            "num_prunable": 14_000_000,
            "macs_dense": 100,
            "macs_masked": 42,
            "test_top1": accuracy - 0.004,
            "best_test_top1": accuracy,
            "test_top1_at_best_validation": None,
            **row,
        }
        (directory / "result.json").write_text(json.dumps(content))
        rows.append(content)
    return rows


def compared(rows: list[dict[str, Any]], root: Path, chosen: list[Number]) -> dict[str, matching.Comparison]:
    """The comparisons for which there were runs, by table and label."""
    found = matching.compare(chosen, rows, root / "results", Rule())
    return {f"{c.number.table.name}: {c.number.label}": c for c in found if c.groups}


FIGURE_6 = [n for n in NUMBERS if n.table.name.startswith("Figure 6") and n.table.quantity == "best_test_top1"]
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}


def exponent(number: Number) -> float:
    assert number.target
    return float(number.target.removeprefix("log10_compression="))


def find(table: str, *values: str) -> Number:
    (number,) = [n for n in NUMBERS if n.table.name == table and {*values} <= {*n.settings.values(), n.target}]
    return number
