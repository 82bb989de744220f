"""The names of methods and tasks in a report, and how each method looks."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pai_bench.report import configurations, palette
from pai_bench.report.configurations import NO_DENSE, Configuration, Grid
from pai_bench.report.palette import Named

_MOST_NAMED = 8  # configurations or methods in one sentence

_PARTS = ("allocation", "schedule", "ablation")
_NAMED = ("rewire", "transfer")  # rows of earlier versions lack them, and those of the next line
_USUAL = {"target": "sparsity", "prunable": "all", "repair": None}
_OF_METHOD = ("pruner", *_PARTS, *_NAMED, "prunable", "target", "repair", "mask", "mask_file")
NO_TEXTS: Mapping[str, str] = MappingProxyType({})
_OF_TASK = ("dataset", "model", "training", "on_collapse", "protocol")


@dataclass(frozen=True)
class Look:
    """How a method is drawn. The dense network has the colour of text."""

    label: str
    colour: str  # "dense", or as #RRGGBB
    marker: str
    dash: str


def looks(
    found: Sequence[Configuration], directories: Mapping[str, Path], texts: Mapping[str, str] = NO_TEXTS
) -> dict[str, Look]:
    """The look of each method, by its id. `palette.styles` decides colour, marker and dash.

    Args:
        texts: replaces labels, by the id of a method or by a word of a label: the name of a pruner, an allocation, a
            schedule, an ablation, a rewire or a transfer.
    """
    of_method: dict[str, Configuration] = {}
    for configuration in found:
        of_method.setdefault(configuration.method, configuration)
    labels = _method_labels(of_method, directories, texts)
    pruned = {method: one.rows[0] for method, one in of_method.items() if not one.dense}
    styles = palette.styles(
        [
            Named(
                method,
                row["pruner"],
                (row["ablation"] != "none" or bool(_named(row) + _unusual(row)), row["allocation"] != "global"),
            )
            for method, row in pruned.items()
        ]
    )
    made = {method: Look(labels[method], *styles[method]) for method in pruned}
    for method in of_method.keys() - pruned.keys():
        made[method] = Look(labels[method], "dense", "none", "dashed")
    made.setdefault(NO_DENSE, Look(texts.get(NO_DENSE, "dense"), "dense", "none", "dashed"))
    return made


def words(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """What `texts` may rename: the words of labels and titles, and the ids of methods and tasks."""
    keys = ("pruner", *_PARTS, "dataset", "model", "method", "task")
    return {str(row[key]) for row in rows for key in keys} | {word for row in rows for word in _named(row)} | {NO_DENSE}


def _named(row: Mapping[str, Any]) -> list[str]:
    """The rewire and the transfer of a run, if it has them."""
    return [row[key] for key in _NAMED if row.get(key, "none") != "none"]


def _unusual(row: Mapping[str, Any]) -> list[str]:
    """The other settings that change which weights a method prunes, where they are not as usual."""
    return [f"{key}={row[key]}" for key, usual in _USUAL.items() if row.get(key, usual) != usual]


def _method_labels(
    of_method: Mapping[str, Configuration], directories: Mapping[str, Path], texts: Mapping[str, str]
) -> dict[str, str]:
    """The label of each method: its pruner, and whatever distinguishes methods with the same pruner.

    That can be the allocation, the schedule, or other settings. What makes it another method than its pruner is always
    named: an ablation, a rewire, a transfer, and a target, prunable layers and a repair that are not the usual ones.
    """
    namesakes: dict[str, list[str]] = defaultdict(list)
    for method, configuration in of_method.items():
        namesakes[configuration.rows[0]["pruner"]].append(method)
    labels = {}
    for pruner, methods in namesakes.items():
        rows = {method: of_method[method].rows[0] for method in methods}
        differing = [part for part in ("allocation", "schedule") if len({row[part] for row in rows.values()}) > 1]
        for method, row in rows.items():
            parts = [row[part] for part in differing]
            parts += [row["ablation"]] if row["ablation"] != "none" else []
            parts += [*_named(row), *([] if of_method[method].dense else _unusual(row))]
            name = texts.get(pruner) or _label(directories[row["id"]]) or pruner
            labels[method] = ", ".join([name, *(texts.get(part, part) for part in parts)])
    places = {method: directories[of_method[method].rows[0]["id"]] for method in labels}
    return {method: texts.get(method, label) for method, label in _distinguished(labels, places, _OF_METHOD).items()}


def tasks(
    grids: Sequence[Grid], directories: Mapping[str, Path], texts: Mapping[str, str] = NO_TEXTS
) -> dict[tuple[str, str], str]:
    """Titles of tables, by task and checksum: dataset and model, and whatever distinguishes equal titles.

    Args:
        texts: replaces titles, by the id of a task, or words in them, by the name of a dataset or a model.
    """
    labels, places = {}, {}
    for grid in grids:
        row = grid.first.rows[0]
        key = (grid.first.task, grid.first.checksum)
        labels[key] = ", ".join(texts.get(row[word], row[word]) for word in ("dataset", "model"))
        places[key] = directories[row["id"]]
    titles = _distinguished(labels, places, _OF_TASK)
    images: dict[str, set[str]] = defaultdict(set)
    for task, checksum in labels:
        images[task].add(checksum)
    return {
        (task, checksum): f"{name}, images {checksum[:8]}" if len(images[task]) > 1 else name
        for (task, checksum), label in titles.items()
        for name in [texts.get(task, label)]
    }


def _distinguished(labels: dict[Any, str], directories: Mapping[Any, Path], groups: Sequence[str]) -> dict[Any, str]:
    """Makes labels unique: adds the settings in which the configs differ, or else the end of the ids."""
    by_label: dict[str, list[Any]] = defaultdict(list)
    for key, label in labels.items():
        by_label[label].append(key)
    unique = dict(labels)
    for label, keys in by_label.items():
        ids = {key: key[0] if isinstance(key, tuple) else key for key in keys}
        if len(set(ids.values())) == 1:
            continue
        configs = {key: _flat(_config(directories[key]), groups) for key in keys}
        names = dict.fromkeys(name for config in configs.values() for name in config)
        differing = [n for n in names if len({repr(config.get(n)) for config in configs.values()}) > 1]
        shown = [n for n in differing if n.rpartition(".")[2] not in ("_target_", "name", "label")] or differing
        for key in keys:
            words = ", ".join(f"{name}={_short(configs[key].get(name))}" for name in shown[:3])
            unique[key] = f"{label}, {words}" if words else label
        if len({unique[key] for key in keys}) < len(set(ids.values())):
            for key in keys:
                unique[key] = f"{unique[key]}, {ids[key].rpartition('-')[2]}"
    return unique


def _label(directory: Path) -> str | None:
    """The label in the yaml of a run's pruner, or None."""
    pruner = _config(directory).get("pruner")
    label = pruner.get("label") if isinstance(pruner, dict) else None
    return label if isinstance(label, str) and label.isprintable() else None


def _config(directory: Path) -> dict[str, Any]:
    """The config of a run. Empty if it cannot be read; then ids distinguish the runs."""
    import yaml

    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _flat(config: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """Dotted names and values of the settings in some groups."""
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        else:
            found[name] = value

    for group in groups:
        if group in config:
            walk(group, config[group])
    return {name: value for name, value in found.items() if name not in ("dataset.root", "training.compact")}


def _short(value: object) -> str:
    if value is None:
        return "null"
    text = f"{value:.6g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def compression(level: float) -> str:
    """A sparsity as a compression: 0.9 is 10×."""
    ratio = configurations.compression(level)
    return f"{ratio:,.0f}×" if ratio >= 9999.5 else f"{ratio:.4g}×"


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction as a number of percent."""
    return f"{100 * fraction:.{digits}f}"


def sparsity(level: float) -> str:
    """A sparsity in percent, with as many digits as the density needs: 99.67 %."""
    digits = max(0, 1 - math.floor(math.log10(100 * (1 - level)) + 1e-9))
    while abs(round(100 * level, digits) - 100 * level) > 1 - level:  # a hundredth of the density
        digits += 1
    text = f"{100 * level:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def density(level: float) -> str:
    """1 minus a sparsity, in percent: 0.9 is 10 %."""
    return f"{100 * (1 - level):.3g} %"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 run, 2,000 runs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def amount(number: float) -> str:
    """A count or a time with a unit prefix: 1.2 M."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence. A long list is cut."""
    if len(words) > _MOST_NAMED:
        words = [*words[: _MOST_NAMED - 1], f"{len(words) - _MOST_NAMED + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
