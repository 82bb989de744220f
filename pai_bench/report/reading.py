"""The rows of a results folder, and a reason for every run directory that has no row."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pai_bench.errors import DataError
from pai_bench.runs import status

Row = dict[str, Any]

_WORDS = (
    "id", "group", "task", "method", "dataset", "model", "pruner", "allocation", "schedule", "ablation", "training",
    "dataset_checksum", "hardware",
)  # fmt: skip
_NUMBERS = (
    "protocol", "seed", "num_classes", "target_sparsity", "sparsity", "density", "num_rounds", "epochs",
    "score_examples", "search_train_examples", "train_examples", "score_flops", "search_train_flops", "train_flops",
    "prune_seconds", "train_seconds", "total_seconds", "macs_masked", "test_top1", "best_test_top1",
)  # fmt: skip
_WORDS_OR_NULL = ("stopped", "mask", "weights")
_NUMBERS_OR_NULL = ("test_top1_at_best_validation", "filter_sparsity", "effective_sparsity")


@dataclass
class Results:
    """The content of a results folder."""

    folder: Path
    rows: list[Row] = field(default_factory=list)
    directories: dict[str, Path] = field(default_factory=dict)  # by the id of a row
    refused: dict[str, str] = field(default_factory=dict)  # name of a run directory -> why its row is left out
    unfinished: dict[str, status.RunState] = field(default_factory=dict)  # by the name of a run directory


def read(folder: Path, wanted: Callable[[Row], bool] = lambda row: True) -> Results:
    """The rows below a folder, sorted by id.

    Args:
        wanted: chooses rows.

    Raises:
        DataError: there is no such folder, or it has no runs.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give a results folder")
    if (folder / status.RESULT).is_file():
        raise DataError(f"{folder}: it is a run's own directory; give the folder that it lies in")
    results = Results(folder)
    seen: dict[tuple[object, ...], str] = {}
    try:
        directories = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: it cannot be read ({error.strerror}); give another results folder") from error
    for directory in directories:
        path = directory / status.RESULT
        if not path.is_file():
            if (state := status.state(directory)).name != "missing" or (directory / "config.yaml").is_file():
                results.unfinished[directory.name] = state
            continue
        try:
            row = json.loads(path.read_text())
            fault = _fault(row)
        except (OSError, ValueError) as error:
            row, fault = {}, f"it cannot be read ({error})"
        if fault:
            results.refused[directory.name] = f"{path}: {fault}; remove that directory and run it again"
            continue
        place = tuple(row[key] for key in ("task", "dataset_checksum", "method", "target_sparsity", "seed"))
        if place in seen:
            one_name = row["mask"] is not None and directory.name == row["id"]  # the name of the masks
            reason = f"{seen[place]} is of another mask with the same mask_name; name them apart"
            same = f"{seen[place]} holds the same run; remove one of the two"
            results.refused[directory.name] = f"{path}: {reason if one_name else same}"
            continue
        seen[place] = directory.name
        if wanted(row):
            results.rows.append(row)
            results.directories[row["id"]] = directory
    if seen and not results.rows:
        raise DataError(f"{folder}: no run has the task, dataset, model or pruner asked for; give another")
    if not (results.rows or results.refused or results.unfinished):
        raise DataError(f"{folder}: there are no runs; give another results folder")
    results.rows.sort(key=lambda row: str(row["id"]))
    return results


def _fault(row: Any) -> str | None:
    """What is wrong with a row, in a few words; None if nothing is."""
    if not isinstance(row, dict):
        return "it holds no row"
    for names, accepted in (
        (_WORDS, str),
        (_NUMBERS, (int, float)),
        (_WORDS_OR_NULL, (str, type(None))),
        (_NUMBERS_OR_NULL, (int, float, type(None))),
    ):
        for name in names:
            if name not in row:
                return f"it has no {name}"
            value = row[name]
            if not isinstance(value, accepted) or isinstance(value, bool):  # type: ignore[arg-type]
                return f"its {name} is {value!r}"
            if isinstance(value, float) and not math.isfinite(value):
                return f"its {name} is {value!r}"
    for name in ("id", "task", "method"):  # these become parts of file names
        if not re.fullmatch(r"\w[\w.-]*", row[name]):
            return f"its {name} is {row[name]!r}"
    if not "".join(row[name] for name in _WORDS).isprintable():
        return "its names hold what cannot be printed"
    if not 0 <= row["target_sparsity"] < 1:
        return f"its target_sparsity is {row['target_sparsity']!r}"
    if row["num_classes"] < 1:
        return f"its num_classes is {row['num_classes']!r}"
    if not isinstance(row.get("collapsed_layers"), list) or not isinstance(row.get("output_depends_on_input"), bool):
        return "it does not say which layers collapsed and whether it carries signal"
    return None
