"""What a run may say: one frozen value with all of its settings, and the checks of each of them by itself.

The types of the fields, with their ranges, are the schema. `signatures` checks the arguments of functions likewise.
"""

from __future__ import annotations

import ast
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len

from pai_bench.config import identity, signatures
from pai_bench.config.signatures import check_call, check_keys, check_value, shown
from pai_bench.core import (
    HOOKS,
    Ablation,
    Call,
    Count,
    NonNegative,
    NonNegativeInt,
    Prunable,
    Pruner,
    ScoringData,
    Target,
)
from pai_bench.errors import ConfigError
from pai_bench.learned.settings import Search
from pai_bench.training.recipe import Recipe
from pai_bench.training.rewires import Rewiring

Plain = dict[str, Any]  # settings as a yaml file has them
FileSetting = Literal["mask", "weights", "transfer", "allocation"]  # whose files a run knows by their checksums


@dataclass(frozen=True)
class MaskFile:
    """How a mask is read that another framework may have written."""

    names: Literal["exact", "order"]
    missing: Literal["refuse", "keep"]
    zeros: bool


@dataclass(frozen=True)
class Checksums:
    """Of what files hold, so that a run which goes on notices another file."""

    mask: str | None
    weights: str | None
    transfer: str | None = None
    allocation: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One run: all of its settings, checked, and the names that follow from them. The values live in conf/."""

    sparsity: float  # the target; 0 for a dense network
    target: Target  # what the sparsity counts
    prunable: Prunable | Annotated[list[Prunable], Len(1)]
    repair: Literal["flow"] | None  # of what an allocation keeps
    seed: NonNegativeInt
    protocol: NonNegativeInt
    model: Call
    dataset: Call
    allocation: Call
    schedule: Call
    pruner: Pruner
    ablation: Ablation
    rewire: Rewiring
    training: Recipe
    mask: str | None
    mask_name: str | None
    mask_file: MaskFile
    weights: str | None
    checksums: Checksums
    on_collapse: Literal["record", "stop"]
    tracker: Call
    results_dir: str
    data_dir: str
    download: bool
    device: str
    num_workers: NonNegativeInt | None
    checkpoint_epochs: Count
    checkpoint_minutes: NonNegative
    channels_last: bool
    compile: bool
    save_scores: bool
    save_model: bool | Literal["half"]
    diagnostics: Call | None
    cache_gb: NonNegative
    search: Search | None = None  # None: no mask is learned
    validate_every_steps: Count | None = None  # None: the held-out images are looked at after every epoch
    transfer: Call | None = None  # None: training starts from the weights that the search leaves
    experiment: str | None = None  # the name of the sweep in a file that this run was part of
    scale: str | None = None  # how much smaller than in its file that sweep was; null if it was not

    @cached_property
    def id(self) -> str:
        """The name of the run: directory, W&B id and resume key. A function of all that can change its result."""
        return identity.run_id(plain(self))

    @cached_property
    def group(self) -> str:
        """The name shared by the runs that differ in nothing but their seed."""
        return identity.group_id(plain(self))

    @cached_property
    def task(self) -> str:
        """The name shared by runs whose methods can be compared: dataset, model, training and protocol."""
        return identity.task_id(plain(self))

    @cached_property
    def method(self) -> str:
        """The name of a method, whatever it is applied to: pruner, allocation, schedule, ablation and rewire."""
        return identity.method_id(plain(self))

    @cached_property
    def chain(self) -> str:
        """The name shared by runs that differ in nothing but how deep they prune, and what is broken at the end."""
        return identity.chain_id(plain(self))

    @property
    def directory(self) -> Path:
        """Where the run keeps its records."""
        return Path(self.results_dir) / self.id

    @property
    def tags(self) -> list[str]:
        """The names of its parts, of its experiment and of its scale: those by which one looks for a run."""
        names = [self.dataset.name, self.model.name, self.training.name, self.pruner.name]
        if self.pruner.score is not None:
            names.append(self.schedule.name)
        if any(getattr(self.ablation, hook) is not None for hook in HOOKS):
            names.append(self.ablation.name)
        names += [self.rewire.name] if self.rewires else []
        names += [self.transfer.name] if self.transfer else []
        names += [self.experiment] if self.experiment else []
        return [*names, f"scale={self.scale}"] if self.scale else names

    @property
    def keeps_weights(self) -> bool:
        """Whether the final weights are to be kept."""
        return self.save_model is not False

    @property
    def prunes(self) -> bool:
        """Whether the network is pruned: by a score, by a mask that is learned or given, or while it trains."""
        return self.starts_pruned or self.rewires

    @property
    def starts_pruned(self) -> bool:
        """Whether the last training starts with a mask: by a score, or one that is learned or given."""
        return self.pruner.score is not None or self.mask is not None or self.search is not None

    @property
    def rewires(self) -> bool:
        """Whether the mask moves while the network trains."""
        return self.rewire.rule is not None

    @property
    def start_sparsity(self) -> float:
        """What the pruner prunes to: the sparsity that is asked for, unless the mask reaches that while it moves."""
        return self.sparsity if self.rewire.start_sparsity is None else self.rewire.start_sparsity

    @property
    def name_decides_images(self) -> bool:
        """Whether every run on a dataset of this name sees the same images."""
        given = self.dataset.settings
        return not (given.get("root") or given.get("subset") or given.get("verify") is False)


GROUPS = ("model", "dataset", "allocation", "schedule", "tracker")  # each option names one function
OPTIONAL_GROUPS = ("diagnostics", "transfer")  # so do these, where an option is chosen
OF_SEARCH = ("search.method", "search.optimizer")  # and these, where a mask is learned
# Where a config names a function, or null.
CALLS = (
    *GROUPS,
    *OPTIONAL_GROUPS,
    "training.optimizer",
    "pruner.score",
    "pruner.transfer",
    *OF_SEARCH,
    "rewire.rule",
    *(f"ablation.{hook}" for hook in HOOKS),
)
TARGETS = ("sparsity", "density", "compression")  # ways to say one thing
_PARTS: dict[str, Any] = {
    "Pruner": Pruner,
    "Ablation": Ablation,
    "Rewiring": Rewiring,
    "Recipe": Recipe,
    "MaskFile": MaskFile,
    "Checksums": Checksums,
    "ScoringData": ScoringData,
    "Search": Search,
}
_TARGET_TYPE = "float | None"


def check(settings: Plain) -> None:
    """Checks the keys and the types of a whole config, and its calls. Fills in what a record gives a default.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or lies outside its range.
    """
    _check_record(RunConfig, settings, "")
    for key in TARGETS:
        check_value(key, settings[key], _parsed(_TARGET_TYPE))
    for path in CALLS:
        call = _at(settings, path)
        needed = path in (*GROUPS, "training.optimizer") or (path in OF_SEARCH and settings["search"] is not None)
        if needed or call is not None:
            check_call(path, call)


def _at(settings: Plain, path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = None if value is None else value[key]
    return value


def _check_record(record: Any, values: Plain, path: str) -> None:
    """Checks the keys of a part of the config, and the values that are no part themselves."""
    own = [key for key in fields(record) if path or key.name not in TARGETS]
    optional = [key.name for key in own if key.default is not MISSING and key.name != "name"]
    known = [key.name for key in own] if path else [*TARGETS, *(key.name for key in own)]
    check_keys(path, values, known, path or "a run", optional)
    for key in own:
        inner = f"{path}.{key.name}" if path else key.name
        value = values.setdefault(key.name, key.default)
        part = _part(key.type)
        if part is not None and not (value is None and "None" in str(key.type)):
            if not isinstance(value, dict):
                has = ", ".join(other.name for other in fields(part))
                raise ConfigError(f"{inner}={shown(value)}: it has settings of its own: {has}; set one of them")
            _check_record(part, value, inner)
        elif part is None and key.name != "name" and inner not in CALLS:
            check_value(inner, value, _parsed(str(key.type)), record.__module__)


def _part(annotation: object) -> Any:
    """The record that a field holds; None if it holds a value."""
    return _PARTS.get(str(annotation).removesuffix(" | None"))


@lru_cache
def _parsed(annotation: str) -> ast.expr:
    return ast.parse(annotation, mode="eval").body


def wanted(key: str, value: object) -> str | None:
    """What to give for a setting of the schema in place of a value; None if it takes it, or is no such setting."""
    if key in TARGETS:
        return signatures.problem(value, _parsed(_TARGET_TYPE))
    record: Any = RunConfig
    *groups, last = key.split(".")
    for group in groups:
        record = next((_part(known.type) for known in fields(record) if known.name == group), None)
        if record is None:
            return None
    found = next((known for known in fields(record) if known.name == last), None)
    if found is None or key in CALLS or _part(found.type):
        return None
    return signatures.problem(value, _parsed(str(found.type)), record.__module__)


def is_setting(key: str) -> bool:
    """Whether a run has such a setting or group."""
    return key in TARGETS or key in RunConfig.__dataclass_fields__


def defaults() -> Plain:
    """What the records give a default, so that a command line can set it where no yaml does."""
    records = {name: _part(kind) for name, kind in ((key.name, key.type) for key in fields(RunConfig))}
    return {
        name: {key.name: key.default for key in fields(record) if key.default is not MISSING and key.name != "name"}
        for name, record in records.items()
        if record is not None
    }


def made(settings: Plain) -> RunConfig:
    """The value of a config that has been checked, its target a sparsity.

    Raises:
        KeyError: a setting is missing.
        TypeError: there is one too many.
    """
    given = {key: value for key, value in settings.items() if key not in ("density", "compression")}
    run: RunConfig = _made(RunConfig, given, "")
    return run


def _made(record: Any, values: Plain, path: str) -> Any:
    types = {key.name: key.type for key in fields(record)}

    def value_of(name: str, value: Any) -> Any:
        inner = f"{path}.{name}" if path else name
        if value is None:
            return None
        if inner in CALLS:
            return _call(value)
        part = _part(types.get(name))
        return value if part is None else _made(part, value, inner)

    return record(**{name: value_of(name, value) for name, value in values.items()})


def _call(value: Plain) -> Call:
    settings = {key: item for key, item in value.items() if key not in ("name", "_target_")}
    return Call(value["_target_"], settings, value.get("name", ""))


def plain(run: RunConfig) -> Plain:
    """A config as a yaml file has it: `pai-bench -cp DIRECTORY -cn config` makes the same value of it."""
    settings: Plain = _plain(run, "")
    return ordered({"density": None, "compression": None} | settings)


def ordered(settings: Plain) -> Plain:
    """Settings in the order of the records, which people read best: what is run, then how, then where to."""
    of_record = _ordered(RunConfig, settings)
    return {key: settings[key] for key in TARGETS if key in settings} | of_record


def _ordered(record: Any, settings: Plain) -> Plain:
    parts = {key.name: _part(key.type) for key in fields(record)}
    names = [name for name in ("name", *parts) if name in settings]
    found: Plain = {}
    for name in dict.fromkeys([*names, *settings]):
        value, part = settings[name], parts.get(name)
        found[name] = value if part is None or not isinstance(value, dict) else _ordered(part, value)
    return found


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, Call):
        name = {"name": value.name} if path in (*GROUPS, *OPTIONAL_GROUPS) else {}
        return {**name, "_target_": value.target, **value.settings}
    if type(value) is RunConfig or type(value) in _PARTS.values():
        named = ((key.name, getattr(value, key.name)) for key in fields(value))
        return {name: _plain(item, f"{path}.{name}" if path else name) for name, item in named}
    return value


def with_checksum(run: RunConfig, key: FileSetting, checksum: str) -> RunConfig:
    """A config that knows what a file holds. See `checks.identified`."""
    return replace(run, checksums=replace(run.checksums, **{key: checksum}))
