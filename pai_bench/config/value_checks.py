"""Checks of values: names, devices, trackers, and values that are wrong beside others of the same group."""

import os
import re

from pai_bench.config.identity import function_name
from pai_bench.config.schema import Plain, RunConfig
from pai_bench.config.signatures import shown
from pai_bench.core import Call, Pruner
from pai_bench.errors import ConfigError, is_installed
from pai_bench.training.recipe import Recipe

_BOTH = "pai_bench.runs.tracking.wandb_and_tensorboard"
OF_WANDB = ("pai_bench.runs.tracking.wandb", _BOTH)
_OF_TENSORBOARD = ("pai_bench.runs.tracking.tensorboard", _BOTH)


def require(condition: bool, setting: str, value: object, remedy: str) -> None:
    """Refuses a value.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(f"{setting}={shown(value)}: {remedy}")


def none_is_null_(settings: Plain, group: str, said: str) -> None:
    """Makes null of the option `none` of a group, so that it is no part of a run's name.

    Args:
        said: what it means, for the error.

    Raises:
        ConfigError: it has settings all the same.
    """
    option = settings.get(group)
    if not isinstance(option, dict) or option.get("name") != "none":
        return
    for key, value in option.items():
        if key != "name" and value is not None:
            raise ConfigError(f"{group}.{key}={shown(value)}: {said}; add {group}=NAME")
    settings[group] = None


def check_name(setting: str, name: object) -> None:
    """Refuses a name that cannot be part of the name of a directory.

    Raises:
        ConfigError: it is such.
    """
    require(isinstance(name, str) and name != "", setting, name, "give a word (quote a number: \"'7'\")")
    bad = set(str(name)) & set("/\\") or not str(name).isprintable()
    require(
        not bad and str(name)[0] not in ".-", setting, name, "give a word without / that does not begin with . or -"
    )
    require(len(str(name)) <= 100, setting, name, "give one of at most 100 letters")


def check_values(run: RunConfig) -> None:
    """Refuses values that are wrong beside other values, and values whose range is no type.

    Raises:
        ConfigError: there is such a value.
    """
    _check_tracker(run.tracker)
    device = re.fullmatch(r"auto|cpu|cuda|cuda:[0-9]{1,2}", run.device)
    require(device is not None, "device", run.device, "give auto, cpu, cuda or cuda:<n>")
    recipe, dataset, data = run.training, run.dataset.settings, run.pruner.scoring_data
    optimizer = recipe.optimizer.settings if isinstance(recipe.optimizer, Call) else {}
    if optimizer.get("nesterov"):
        needs = "it needs training.optimizer.momentum above 0"
        require(optimizer["momentum"] > 0, "training.optimizer.nesterov", True, needs)
    drops = recipe.lr_milestones
    require(drops == sorted(drops), "training.lr_milestones", drops, "give the epochs in rising order")
    _check_image_sizes(recipe, streamed="resize" in dataset)
    mean, std = dataset.get("mean"), dataset.get("std")
    many = f"give as many values as dataset.mean={shown(mean)} has"
    require(len(mean or ()) == len(std or ()), "dataset.std", std, many)
    if (kind := dataset.get("standardize")) is not None:
        needs = "give dataset.mean=null and dataset.std=null with it"
        require(mean is None and std is None, "dataset.standardize", kind, needs)
    if "store" in dataset:
        size, resize, store = dataset["size"], dataset["resize"], dataset["store"]
        require(resize >= size, "dataset.resize", resize, f"give dataset.size={size} or more")
        require(store is None or store >= resize, "dataset.store", store, f"give dataset.resize={resize} or more")
    if run.pruner.mode == "eval_after_pass":
        needs = f"pruner={run.pruner.name} looks at no images; set pruner.mode=eval"
        require(data is not None, "pruner.mode", "eval_after_pass", needs)
    else:
        needs = "it needs pruner.mode=eval_after_pass; set both, or null"
        require(run.pruner.pass_images is None, "pruner.pass_images", run.pruner.pass_images, needs)
    _check_score(run.pruner)
    if data is not None:
        asked = {"per_class": data.per_class, "total": data.total}
        one = (data.per_class is None) != (data.total is None)
        require(one, "pruner.scoring_data", asked, "give one of the two and null the other")


def _check_score(pruner: Pruner) -> None:
    """Refuses settings of a score that do nothing beside another of its settings, and a mode that it cannot use."""
    score = pruner.score
    if not isinstance(score, Call):
        return
    name, settings = function_name("pruner", score.target), score.settings
    if name == "second_order.score" and settings["curvature"] == "fisher":
        needs = "pruner.score.curvature=fisher has no probes; give 1"
        require(settings["probes"] == 1, "pruner.score.probes", settings["probes"], needs)
    if name == "prospr.score" and settings["first_order"]:
        needs = "with pruner.score.first_order=true every momentum is a constant; give false"
        require(not settings["detach_momentum"], "pruner.score.detach_momentum", True, needs)
    if name == "px_official.score":
        needs = "this version of PX uses batch statistics; set pruner.mode=train"
        require(pruner.mode == "train", "pruner.mode", pruner.mode, needs)


def _check_image_sizes(recipe: Recipe, streamed: bool) -> None:
    """Refuses sizes of training images that belong to no epochs, or that the images cannot have."""
    sizes, epochs = recipe.image_sizes, recipe.image_size_epochs
    one_each = len(sizes or ()) == len(epochs or ())
    needs = f"give one for each of training.image_sizes={shown(sizes)}"
    require(one_each, "training.image_size_epochs", epochs, needs)
    if not sizes or not epochs:
        return
    require(streamed, "training.image_sizes", sizes, "give null: the images of this dataset lie in memory in one size")
    require(all(size % 32 == 0 for size in sizes), "training.image_sizes", sizes, "give multiples of 32")
    rising = epochs == sorted(set(epochs))
    require(rising, "training.image_size_epochs", epochs, "give the epochs in rising order, each once")


def _check_tracker(tracker: Call) -> None:
    """Refuses what a tracker would refuse later, when the run has begun."""
    for package, targets in (("wandb", OF_WANDB), ("tensorboard", _OF_TENSORBOARD)):
        if tracker.target in targets and not is_installed(package):
            raise ConfigError(
                f"tracker={tracker.name}: {package} is not installed; pip install {package}, or give tracker=none"
            )
    if tracker.target not in OF_WANDB:
        return
    mode = os.environ.get("WANDB_MODE") or "offline"
    require(mode in ("online", "offline", "disabled"), "WANDB_MODE", mode, "give online, offline or disabled")
    for setting, name in (
        ("tracker.project", tracker.settings.get("project")),
        ("WANDB_PROJECT", os.environ.get("WANDB_PROJECT") or None),
        ("tracker.entity", tracker.settings.get("entity")),
    ):
        fits = name is None or re.fullmatch(r"[^/\\#?%:]{1,128}", name)
        require(bool(fits), setting, name, "give 1 to 128 characters, none of them / \\ # ? % :")
