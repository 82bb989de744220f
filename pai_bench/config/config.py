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
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from annotated_types import Ge, Gt, Le, Lt
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pai_bench.config import signatures
from pai_bench.config.signatures import check_call, check_keys, check_value, shown
from pai_bench.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"

Mode = Literal["eval", "train"]
LearningRateSchedule = Literal["step", "cosine"]
Precision = Literal["float32", "tfloat32", "bfloat16", "float16"]
ScoringPrecision = Literal["float64", "float32"]
OnCollapse = Literal["record", "stop"]
Reduction = Literal["sum", "abs_sum", "l2", "max"]
Names = Literal["exact", "order"]
Missing = Literal["refuse", "keep"]
HOOKS = ("batches", "images", "scores", "mask", "weights")
Call = dict[str, Any]  # a name, a _target_, and the keyword arguments of that function


def _setting(*ranges: object, choices: Any = None) -> Any:
    """A setting of the schema with its range, or with the Literal that has its values."""
    return field(default=MISSING, metadata={"ranges": ranges, "choices": choices})


@dataclass
class ScoringDataConfig:
    """core.ScoringData: which training images a score looks at."""

    per_class: int | None = _setting(Ge(1))
    total: int | None = _setting(Ge(1))
    batch_size: int = _setting(Ge(2))
    augment: bool = MISSING
    balanced: bool | None = None


@dataclass
class PrunerConfig:
    """core.Pruner: a score and the conditions under which it is taken."""

    name: str = MISSING
    score: Call | None = MISSING
    mode: str = _setting(choices=Mode)
    scoring_data: ScoringDataConfig | None = MISSING
    dtype: str = field(default="float64", metadata={"choices": ScoringPrecision})
    reduce: str | None = field(default=None, metadata={"choices": Reduction})
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
    epochs: int = _setting(Ge(0))
    batch_size: int = _setting(Ge(2))
    lr: float = _setting(Gt(0), Lt(3e38))  # what float32 holds
    optimizer: Call = MISSING
    weight_decay: float = _setting(Ge(0), Lt(3e38))
    decay_norm_and_bias: bool = MISSING
    lr_schedule: str = _setting(choices=LearningRateSchedule)
    lr_milestones: list[int] = MISSING
    lr_gamma: float = _setting(Gt(0), Le(1))
    warmup_epochs: int = _setting(Ge(0))
    label_smoothing: float = _setting(Ge(0), Lt(1))
    temperature: float = _setting(Gt(0))
    precision: str = _setting(choices=Precision)
    compact: Any = MISSING  # "auto" or "off", which Hydra reads as False


@dataclass
class MaskFileConfig:
    """How mask_files reads a mask that another framework may have written."""

    names: str = _setting(choices=Names)
    missing: str = _setting(choices=Missing)
    zeros: bool = MISSING


@dataclass
class ChecksumsConfig:
    """Checksums of what files hold, for a run that goes on later."""

    mask: str | None = MISSING
    weights: str | None = MISSING


@dataclass
class RunConfig:
    """One run. The values live in conf/."""

    sparsity: float | None = MISSING
    density: float | None = MISSING
    compression: float | None = MISSING
    seed: int = _setting(Ge(0))
    protocol: int = _setting(Ge(0))
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
    checksums: ChecksumsConfig = field(default_factory=ChecksumsConfig)
    on_collapse: str = _setting(choices=OnCollapse)
    tracker: Call = MISSING
    results_dir: str = MISSING
    data_dir: str = MISSING
    download: bool = MISSING
    device: str = MISSING
    num_workers: int | None = _setting(Ge(0))
    checkpoint_epochs: int = _setting(Ge(1))
    checkpoint_minutes: float = _setting(Ge(0))
    channels_last: bool = MISSING
    compile: bool = MISSING
    save_scores: bool = MISSING
    save_model: Any = MISSING  # a bool, or "half"
    diagnostics: bool = MISSING
    cache_gb: float = _setting(Ge(0))


# What cannot change a result: where things lie (so dataset.root too), how fast they run, what is kept.
NOT_IDENTITY = {
    "tracker", "results_dir", "data_dir", "download", "save_scores", "save_model", "diagnostics",
    "checkpoint_epochs", "checkpoint_minutes", "device", "num_workers", "channels_last", "compile", "cache_gb",
}  # fmt: skip
# Where on a curve of accuracy against sparsity a run stands, and what makes one curve of its setting.
_POINT = {"sparsity", "density", "compression", "seed"}
_OF_METHOD = {"pruner", "allocation", "schedule", "ablation", "mask", "mask_file"}
_CALLS = ("model", "dataset", "allocation", "schedule", "tracker")  # groups that name one function


def _runs_at_once() -> int:
    """How many runs this machine does at once: one on each GPU, or else one on each core."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


# Hydra insists on writing multirun.yaml somewhere; nothing reads it. A folder of this process, which the sweeper makes.
SCRATCH = Path(tempfile.gettempdir()) / f"pai_bench-{secrets.token_hex(16)}"


def register() -> None:
    """Stores the schema, and the order that Hydra writes nothing itself: pai_bench.runs.store keeps the records.

    They replace Hydra's own defaults, so they hold for any primary config, that of an earlier run included.
    """
    OmegaConf.register_new_resolver("runs_at_once", _runs_at_once, replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    ours = {"output": "no_files", "job_logging": "none", "sweeper": "grid"}
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
    cfg = _resolved(composed)
    _check_schema(RunConfig, cfg, "")
    for group in _CALLS:
        check_call(group, cfg[group])
    hooks = [("ablation", hook) for hook in HOOKS]
    for group, key in (("training", "optimizer"), ("pruner", "score"), ("pruner", "transfer"), *hooks):
        if cfg[group][key] is not None:
            check_call(f"{group}.{key}", cfg[group][key])
    _expand_home(cfg)
    if cfg["dataset"]["name"] is None and cfg["dataset"].get("root"):  # a folder of images is known by its own name
        cfg["dataset"]["name"] = Path(cfg["dataset"]["root"]).resolve().name
    for group in (*_CALLS, "pruner", "ablation", "training"):
        _check_name(f"{group}.name", cfg[group]["name"])
    if cfg["mask_name"] is not None:
        _check_name("mask_name", cfg["mask_name"])
    cfg["training"]["compact"] = "off" if cfg["training"]["compact"] is False else cfg["training"]["compact"]
    if cfg["mask"] is not None:
        cfg["pruner"]["name"] = cfg["mask_name"] or "mask"
    _check_ranges(cfg)
    _check_fits_together(cfg)
    cfg["sparsity"] = _sparsity(cfg) if cfg["mask"] is None else _of_mask(cfg)
    if cfg["weights"] is not None and not _is_stored(cfg, "weights"):
        identify(cfg, "weights", weights_digest(cfg))
    cfg["density"] = cfg["compression"] = None
    return cfg


def _resolved(composed: DictConfig) -> dict[str, Any]:
    """A composed config as plain values."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is missing: add {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        remedy = "what it names in ${} is not there, or of another kind; give a value"
        raise ConfigError(f"{error.full_key}: {remedy}") from error
    except RecursionError as error:
        raise ConfigError("a setting names itself in ${}; give it a value") from error


def _check_schema(schema: type, values: dict[str, Any], path: str) -> None:
    """Checks the keys of a part of the config, and the values that are no part themselves."""
    optional = [
        key.name for key in fields(schema) if key.default is not MISSING and key.default is not DATACLASS_MISSING
    ]
    check_keys(path, values, [key.name for key in fields(schema)], path or "a run", optional)
    for key in fields(schema):
        value, inner = values.setdefault(key.name, key.default), f"{path}.{key.name}" if path else key.name
        parts = [part for part in (key.type, *get_args(key.type)) if isinstance(part, type) and is_dataclass(part)]
        if parts and not (value is None and type(None) in get_args(key.type)):
            if not isinstance(value, dict):
                known = ", ".join(part.name for part in fields(parts[0]))
                raise ConfigError(f"{inner}={shown(value)}: it has settings of its own: {known}; set one of them")
            _check_schema(parts[0], value, inner)
        elif not parts and key.name != "name":
            check_value(inner, value, _annotation(key))


@lru_cache
def _annotation(key: Field[Any]) -> ast.expr:
    """The type of a setting of the schema with its range, as in a signature."""
    text = key.type.__name__ if isinstance(key.type, type) else str(key.type)
    if choices := key.metadata.get("choices"):
        text = f"{choices} | None" if text.endswith("None") else str(choices)
    if ranges := key.metadata.get("ranges"):
        text = f"Annotated[{text}, {', '.join(map(repr, ranges))}]"
    return ast.parse(text, mode="eval").body


def wanted(key: str, value: object) -> str | None:
    """What to give for a setting of the schema in place of a value; None if it takes it, or is no such setting."""
    schema: Any = RunConfig
    *groups, last = key.split(".")
    for group in groups:
        types = [known.type for known in fields(schema) if known.name == group]
        schema = next((part for kind in types for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
        if schema is None:
            return None
    found = next((known for known in fields(schema) if known.name == last), None)
    return signatures.problem(value, _annotation(found)) if found else None


def check_origin(cfg: object, where: object) -> None:
    """Refuses a config from elsewhere that names functions of other packages: to call them is to run a program.

    Raises:
        ConfigError: it does.
    """
    if isinstance(cfg, dict):
        target = cfg.get("_target_", "pai_bench.")
        if not isinstance(target, str) or not target.startswith("pai_bench."):
            raise ConfigError(
                f"_target_={shown(target)}: {where} names a function that is not ours; add --trust if it is yours"
            )
    for item in cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, list) else ():
        check_origin(item, where)


def _expand_home(cfg: dict[str, Any]) -> None:
    """Puts the home folder in the place of ~ at the beginning of paths, which shells do not do behind an =."""
    for part, key in (
        (cfg, "results_dir"),
        (cfg, "data_dir"),
        (cfg, "mask"),
        (cfg, "weights"),
        (cfg["dataset"], "root"),
        (cfg["allocation"], "mask"),
    ):
        if isinstance(path := part.get(key), str) and path.startswith("~"):
            try:
                part[key] = str(Path(path).expanduser())
            except RuntimeError as error:
                raise ConfigError(f"{key}={path}: there is no such user; give a path") from error


def _check_name(setting: str, name: object) -> None:
    _require(isinstance(name, str) and name != "", setting, name, "give a word (quote a number: \"'7'\")")
    bad = set(str(name)) & set("/\\") or not str(name).isprintable()
    _require(
        not bad and str(name)[0] not in ".-", setting, name, "give a word without / that does not begin with . or -"
    )
    _require(len(str(name)) <= 100, setting, name, "give one of at most 100 letters")


def _require(condition: bool, setting: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{setting}={shown(value)}: {remedy}")


def _word(value: object) -> object:
    """A setting that may be a bool or a word, as a user writes it."""
    return str(value).lower() if isinstance(value, bool) else value


def _check_ranges(cfg: dict[str, Any]) -> None:
    """Refuses values that only others make wrong, and those whose range no type can say."""
    _check_tracker(cfg["tracker"])
    training, dataset, examples = cfg["training"], cfg["dataset"], cfg["pruner"]["scoring_data"]
    device = re.fullmatch(r"auto|cpu|cuda|cuda:[0-9]{1,2}", cfg["device"])
    _require(device is not None, "device", cfg["device"], "give auto, cpu, cuda or cuda:<n>")
    if training["optimizer"].get("nesterov"):
        needs = "it needs training.optimizer.momentum above 0"
        _require(training["optimizer"]["momentum"] > 0, "training.optimizer.nesterov", True, needs)
    for setting, value, choices in (
        ("training.compact", training["compact"], ("auto", "off")),
        ("save_model", _word(cfg["save_model"]), ("true", "half", "false")),
    ):
        _require(value in choices, setting, value, f"give one of {', '.join(choices)}")
    drops = training["lr_milestones"]
    _require(drops == sorted(drops), "training.lr_milestones", drops, "give the epochs in rising order")
    _require(not drops or drops[0] >= 0, "training.lr_milestones", drops, "give epochs of 0 or more")
    mean, std = dataset.get("mean") or (), dataset.get("std") or ()
    _require(
        len(mean) == len(std),
        "dataset.std",
        dataset.get("std"),
        f"give as many values as dataset.mean={shown(dataset.get('mean'))} has",
    )
    if "store" in dataset:
        size, resize, store = dataset["size"], dataset["resize"], dataset["store"]
        _require(resize >= size, "dataset.resize", resize, f"give dataset.size={size} or more")
        _require(store is None or store >= resize, "dataset.store", store, f"give dataset.resize={resize} or more")
    if examples is not None:
        per_class, total = examples["per_class"], examples["total"]
        _require(
            (per_class is None) != (total is None),
            "pruner.scoring_data", {"per_class": per_class, "total": total}, "give one of the two and null the other",
        )  # fmt: skip


def _check_tracker(tracker: Call) -> None:
    """Refuses what W&B would refuse later, when the run has begun."""
    if tracker["_target_"] != "pai_bench.runs.tracking.wandb":
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
        _require(
            cfg["checksums"]["weights"] is None, "checksums.weights", cfg["checksums"]["weights"], "add weights=PATH"
        )
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
    if (ablation["batches"] is not None or ablation["images"] is not None) and pruner["scoring_data"] is None:
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
        raise ConfigError(
            f"schedule={schedule['name']}: allocation=densities_of_mask has one target; use schedule=one_shot"
        )
    if schedule["_target_"].endswith(".fine_tune"):
        drops = training["lr_milestones"]
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
            ("checksums.mask", cfg["checksums"]["mask"], None),
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
    return cfg["checksums"][key] is not None and not Path(cfg[key]).is_file()


def _of_mask(cfg: dict[str, Any]) -> float:
    """The sparsity of the mask that is given. Notes what the mask is."""
    from pai_bench.masks import mask_files

    path, file = cfg["mask"], cfg["mask_file"]
    if _is_stored(cfg, "mask") and cfg["sparsity"] is not None:
        return float(cfg["sparsity"])
    masks = mask_files.read("mask", path, zeros=file["zeros"])
    again = cfg["checksums"]["mask"] is not None  # the config of a run, which has its sparsity
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


# Identity -------------------------------------------------------------------------------------------------------------


def _meaning(value: Any, group: str = "") -> Any:
    """A setting such that two that mean the same are equal."""
    if isinstance(value, dict):  # null is "no effect", so a new setting that starts as null renames no run
        of = {key: _meaning(item, group or key) for key, item in value.items() if item is not None}
        return of | {"_target_": function_name(group, of["_target_"])} if "_target_" in of else of
    if isinstance(value, list):
        return [_meaning(item, group) for item in value]
    return float(value) if type(value) is int else value  # 1 and 1.0 are the same setting


def function_name(group: str, target: str) -> str:
    """What a function is called in a group of the config, wherever it lies: a move renames no run.

    Of ours the name; of a pruner's, whose file is named after the method, the file's too. Of others the whole path.
    """
    path = target.split(".")
    if path[0] != "pai_bench":
        return target
    return ".".join(path[-2:] if group == "pruner" else path[-1:])


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
    counted |= cfg["checksums"]
    counted["mask_file"] = _without(cfg["mask_file"], "zeros") if cfg["mask"] is not None else None
    counted = _without(counted, "checksums", "mask_name")
    for group in ("training", "allocation", "schedule", "ablation"):
        counted[group] = _without(counted[group], "name")  # a label; what they do is in their settings
    if cfg["training"]["lr_schedule"] == "cosine":
        counted["training"] = _without(counted["training"], "lr_milestones", "lr_gamma")
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
    noted = cfg["checksums"][key]
    if noted is not None and noted != digest:
        raise ConfigError(
            f"{key}={cfg[key]}: it has changed since the run was composed (checksum {noted[:8]}, now {digest[:8]}); "
            f"put the earlier file back, or start a new run with {key}={cfg[key]}"
        )
    cfg["checksums"][key] = digest


def _named(cfg: dict[str, Any], *ending: str) -> str:
    names = [cfg["dataset"]["name"], cfg["model"]["name"], cfg["pruner"]["name"], f"s{cfg['sparsity']:.6g}"]
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


def task_id(cfg: dict[str, Any]) -> str:
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
    return cfg | {"checksums": {"mask": None, "weights": None if cfg["weights"] is None else "given"}}


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
