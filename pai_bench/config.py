"""The schema of a run, its checks, and the identity that follows from it. Imports neither torch nor any function that
a config names: a wrong setting is refused in well under a second."""

import ast
import hashlib
import importlib.util
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from pai_bench.errors import ConfigError

Mode = Literal["eval", "train"]
LearningRateSchedule = Literal["step", "cosine"]
Precision = Literal["float32", "tfloat32", "bfloat16", "float16"]
ScoringPrecision = Literal["float64", "float32"]
OnCollapse = Literal["record", "stop"]
Reduction = Literal["sum", "abs_sum", "l2"]
Names = Literal["exact", "order"]
Missing = Literal["refuse", "keep"]
HOOKS = ("batches", "images", "scores", "mask", "weights")
Call = dict[str, Any]  # a name, a _target_, and the keyword arguments of that function


@dataclass
class ExamplesConfig:
    """core.Examples: which training images a score looks at."""

    per_class: int | None = MISSING
    total: int | None = MISSING
    batch_size: int = MISSING
    augment: bool = MISSING
    balanced: bool | None = None


@dataclass
class PrunerConfig:
    """core.Pruner: a score and the conditions under which it is taken."""

    name: str = MISSING
    score: Call | None = MISSING
    mode: str = MISSING
    examples: ExamplesConfig | None = MISSING
    dtype: str = "float64"
    reduce: str | None = None
    regrow: bool = False
    regrow_moved: bool | None = None  # null is false, so that runs from before it keep their names
    transfer: Call | None = None


@dataclass
class AblationConfig:
    """core.Ablation: what is broken on purpose."""

    name: str = MISSING
    batches: Call | None = MISSING
    images: Call | None = MISSING
    scores: Call | None = MISSING
    mask: Call | None = MISSING
    weights: Call | None = MISSING


@dataclass
class TrainingConfig:
    """train.Recipe, everything about training that can change a result; and `compact`, which cannot."""

    name: str = MISSING
    epochs: int = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    momentum: float = MISSING
    nesterov: bool = MISSING
    weight_decay: float = MISSING
    decay_norm_and_bias: bool = MISSING
    lr_schedule: str = MISSING
    lr_drop_epochs: list[int] = MISSING
    lr_drop_factor: float = MISSING
    warmup_epochs: int = MISSING
    label_smoothing: float = MISSING
    temperature: float = MISSING
    precision: str = MISSING
    compact: Any = MISSING  # "auto" or "off", which Hydra reads as False


@dataclass
class MaskFileConfig:
    """How mask_files reads a mask that another framework may have written."""

    names: str = MISSING
    missing: str = MISSING
    zeros: bool = MISSING


@dataclass
class DigestsConfig:
    """Checksums of what files hold, for a run that goes on later."""

    mask: str | None = MISSING
    weights: str | None = MISSING


@dataclass
class RunConfig:
    """One run. The values live in conf/."""

    sparsity: float | None = MISSING
    density: float | None = MISSING
    compression: float | None = MISSING
    seed: int = MISSING
    protocol: int = MISSING
    model: Call = MISSING
    dataset: Call = MISSING
    allocation: Call = MISSING
    schedule: Call = MISSING
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mask: str | None = MISSING
    mask_name: str | None = MISSING
    mask_file: MaskFileConfig = field(default_factory=MaskFileConfig)
    weights: str | None = MISSING
    digests: DigestsConfig = field(default_factory=DigestsConfig)
    on_collapse: str = MISSING
    tracker: Call = MISSING
    results_dir: str = MISSING
    data_dir: str = MISSING
    download: bool = MISSING
    device: str = MISSING
    num_workers: int | None = MISSING
    checkpoint_epochs: int = MISSING
    checkpoint_minutes: float = MISSING
    channels_last: bool = MISSING
    compile: bool = MISSING
    save_scores: bool = MISSING
    save_model: Any = MISSING  # a bool, or "half"
    diagnostics: bool = MISSING
    reuse_gb: float = MISSING


# What cannot change a result: where things lie (so dataset.root too), how fast they run, what is kept.
NOT_IDENTITY = {
    "tracker", "results_dir", "data_dir", "download", "save_scores", "save_model", "diagnostics",
    "checkpoint_epochs", "checkpoint_minutes", "device", "num_workers", "channels_last", "compile", "reuse_gb",
}  # fmt: skip
# Where on a curve of accuracy against sparsity a run stands, and what makes one curve of its setting.
_POINT = {"sparsity", "density", "compression", "seed"}
_OF_METHOD = {"pruner", "allocation", "schedule", "ablation", "mask", "mask_file"}
# Keys of a call that are not arguments of the function: the label, and Hydra's own.
_NOT_ARGUMENTS = {"name", "_target_"}


_HELP = """\
pai_bench: pruning at initialization and lottery tickets, one run or a sweep of them.

  python run.py pruner=synflow sparsity=0.98
  python run.py -m dataset=cifar10 model=vgg16 training=cifar pruner=snip,synflow compression=10,100 'seed=range(3)'

Choose one option of each group (group=option):

$APP_CONFIG_GROUPS
Set any value (key=value); sparsity=, density= and compression= are three ways to say one thing:

$CONFIG
Show the config of a run and exit: --cfg job --resolve     Hydra's own flags: --hydra-help
"""


def _runs_at_once() -> int:
    """How many runs this machine does at once: one on each GPU, or else one on each core."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


# Hydra insists on writing multirun.yaml somewhere; nothing reads it. A folder of this process, which the sweeper makes.
SCRATCH = Path(tempfile.gettempdir()) / f"pai_bench-{secrets.token_hex(16)}"


def register() -> None:
    """Stores the schema, our help, and the order that Hydra writes nothing itself: pai_bench.store keeps the records.

    They replace Hydra's own defaults, so they hold for any primary config, that of an earlier run included.
    """
    OmegaConf.register_new_resolver("runs_at_once", _runs_at_once, replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    ours = {"output": "no_files", "help": "pai_bench", "job_logging": "none", "sweeper": "grid"}
    store.store(group="hydra/help", name="pai_bench", node={"app_name": "pai_bench", "template": _HELP})
    nothing = {"run": {"dir": "."}, "sweep": {"dir": str(SCRATCH), "subdir": "."}}
    store.store(group="hydra/output", name="no_files", node=nothing, package="hydra")
    hydra = HydraConf(output_subdir=None)
    hydra.defaults = [next(({k: ours[k]} for k in d if k in ours), d) for d in hydra.defaults]
    store.store(group="hydra", name="config", node=hydra, provider="pai_bench")


# Checks ---------------------------------------------------------------------------------------------------------------


def complete(composed: DictConfig) -> dict[str, Any]:
    """The composed config as a plain dict, checked whole, with the one sparsity that was asked for filled in.

    Raises:
        ConfigError: a key is unknown or missing, a value has the wrong type or lies outside its range, or two settings
            exclude each other; or a file with a mask or weights cannot be used.
    """
    unknown = sorted(set(composed) - {f.name for f in fields(RunConfig)})
    if unknown:
        raise ConfigError(f"{unknown[0]}={composed[unknown[0]]}: there is no such setting; see python run.py --help")
    try:
        cfg = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is missing: add {error.full_key}=VALUE") from error
    for group in ("model", "dataset", "allocation", "schedule", "tracker"):
        check_call(group, cfg[group])
    hooks = [("ablation", hook) for hook in HOOKS]
    for group, key in (("pruner", "score"), ("pruner", "transfer"), *hooks):
        if cfg[group][key] is not None:
            check_call(f"{group}.{key}", cfg[group][key])
    if cfg["dataset"]["name"] is None and cfg["dataset"].get("root"):  # a folder of images is known by its own name
        cfg["dataset"]["name"] = Path(cfg["dataset"]["root"]).expanduser().resolve().name
    for group in ("model", "dataset", "allocation", "schedule", "pruner", "ablation", "training", "tracker"):
        name = cfg[group]["name"]
        _require(isinstance(name, str) and name != "", f"{group}.name", name, "give a word (quote a number: \"'7'\")")
    cfg["training"]["compact"] = "off" if cfg["training"]["compact"] is False else cfg["training"]["compact"]
    if cfg["mask"] is not None:
        cfg["pruner"]["name"] = cfg["mask_name"] or "mask"
    _check_ranges(cfg)
    cfg["sparsity"] = _sparsity(cfg) if cfg["mask"] is None else _of_mask(cfg)
    if cfg["weights"] is not None and not _is_stored(cfg, "weights"):
        identify(cfg, "weights", weights_digest(cfg))
    cfg["density"] = cfg["compression"] = None
    return cfg


def _require(condition: bool, setting: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{setting}={value}: {remedy}")


def _word(value: object) -> object:
    """A setting that may be a bool or a word, as a user writes it."""
    return str(value).lower() if isinstance(value, bool) else value


def _check_ranges(cfg: dict[str, Any]) -> None:
    training, pruner, dataset = cfg["training"], cfg["pruner"], cfg["dataset"]
    _require(cfg["seed"] >= 0, "seed", cfg["seed"], "give 0 or more")
    _require(cfg["checkpoint_epochs"] >= 1, "checkpoint_epochs", cfg["checkpoint_epochs"], "give 1 or more")
    _require(cfg["checkpoint_minutes"] >= 0, "checkpoint_minutes", cfg["checkpoint_minutes"], "give 0 or more")
    patience = cfg["tracker"].get("patience_seconds", 1)
    _require(0 < patience < math.inf, "tracker.patience_seconds", patience, "give a number above 0")
    _check_tracker(cfg["tracker"])
    workers = cfg["num_workers"]
    _require(workers is None or workers >= 0, "num_workers", workers, "give 0 or more, or null for one on each core")
    _require(0 <= cfg["reuse_gb"] < math.inf, "reuse_gb", cfg["reuse_gb"], "give 0 or more")
    device = cfg["device"]
    known = device in ("auto", "cpu", "cuda") or device.removeprefix("cuda:").isdigit()
    _require(known, "device", device, "give auto, cpu, cuda or cuda:<n>")
    for key in ("epochs", "warmup_epochs"):
        _require(training[key] >= 0, f"training.{key}", training[key], "give 0 or more")
    _require(training["batch_size"] >= 2, "training.batch_size", training["batch_size"], "give 2 or more")
    _require(0 < training["lr"] < math.inf, "training.lr", training["lr"], "give a number above 0")
    _require(training["weight_decay"] >= 0, "training.weight_decay", training["weight_decay"], "give 0 or more")
    _require(
        0 < training["temperature"] < math.inf, "training.temperature", training["temperature"], "give one above 0"
    )
    for key in ("momentum", "label_smoothing"):
        _require(0 <= training[key] < 1, f"training.{key}", training[key], "give a number in [0, 1)")
    _require(
        training["momentum"] > 0 or not training["nesterov"],
        "training.nesterov", training["nesterov"], "it needs training.momentum above 0",
    )  # fmt: skip
    _require(
        0 < training["lr_drop_factor"] <= 1, "training.lr_drop_factor", training["lr_drop_factor"], "give one in (0, 1]"
    )
    drops = training["lr_drop_epochs"]
    _require(drops == sorted(drops), "training.lr_drop_epochs", drops, "give the epochs in rising order")
    for setting, value, choices in (
        ("training.lr_schedule", training["lr_schedule"], get_args(LearningRateSchedule)),
        ("training.precision", training["precision"], get_args(Precision)),
        ("training.compact", training["compact"], ("auto", "off")),
        ("pruner.mode", pruner["mode"], get_args(Mode)),
        ("pruner.dtype", pruner["dtype"], get_args(ScoringPrecision)),
        ("pruner.reduce", pruner["reduce"], (None, *get_args(Reduction))),
        ("on_collapse", cfg["on_collapse"], get_args(OnCollapse)),
        ("save_model", _word(cfg["save_model"]), ("true", "half", "false")),
        ("mask_file.names", cfg["mask_file"]["names"], get_args(Names)),
        ("mask_file.missing", cfg["mask_file"]["missing"], get_args(Missing)),
    ):
        _require(value in choices, setting, value, "give one of " + ", ".join(choice or "null" for choice in choices))
    if "padding" in dataset:
        _require(dataset["padding"] >= 0, "dataset.padding", dataset["padding"], "give 0 or more pixels")
    if "validation" in dataset:
        _require(0 <= dataset["validation"] < 1, "dataset.validation", dataset["validation"], "give one in [0, 1)")
    if "store" in dataset:
        size, resize, store = dataset["size"], dataset["resize"], dataset["store"]
        _require(size >= 1, "dataset.size", size, "give 1 or more pixels")
        _require(resize >= size, "dataset.resize", resize, f"give dataset.size={size} or more")
        _require(store is None or store >= resize, "dataset.store", store, f"give dataset.resize={resize} or more")
    schedule, allocation = cfg["schedule"], cfg["allocation"]
    for key in ("rounds", "levels", "every_steps", "epochs"):
        if key in schedule:
            _require(schedule[key] >= 1, f"schedule.{key}", schedule[key], "give 1 or more")
    for key in ("min_density", "min_last", "linear_density"):
        if key in allocation:
            _require(0 <= allocation[key] <= 1, f"allocation.{key}", allocation[key], "give one in [0, 1]")
    if "beta" in allocation:
        _require(0 <= allocation["beta"] < math.inf, "allocation.beta", allocation["beta"], "give 0 or more")
    for part in ("score", "transfer"):
        for key, value in (pruner[part] or {}).items():
            setting = f"pruner.{part}.{key}"
            if key in ("temperature", "lr"):
                _require(0 < value < math.inf, setting, value, "give a number above 0")
            elif key == "steps":
                _require(value >= 0, setting, value, "give 0 or more")
            elif key in ("batch_size", "draws"):
                _require(value >= 1, setting, value, "give 1 or more")
    _require(not drops or drops[0] >= 0, "training.lr_drop_epochs", drops, "give epochs of 0 or more")
    if (examples := pruner["examples"]) is not None:
        per_class, total = examples["per_class"], examples["total"]
        _require(
            (per_class is None) != (total is None),
            "pruner.examples", f"{{per_class: {per_class}, total: {total}}}", "give one of the two and null the other",
        )  # fmt: skip
        number, key = (per_class, "per_class") if total is None else (total, "total")
        _require(number >= 1, f"pruner.examples.{key}", number, "give 1 or more")
        _require(examples["batch_size"] >= 2, "pruner.examples.batch_size", examples["batch_size"], "give 2 or more")
    _check_fits_together(cfg)


def _check_tracker(tracker: Call) -> None:
    """Refuses what W&B would refuse later, when the run has begun."""
    if tracker["_target_"] != "pai_bench.tracking.wandb":
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder that is called wandb is no package
        raise ConfigError(f"tracker={tracker['name']}: wandb is not installed; pip install wandb, or give tracker=none")
    mode = os.environ.get("WANDB_MODE") or "offline"
    _require(mode in ("online", "offline", "disabled"), "WANDB_MODE", mode, "give online, offline or disabled")
    for key in ("project", "entity"):
        name = tracker.get(key)
        fits = name is None or re.fullmatch(r"[^/\\#?%:]{1,128}", name)
        _require(bool(fits), f"tracker.{key}", name, "give 1 to 128 characters, none of them / \\ # ? % :")


def _check_fits_together(cfg: dict[str, Any]) -> None:
    """Refuses settings that exclude each other."""
    if cfg["weights"] is None:
        _require(cfg["digests"]["weights"] is None, "digests.weights", cfg["digests"]["weights"], "add weights=PATH")
    training, pruner, schedule = cfg["training"], cfg["pruner"], cfg["schedule"]
    never_prunes = cfg["schedule"]["_target_"].endswith(".none")
    _check_mask_stands_alone(cfg, never_prunes)
    if never_prunes and pruner["score"] is not None:
        raise ConfigError(f"schedule={cfg['schedule']['name']}: it never prunes; use pruner=dense or another schedule")
    if not never_prunes and pruner["score"] is None:
        raise ConfigError(f"schedule={cfg['schedule']['name']}: pruner={pruner['name']} has no score to prune by")
    ablation = cfg["ablation"]
    broken = [hook for hook in HOOKS if ablation[hook] is not None]
    if broken and never_prunes and cfg["mask"] is None:
        raise ConfigError(f"ablation={ablation['name']}: a dense network has nothing to break; choose a pruner")
    if (ablation["batches"] is not None or ablation["images"] is not None) and pruner["examples"] is None:
        raise ConfigError(f"ablation={ablation['name']}: pruner={pruner['name']} looks at no images; choose another")
    rewinds = schedule.get("rewind_weights", False)
    if cfg["allocation"].get("rescale"):
        if pruner["reduce"] is not None:
            raise ConfigError("allocation.rescale=true: filters are not rescaled; set it to false, or prune weights")
        if rewinds or pruner["regrow"] or ablation["mask"] is not None or ablation["weights"] is not None:
            raise ConfigError(
                "allocation.rescale=true: rewinding, regrowing and ablations of the mask or the weights would undo it; "
                "set it to false"
            )
    if pruner["transfer"] is not None and rewinds:
        raise ConfigError(
            f"schedule={schedule['name']}: rewinding the weights would undo what pruner={pruner['name']} gives them; "
            "use schedule=constant"
        )
    if pruner["regrow_moved"] and not pruner["regrow"]:
        raise ConfigError("pruner.regrow_moved=true: no weight returns with pruner.regrow=false; set it to true")
    if pruner["reduce"] is not None and pruner["regrow"]:
        raise ConfigError("pruner.regrow=true: filters do not return, because their norms do not; set it to false")
    if "mask" in cfg["allocation"] and not schedule["_target_"].endswith((".one_shot", ".none")):
        raise ConfigError(f"schedule={schedule['name']}: allocation=densities_of has one target; use schedule=one_shot")
    if schedule["_target_"].endswith(".fine_tune"):
        drops = training["lr_drop_epochs"]
        last = max([drop for drop in drops if drop < training["epochs"]], default=0)
        last = max(last, training["warmup_epochs"])
        if training["lr_schedule"] != "step":
            raise ConfigError(
                f"schedule={schedule['name']}: training.lr_schedule={training['lr_schedule']} ends at a rate of zero; "
                "set training.lr_schedule=step, or use schedule=lr_rewind"
            )
        if schedule["epochs"] > training["epochs"] - last:
            raise ConfigError(
                f"schedule.epochs={schedule['epochs']}: the last learning rate holds for {training['epochs'] - last} "
                "epochs; give at most that, or use schedule=lr_rewind"
            )


def _check_mask_stands_alone(cfg: dict[str, Any], never_prunes: bool) -> None:
    """Refuses what would compute another mask than the given one, and settings of a mask where none is given."""
    mask, file = cfg["mask"], cfg["mask_file"]
    if mask is None:
        for setting, value, no_effect in (
            ("mask_name", cfg["mask_name"], None),
            ("mask_file.names", file["names"], "exact"),
            ("mask_file.missing", file["missing"], "refuse"),
            ("mask_file.zeros", file["zeros"], False),
            ("digests.mask", cfg["digests"]["mask"], None),
        ):
            _require(value == no_effect, setting, value, "there is no mask for it; add mask=PATH")
        return
    _require(cfg["mask_name"] != "dense", "mask_name", "dense", "that is the unpruned network; give another name")
    if cfg["pruner"]["score"] is not None:
        raise ConfigError(f"mask={mask}: a pruner would compute another mask; leave pruner= or mask= out")
    if not never_prunes:
        raise ConfigError(
            f"mask={mask}: schedule={cfg['schedule']['name']} would compute another mask; leave schedule= or mask= out"
        )
    if any(cfg["ablation"][hook] is not None for hook in ("batches", "images", "scores")):
        raise ConfigError(
            f"ablation={cfg['ablation']['name']}: mask={mask} comes without scores; "
            "choose an ablation of the mask or the weights"
        )
    if file["names"] == "order":
        _require(file["missing"] == "refuse", "mask_file.missing", "keep", "by order every layer needs its mask")
        if mask.endswith(".safetensors"):
            raise ConfigError(f"mask={mask}: it is sorted by name; with mask_file.names=order give a .pt or .npz")


def _is_stored(cfg: dict[str, Any], key: str) -> bool:
    """Whether this is the config of a run whose file is gone: it has its name, and asks for the file when it runs."""
    return cfg["digests"][key] is not None and not Path(cfg[key]).is_file()


def _of_mask(cfg: dict[str, Any]) -> float:
    """The sparsity of the mask that is given. Notes what the mask is."""
    from pai_bench import mask_files

    path, file = cfg["mask"], cfg["mask_file"]
    if _is_stored(cfg, "mask") and cfg["sparsity"] is not None:
        return float(cfg["sparsity"])
    masks = mask_files.read("mask", path, zeros=file["zeros"])
    again = cfg["digests"]["mask"] is not None  # the config of a run, which has its sparsity
    identify(cfg, "mask", mask_files.digest(masks, file["names"]))
    sparsity = mask_files.sparsity(masks)
    if (nominal := _target(cfg)) is None or (again and nominal == sparsity):
        return sparsity
    (asked,) = (f"{key}={cfg[key]:g}" for key in ("sparsity", "density", "compression") if cfg[key] is not None)
    if cfg["mask_name"] is None:
        raise ConfigError(
            f"{asked}: mask={path} has a sparsity of its own; leave it out, or name the masks that it is to hold for "
            "with mask_name=WORD"
        )
    if file["missing"] == "keep":
        raise ConfigError(f"{asked}: how sparse mask_file.missing=keep leaves a network is its mask's; leave it out")
    if not mask_files.agree(nominal, sparsity):
        raise ConfigError(
            f"{asked}: mask={path} has sparsity {sparsity:g}, and its density is more than 0.1 % away; "
            "give a target that is nearer, or none"
        )
    return nominal


def _target(cfg: dict[str, Any]) -> float | None:
    """The one target given as sparsity, density or compression, as a sparsity of at most twelve digits."""
    given = {key: cfg[key] for key in ("sparsity", "density", "compression") if cfg[key] is not None}
    if len(given) > 1:
        both = " and ".join(f"{key}={value:g}" for key, value in given.items())
        raise ConfigError(f"{both}: they say the same thing; give one of them")
    if "density" in given:
        _require(0 < given["density"] <= 1, "density", given["density"], "give a fraction in (0, 1]")
        given["sparsity"] = 1 - given["density"]
    elif "compression" in given:
        _require(1 <= given["compression"] < math.inf, "compression", given["compression"], "give a ratio of 1 or more")
        given["sparsity"] = 1 - 1 / given["compression"]
    elif "sparsity" in given:
        _require(0 <= given["sparsity"] < 1, "sparsity", given["sparsity"], "give a fraction in [0, 1)")
    return float(round(given["sparsity"], 12)) if given else None


def _sparsity(cfg: dict[str, Any]) -> float:
    """The target of a run that finds its own mask."""
    target = _target(cfg)
    if cfg["pruner"]["score"] is None:
        return 0.0  # a dense network is one and the same run at every sparsity of a sweep
    if target is None:
        raise ConfigError(
            f"pruner={cfg['pruner']['name']} needs a target: add sparsity=0.9 (or density=0.1, or compression=10)"
        )
    return target


# The arguments of a call, checked against the function that it names --------------------------------------------------


@lru_cache
def _settings_of(target: str) -> dict[str, tuple[str, bool]]:
    """Annotation and optionality of each keyword-only argument of a function, read from its source, unimported."""
    module, _, function = target.rpartition(".")
    try:
        spec = importlib.util.find_spec(module) if module else None
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"_target_={target}: there is no module {module!r}")
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return {
                argument.arg: (ast.unparse(argument.annotation) if argument.annotation else "Any", default is not None)
                for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            }
    raise ConfigError(f"_target_={target}: there is no function {function!r} in {module}")


def check_call(path: str, call: Call) -> None:
    """Checks the arguments of a call against the keyword-only arguments of the function that it names.

    Positional arguments are what a run supplies (a model, scores, a sparsity); keyword-only ones are settings.

    Raises:
        ConfigError: an argument is unknown, missing or of the wrong type, or there is no such function.
    """
    if "_target_" not in call or ("name" not in call and "." not in path):  # a group has a name, a part of one has not
        raise ConfigError(f"{path}: it needs a name and a _target_, the dotted path of a function")
    settings = _settings_of(call["_target_"])
    for key, value in call.items():
        if key in _NOT_ARGUMENTS:
            continue
        if key not in settings:
            known = ", ".join(settings) or "none"
            raise ConfigError(f"{path}.{key}={value}: there is no such setting; {call['_target_']} has: {known}")
        annotation = settings[key][0]
        if not _fits(value, annotation):
            raise ConfigError(f"{path}.{key}={value}: it must be {annotation}")
    for key, (annotation, optional) in settings.items():
        if not optional and key not in call:
            raise ConfigError(f"{path}.{key} is missing: {call['_target_']} needs it ({annotation})")


def _fits(value: object, annotation: str) -> bool:
    """Whether a value from yaml or the command line is of the annotated type. Types it does not know are accepted."""
    node = ast.parse(annotation, mode="eval").body
    if isinstance(node, ast.BinOp):  # X | Y
        return _fits(value, ast.unparse(node.left)) or _fits(value, ast.unparse(node.right))
    if isinstance(node, ast.Subscript):
        origin, inner = ast.unparse(node.value), node.slice
        if origin == "Literal":
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return value in [choice.value for choice in choices if isinstance(choice, ast.Constant)]
        if origin in ("list", "Sequence"):
            return isinstance(value, list) and all(_fits(item, ast.unparse(inner)) for item in value)
        if origin == "dict" and isinstance(inner, ast.Tuple):
            of_key, of_value = (ast.unparse(part) for part in inner.elts)
            return isinstance(value, dict) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    match annotation:
        case "None":
            return value is None
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
    return True


# Identity -------------------------------------------------------------------------------------------------------------


def _meaning(value: Any) -> Any:
    """A setting such that two that mean the same are equal."""
    if isinstance(value, dict):  # null is "no effect", so a new setting that starts as null renames no run
        return {key: _meaning(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_meaning(item) for item in value]
    return float(value) if type(value) is int else value  # 1 and 1.0 are the same setting


def _without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _counted(cfg: dict[str, Any], without: set[str]) -> dict[str, Any]:
    """The settings that can change a result, less those named."""
    counted = dict(cfg)
    counted["dataset"] = _without(cfg["dataset"], "root")
    counted["training"] = _without(cfg["training"], "compact")
    if isinstance(cfg["allocation"].get("mask"), str):  # what a file holds counts, not where it lies
        found = _digest("allocation.mask", cfg["allocation"]["mask"], "a mask.safetensors")
        counted["allocation"] = cfg["allocation"] | {"mask": found}
    counted |= cfg["digests"]
    counted["mask_file"] = _without(cfg["mask_file"], "zeros") if cfg["mask"] is not None else None
    counted = _without(counted, "digests", "mask_name")
    for group in ("training", "allocation", "schedule", "ablation"):
        counted[group] = _without(counted[group], "name")  # a label; what they do is in their settings
    if cfg["training"]["lr_schedule"] == "cosine":
        counted["training"] = _without(counted["training"], "lr_drop_epochs", "lr_drop_factor")
    if cfg["pruner"]["score"] is None:  # nothing is scored and nothing allocated
        counted = _without(counted, "allocation") | {"pruner": {"name": cfg["pruner"]["name"]}}
    meaning: dict[str, Any] = _meaning(_without(counted, *without))
    return meaning


def _hash(cfg: dict[str, Any], without: set[str]) -> str:
    return hashlib.sha256(json.dumps(_counted(cfg, without), sort_keys=True).encode()).hexdigest()[:8]


def _digest(setting: str, path: str, wanted: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{setting}={path}: it cannot be read ({error.strerror}); give {wanted}") from error


def weights_digest(cfg: dict[str, Any]) -> str:
    """The checksum of the file with the weights to start from."""
    return _digest("weights", cfg["weights"], "a state dict")


def identify(cfg: dict[str, Any], key: str, digest: str) -> None:
    """Notes the checksum of what a file holds, or compares it with the one that was noted before.

    Raises:
        ConfigError: they differ.
    """
    noted = cfg["digests"][key]
    if noted is not None and noted != digest:
        raise ConfigError(
            f"{key}={cfg[key]}: it has changed since the run was composed (checksum {noted[:8]}, now {digest[:8]}); "
            f"put the earlier file back, or start a new run with {key}={cfg[key]}"
        )
    cfg["digests"][key] = digest


def _named(cfg: dict[str, Any], *ending: str) -> str:
    names = [cfg["dataset"]["name"], cfg["model"]["name"], cfg["pruner"]["name"], f"s{cfg['sparsity']:.12g}"]
    if any(cfg["ablation"][hook] is not None for hook in HOOKS):
        names.append(cfg["ablation"]["name"])
    return _safe("-".join([*names, *ending]))


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def run_id(cfg: dict[str, Any]) -> str:
    """The name of a run: directory, W&B id and resume key. A function of all that can change its result, and no more.

    Args:
        cfg: what `complete` returned.
    """
    return _named(cfg, f"seed{cfg['seed']}", _hash(cfg, NOT_IDENTITY))


def directory(cfg: dict[str, Any]) -> Path:
    """Where a run keeps its records."""
    return Path(cfg["results_dir"]) / run_id(cfg)


def name_decides_images(cfg: dict[str, Any]) -> bool:
    """Whether every run on a dataset of this name sees the same images."""
    dataset = cfg["dataset"]
    return not (dataset.get("root") or dataset.get("subset") or dataset.get("verify") is False)


def group_id(cfg: dict[str, Any]) -> str:
    """The name shared by the runs that differ in nothing but their seed."""
    return _named(cfg, _hash(_told_apart_by_name(cfg), NOT_IDENTITY | {"seed"}))


def setting_id(cfg: dict[str, Any]) -> str:
    """The name of what runs have in common whose methods can be compared: dataset, model, training and protocol."""
    without = NOT_IDENTITY | _of_method(cfg) | _POINT
    return _safe(f"{cfg['dataset']['name']}-{cfg['model']['name']}-{_hash(cfg, without)}")


def method_id(cfg: dict[str, Any]) -> str:
    """The name of a method, whatever it is applied to: pruner, allocation, schedule and ablation."""
    return _safe(f"{cfg['pruner']['name']}-{_hash(_told_apart_by_name(cfg), set(cfg) - _of_method(cfg))}")


def _of_method(cfg: dict[str, Any]) -> set[str]:
    """The settings that make a method; weights that come with a mask of a name are a part of what it names."""
    return _OF_METHOD | {"weights"} if cfg["mask_name"] else _OF_METHOD


def _told_apart_by_name(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config where a name stands for the mask and weights of each seed, if the user gave one.

    Whether weights are given still counts: the same mask on the weights of the seed is the usual control.
    """
    if not cfg["mask_name"]:
        return cfg
    return cfg | {"digests": {"mask": None, "weights": None if cfg["weights"] is None else "given"}}


def differences(
    cfg: dict[str, Any], other: dict[str, Any], ignored: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ that can change a result, seeds aside: none where their group is one.

    Args:
        cfg: what `complete` returned.
        other: the same of another run.
        ignored: groups and settings, by their first name, that are not looked at.

    Returns:
        Of each dotted setting the values here and there, None where it is not set.
    """
    without = NOT_IDENTITY | {"seed", *ignored}
    ours, theirs = _leaves(_counted(cfg, without)), _leaves(_counted(other, without))
    keys = sorted(ours.keys() | theirs.keys())
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def _leaves(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def rerunnable(cfg: dict[str, Any]) -> str:
    """A completed config as a yaml file: `python run.py -cp DIRECTORY -cn config` runs it again."""
    return OmegaConf.to_yaml(OmegaConf.create({"defaults": ["run_schema", "_self_"], **cfg}))
