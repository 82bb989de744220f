"""What runs are called: names that follow from the settings that can change a result, and from no others.

Settings are plain values here, as a yaml file has them.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from pai_bench.core import HOOKS

# What cannot change a result: where things lie (so dataset.root too), how fast they run, what is kept.
NOT_IDENTITY = {
    "tracker", "results_dir", "data_dir", "download", "save_scores", "save_model", "diagnostics",
    "checkpoint_epochs", "checkpoint_minutes", "device", "num_workers", "channels_last", "compile", "cache_gb",
    "experiment", "scale",
}  # fmt: skip


# Where on a curve of accuracy against sparsity a run stands, and what makes one curve of its setting.
_POINT = {"sparsity", "density", "compression", "seed"}


# Values of settings that have no effect: such a setting is not counted.
_NO_EFFECT = {"prunable": "all", "target": "sparsity", "repair": None}
_OF_METHOD = {
    *("pruner", "search", "prunable", "target", "repair", "allocation", "schedule", "ablation", "rewire", "transfer"),
    *("mask", "mask_file"),
}


def _meaning(value: Any, group: str = "") -> Any:
    """A setting such that two that mean the same are equal."""
    if isinstance(value, dict):  # null is "no effect", so a new setting that starts as null renames no run
        of = {key: _meaning(item, group or key) for key, item in value.items() if item is not None}
        return of | {"_target_": function_name(group, of["_target_"])} if "_target_" in of else of
    if isinstance(value, list):
        return [_meaning(item, group) for item in value]
    if type(value) is int and abs(value) < 2**1000 and float(value) == value:
        return float(value)  # 1 and 1.0 are the same setting
    return value


def same(value: Any, other: Any) -> bool:
    """Whether two values of a setting mean the same, as for 1 and 1.0."""
    return bool(_meaning(value) == _meaning(other))


def function_name(group: str, target: str) -> str:
    """What a function is called in a group of the config, wherever it lies: a move renames no run.

    Of ours the name; of a pruner's or a rewire's, whose file is named after the method, the file's too. Of others the
    whole path.
    """
    path = target.split(".")
    if path[0] != "pai_bench":
        return target
    return ".".join(path[-2:] if group in ("pruner", "rewire") else path[-1:])


def _without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _counted(settings: dict[str, Any], without: set[str]) -> dict[str, Any]:
    """The settings that can change a result, less those named."""
    counted = dict(settings)
    counted["dataset"] = _without(settings["dataset"], "root")
    counted["training"] = _without(settings["training"], "compact")
    counted["pruner"] = _without(settings["pruner"], "label")
    counted |= _without(settings["checksums"], "transfer", "allocation")
    counted["allocation"] = _allocation(settings)
    counted["transfer"] = _transfer(settings)
    counted["mask_file"] = _without(settings["mask_file"], "zeros") if settings["mask"] is not None else None
    counted = _without(counted, "checksums", "mask_name")
    for group in ("training", "allocation", "schedule", "ablation"):
        counted[group] = _without(counted[group], "name")  # a label; what they do is in their settings
    counted["rewire"] = None
    if settings["rewire"]["rule"] is not None:  # what its rule reaches is a statement about the rule
        counted["rewire"] = _without(settings["rewire"], "name", "reaches_target")
    if not settings["training"].get("batch_norm_l1"):
        counted["training"] = _without(counted["training"], "batch_norm_l1")
    if settings["training"]["lr_schedule"] != "step":
        counted["training"] = _without(counted["training"], "lr_milestones", "lr_gamma")
    counted = _without(counted, *(key for key, value in _NO_EFFECT.items() if counted.get(key) == value))
    searched = settings["pruner"]["score"] is not None or settings.get("search") is not None
    if not searched and settings["mask"] is None and counted["rewire"] is None:
        counted = _without(counted, *_NO_EFFECT)
    if settings["pruner"]["score"] is None:  # nothing is scored
        counted["pruner"] = {"name": settings["pruner"]["name"]}
        if not searched:  # and nothing allocated
            counted = _without(counted, "allocation")
        else:
            counted["search"] = _without(settings["search"], "name", "label")
    meaning: dict[str, Any] = _meaning(_without(counted, *without))
    return meaning


def _allocation(settings: dict[str, Any]) -> dict[str, Any]:
    """What counts of an allocation: of its file what it holds, and not where it lies."""
    allocation: dict[str, Any] = settings["allocation"]
    found = settings["checksums"].get("allocation")
    return allocation | {key: found for key in allocation.keys() & {"mask", "file"} if found is not None}


def _transfer(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What counts of a transfer: the function, its settings, and what its file holds."""
    transfer = settings.get("transfer")
    if transfer is None:
        return None
    file = {"weights": settings["checksums"].get("transfer")} if "weights" in transfer else {}
    return _without(transfer, "name") | file


def _hash(settings: dict[str, Any], without: set[str]) -> str:
    return hashlib.sha256(json.dumps(_counted(settings, without), sort_keys=True).encode()).hexdigest()[:8]


def _named(settings: dict[str, Any], *ending: str) -> str:
    names = [
        settings["dataset"]["name"],
        settings["model"]["name"],
        settings["pruner"]["name"],
        f"s{settings['sparsity']:.6g}",
    ]
    if any(settings["ablation"][hook] is not None for hook in HOOKS):
        names.append(settings["ablation"]["name"])
    if settings["rewire"]["rule"] is not None:
        names.append(settings["rewire"]["name"])
    if settings.get("transfer") is not None:
        names.append(settings["transfer"]["name"])
    return _safe("-".join([*names, *ending]))


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def run_id(settings: dict[str, Any]) -> str:
    """The name of a run: directory, W&B id and resume key. A function of all that can change its result, and no more.

    Args:
        settings: of a checked config.
    """
    return _named(settings, f"seed{settings['seed']}", _hash(settings, NOT_IDENTITY))


def group_id(settings: dict[str, Any]) -> str:
    """The name shared by the runs that differ in nothing but their seed."""
    return _named(settings, _hash(_told_apart_by_name(settings), NOT_IDENTITY | {"seed"}))


def task_id(settings: dict[str, Any]) -> str:
    """The name of what runs have in common whose methods can be compared: dataset, model, training and protocol."""
    without = NOT_IDENTITY | _of_method(settings) | _POINT
    return _safe(f"{settings['dataset']['name']}-{settings['model']['name']}-{_hash(settings, without)}")


def chain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What the runs of a chain have in common: all but how deep they prune, and what comes after the last round.

    Where a search trains, the runs of a chain train the same networks on their way, as far as they go the same way.
    """
    chain: dict[str, Any] = _counted(settings, NOT_IDENTITY | {"sparsity", "density", "compression"})
    chain["schedule"] = _without(chain["schedule"], "levels")
    chain["ablation"] = _without(chain["ablation"], "mask", "weights")
    return _without(chain, "rewire", "transfer")  # of the last training alone


def chain_id(settings: dict[str, Any]) -> str:
    """The name shared by the runs of a chain."""
    return hashlib.sha256(json.dumps(chain_settings(settings), sort_keys=True).encode()).hexdigest()[:8]


def method_id(settings: dict[str, Any]) -> str:
    """The name of a method, whatever it is applied to: pruner, allocation, schedule, ablation, rewire and transfer."""
    return _safe(
        f"{settings['pruner']['name']}-{_hash(_told_apart_by_name(settings), set(settings) - _of_method(settings))}"
    )


def _of_method(settings: dict[str, Any]) -> set[str]:
    """The settings that make a method. A mask with a name stands for its weights too."""
    return _OF_METHOD | {"weights"} if settings["mask_name"] else _OF_METHOD


def _told_apart_by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a `mask_name`, if there is one, stands for the mask and weights of every seed.

    Whether weights are given, to start from or to transfer, still counts: the same mask on the weights of the seed is
    the usual control.
    """
    if not settings["mask_name"]:
        return settings
    transfer = (settings.get("transfer") or {}).get("weights")
    given = {"weights": settings["weights"], "transfer": transfer}
    known = settings["checksums"] | {"mask": None} | {key: file and "given" for key, file in given.items()}
    return settings | {"checksums": known}


def differences(
    settings: dict[str, Any], other: dict[str, Any], ignored: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, if they can change a result. Seeds do not count. Empty within a group.

    Args:
        settings: of a checked config.
        other: those of another run.
        ignored: groups and settings, by their first name, that are not looked at.

    Returns:
        Of each dotted setting the values here and there, None where it is not set.
    """
    without = NOT_IDENTITY | {"seed", *ignored}
    ours, theirs = _leaves(_counted(settings, without)), _leaves(_counted(other, without))
    keys = sorted(ours.keys() | theirs.keys())
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def _leaves(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found
