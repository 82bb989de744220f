"""The words of a command line. An error names the wrong word in one line, and what was probably meant."""

import copy
import difflib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast, get_args

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from pai_bench.config import checks, composition, schema
from pai_bench.config.schema import RunConfig
from pai_bench.config.signatures import shown
from pai_bench.errors import ConfigError, UserError, is_installed
from pai_bench.launch import names
from pai_bench.training.recipe import unreached

log = logging.getLogger(__name__)

_OPTIONAL = ("experiment", "scale", "diagnostics")  # a run may leave out these groups
_NO_EFFECT = ("hydra.run", "hydra.sweep", "hydra.output_subdir", "hydra.job.chdir", "hydra/output")


def parsed(words: Sequence[str]) -> list[Override]:
    """The overrides of a command line.

    Raises:
        ConfigError: a word is no override.
    """
    result = []
    for word in words:
        try:
            result.append(_parsed(word))
        except HydraException as error:
            key, _, value = word.partition("=")
            remedy = f"put the value in quotes, as in '{key}=\"{value}\"'" if value else "give key=value"
            raise ConfigError(
                f"{word.encode('ascii', 'backslashreplace').decode()}: it cannot be read; {remedy}"
            ) from error
    return result


@lru_cache(maxsize=10_000)  # the runs of a sweep have most words in common
def _parsed(word: str) -> Override:
    override = OverridesParser.create().parse_override(word)
    if not override.key_or_group.replace("=", ""):
        raise HydraException("there is no key")
    return override


def _values(override: Override) -> list[Any]:
    """The values that an override gives to its key. A sweep gives several."""
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_discrete_sweep():  # an interval, which sweepers that search take
        interval: Any = override.value()
        return [interval.start, interval.end]
    try:
        return [value.text if hasattr(value, "text") else value for value in override.sweep_iterator()]
    except HydraException as error:
        raise ConfigError(f"{override.input_line}: give values, as in {override.key_or_group}=1,2") from error


def meant(word: str, known: Collection[str]) -> str:
    """What was probably meant by a word, as the end of an error line; maybe empty."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.7)
    return f" (did you mean {lower[near[0]]}?)" if near else ""


# Before Hydra composes ------------------------------------------------------------------------------------------------


def check(words: Sequence[str], loader: ConfigLoaderImpl) -> None:
    """Refuses words that cannot be read, and groups and options that do not exist.

    Args:
        loader: knows the folders of configs.

    Raises:
        ConfigError: there is such a word.
    """
    overrides = parsed(words)
    loader = _with_searchpath(loader, overrides)
    for override in overrides:
        key = override.key_or_group
        if any(key == setting or key.startswith(f"{setting}.") for setting in _NO_EFFECT):
            raise ConfigError(
                f"{override.input_line}: it has no effect, as runs keep their own files; give results_dir=PATH"
            )
        if key == "hydra":
            raise ConfigError(f"{override.input_line}: give a setting of Hydra, as hydra.KEY=VALUE; see --hydra-help")
        if _is_group(key, loader):
            _check_option(override, loader)
        elif "/" in key or override.package is not None:
            raise ConfigError(f"{override.input_line}: there is no group {key}; see --help")
        elif key == "hydra.mode" and str(override.value()) not in ("RUN", "MULTIRUN"):
            raise ConfigError(f"{override.input_line}: give RUN or MULTIRUN")


def loader_here() -> ConfigLoaderImpl:
    """Hydra's loader, which knows the folders of configs. Works inside hydra.initialize_config_dir."""
    return cast(ConfigLoaderImpl, GlobalHydra.instance().config_loader())


def _is_group(key: str, loader: ConfigLoaderImpl) -> bool:
    return key != "hydra" and all(key.split("/")) and bool(loader.repository.group_exists(key))


def _with_searchpath(loader: ConfigLoaderImpl, overrides: Sequence[Override]) -> ConfigLoaderImpl:
    """A loader that also knows the folders of hydra.searchpath=."""
    given = [override for override in overrides if override.key_or_group == "hydra.searchpath"]
    for override in given:
        paths: Any = override.value()
        fits = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if not fits or not all("://" in path and _is_there(path) for path in paths):
            raise ConfigError(
                f"{override.input_line}: give folders that exist, as in hydra.searchpath=[file:///home/me/conf]"
            )
        search_path = copy.deepcopy(loader.get_search_path())
        for path in paths:
            search_path.append("command line", path)
        loader = ConfigLoaderImpl(search_path)
    return loader


def _is_there(path: str) -> bool:
    scheme, _, folder = path.partition("://")
    return scheme != "file" or Path(folder).is_dir()


def _check_option(override: Override, loader: ConfigLoaderImpl) -> None:
    """Refuses an override that names no option of its group."""
    group, line = override.key_or_group, override.input_line
    if override.is_delete():
        if group not in _OPTIONAL:
            raise ConfigError(f"{line}: a run needs an option of {group}; give {group}=NAME")
        return
    options = loader.repository.get_group_options(group, ObjectType.CONFIG)
    if (override.is_add() or override.is_force_add()) and (
        group in _OPTIONAL or group.startswith("hydra/") or _is_needed(group)
    ):
        raise ConfigError(f"{line}: leave the + out; {group}=NAME chooses an option")
    for value in _values(override):
        if value is None and group in _OPTIONAL and not override.is_sweep_override():
            continue
        if not isinstance(value, str) or value not in options:
            near = meant(value, options) if isinstance(value, str) else ""
            raise ConfigError(
                f"{group}={shown(value)}: there is no such option{near}; give one of {', '.join(options)}"
            )


def _is_needed(group: str) -> bool:
    return schema.is_setting(group)


# After Hydra has failed -----------------------------------------------------------------------------------------------


@contextmanager
def explained(words: Sequence[str], loader: ConfigLoaderImpl, name: str = "config") -> Iterator[None]:
    """If composing a config inside the block fails, raises an error that names the wrong word.

    Args:
        loader: knows the folders of configs.
        name: the name of the primary config.

    Raises:
        ConfigError: instead of Hydra's error, if a wrong word explains it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        _blame(words, loader, name)
        raise error


def _blame(words: Sequence[str], loader: ConfigLoaderImpl, name: str) -> None:
    """Applies the words one after another, and raises an error for the first wrong one."""
    overrides = parsed(words)
    loader = _with_searchpath(loader, overrides)
    groups = [override for override in overrides if _is_group(override.key_or_group, loader)]
    chosen = [
        f"{override.key_or_group}={value}" if override.is_sweep_override() else override.input_line or ""
        for override in groups
        for value in _values(override)[:1]
    ]
    tree = loader.load_configuration(name, chosen, RunMode.RUN)
    for override in overrides:
        if override not in groups:
            _check_key(override, tree)
            for value in _values(override):
                _apply(override, value, tree)


def _check_key(override: Override, tree: DictConfig) -> None:
    """Refuses a key that is not in the composed config."""
    key = override.key_or_group
    node: Any = tree
    group, *_ = parts = key.split(".")
    for depth, part in enumerate(parts):
        before = ".".join(parts[:depth])
        if node is None:
            raise ConfigError(
                f"{override.input_line}: {before} is null for this {group}; choose one that has it ({group}=NAME)"
            )
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{override.input_line}: {before} has no settings of its own; give {before}=VALUE")
        if part not in list(node):  # `in node` would say that a setting without a value (???) is not there
            if override.is_add() or override.is_force_add():
                _check_addition(override, tree)
                return
            chosen = OmegaConf.select(tree, "hydra.sweeper.params") or {}
            if group in chosen:
                remedy = f"give {group}={chosen[group]} too, as this sweep does for its runs"
                raise ConfigError(f"{key}: there is no such setting; {remedy}")
            raise ConfigError(f"{key}: there is no such setting; see --help{_meant_key(key, tree)}")
        inner = node._get_node(part)
        plain: Any = OmegaConf.to_container(node)
        node = inner if isinstance(inner, DictConfig) and not inner._is_none() else plain[part]


def _check_addition(override: Override, tree: DictConfig) -> None:
    """Refuses a new setting of Hydra that Hydra would not accept. Our own settings are checked later, all at once."""
    key = override.key_or_group
    takes_any = str(tree.hydra.launcher._target_).startswith("hydra_plugins.pai_bench_plugins")
    if key.startswith("hydra.") and not key.startswith(
        ("hydra.sweeper.params.", "hydra.sweeper.scale.", "hydra.job.env")
    ):
        if key.startswith("hydra.launcher.") and takes_any:
            return
        raise ConfigError(f"{override.input_line}: there is no such setting; see --hydra-help{_meant_key(key, tree)}")


def _meant_key(key: str, tree: DictConfig) -> str:
    known = list(_keys(OmegaConf.to_container(tree, resolve=False)))
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last and not name.startswith("hydra.")]
    return f" (did you mean {same[0]}?)" if same else meant(key, known)


def _keys(settings: Any, path: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{path}{key}.")


def _apply(override: Override, value: Any, tree: DictConfig) -> None:
    """Gives a setting its value."""
    key = override.key_or_group
    try:
        if override.is_delete():
            ConfigLoaderImpl._apply_overrides_to_config([override], tree)
        else:
            OmegaConf.update(tree, key, value, merge=True, force_add=override.is_add() or override.is_force_add())
    except Exception as error:
        sign = "~" if override.is_delete() else ""
        raise ConfigError(f"{sign}{key}={shown(value)}: give {_wanted(key, value, tree)}") from error


def _wanted(key: str, value: Any, tree: DictConfig) -> str:
    """What a setting accepts, in words."""
    if not key.startswith("hydra.") and (said := schema.wanted(key, value)):
        return said
    node = OmegaConf.select(tree, key.rpartition(".")[0] or key)
    node = node._get_node(key.rpartition(".")[2]) if isinstance(node, DictConfig) else None
    kind = node._metadata.ref_type if node is not None else None
    kinds = [kind, *get_args(kind)]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(node, DictConfig) and not key.startswith("hydra."):
        group, _, last = key.rpartition(".")
        null = f"null, as this {group} has, or choose one that has a value for {last} ({group}=NAME)"
        return null if node._is_none() else f"settings that it has: {', '.join(map(str, node))}"
    return next((words[kind] for kind in kinds if kind in words), "a value of another kind")


# What only the words of a run show ------------------------------------------------------------------------------------


def complete(composed: DictConfig, of_hydra: Any) -> RunConfig:
    """The checked config of a run.

    Args:
        composed: the config, with or without Hydra's part; that part is removed.
        of_hydra: Hydra's part.

    Raises:
        ConfigError: like checks.complete; also if a label, a scale or a sparsity would have no effect.
    """
    choices = of_hydra.runtime.choices
    words: Any = OmegaConf.to_container(of_hydra.overrides.task, resolve=False)  # a ${} in a word stays as it is
    check_scale(choices)
    with open_dict(composed):
        composed.pop("hydra", None)
    settings = composition.resolved(composed)
    given = {override.key_or_group: override.value() for override in parsed(words)}
    chosen = any(key.partition(".")[0] == "tracker" for key in given) or "WANDB_MODE" in os.environ
    if not chosen and settings["tracker"]["name"] == "wandb" and not is_installed("wandb"):
        _say_once("W&B is not installed: the run directory is the only record; pip install wandb, or give tracker=none")
        settings["tracker"] = {"name": "none", "_target_": "pai_bench.runs.tracking.none"}
    run = checks.complete(settings)
    if choices.get("experiment"):
        scale = choices.get("scale")
        run = replace(run, experiment=choices["experiment"], scale=None if scale == "full" else scale)
    _check_labels(given, choices)
    _tell_of_rates(run, given)
    if choices.get("scale") in (None, "full"):  # a small one is short on purpose
        for line in unreached(run.training):
            _say_once(line)
    if choices.get("experiment") or any(key.startswith("model.") for key in given):
        run = names.with_changes(run, of_hydra)
    target = next((key for key in schema.TARGETS if given.get(key) is not None), None)
    if target and "pruner" not in given and not run.prunes:
        raise ConfigError(f"{target}={given[target]} needs pruner=NAME; without one the network stays dense")
    return run


def _tell_of_rates(run: RunConfig, given: Mapping[str, Any]) -> None:
    """Says that settings of the step schedule do nothing beside another schedule. A sweep may have both schedules."""
    for key in ("training.lr_milestones", "training.lr_gamma"):
        if given.get(key) and (kind := run.training.lr_schedule) != "step":
            _say_once(f"{key}={shown(given[key])}: it has no effect with training.lr_schedule={kind}")


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


def tries_all(sweeper: Any) -> bool:
    """Whether a sweeper of Hydra tries all combinations, and searches nothing.

    Args:
        sweeper: hydra.sweeper.
    """
    return str(sweeper._target_).endswith(("GridSweeper", "BasicSweeper"))


def check_scale(choices: Mapping[str, str | None]) -> None:
    """Refuses a scale without an experiment.

    Args:
        choices: the chosen option of each config group.

    Raises:
        ConfigError: a scale is given, and no experiment.
    """
    scale = choices.get("scale")
    if scale not in (None, "full") and choices.get("experiment") is None:
        raise ConfigError(f"scale={scale}: it makes an experiment smaller; add experiment=NAME, or leave it out")


def _check_labels(given: Mapping[str, Any], choices: Mapping[str, str | None]) -> None:
    """Refuses a name= that does not fit what runs."""
    for key, label in given.items():
        group, _, rest = key.partition(".")
        chosen = choices.get(group)
        if rest != "name" or chosen in (None, "timm", label):
            continue
        others = {path.stem for path in (composition.CONF / group).glob("*.yaml")}
        if label in others:
            raise ConfigError(
                f"{key}={label}: that is another option of {group}; say {group}={label}, or give another name"
            )
        if chosen != "image_folder" and not any(other.startswith(f"{group}.") and other != key for other in given):
            architecture = f" (an architecture of timm: model=timm model.name={label})" if group == "model" else ""
            raise ConfigError(
                f"{key}={label}: it is only a label, and {group}={chosen} stays as it is; leave it out{architecture}"
            )
