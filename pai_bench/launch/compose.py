"""From words on a command line to the checked configs of runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from pai_bench.config import checks, composition
from pai_bench.config.schema import RunConfig
from pai_bench.core import Call
from pai_bench.errors import ConfigError, DataError, UserError
from pai_bench.launch import overrides, sweeps
from pai_bench.launch.terminal import one_line


def _composed(words: list[str]) -> DictConfig:
    """The config of a command line, with Hydra's part. Works inside hydra.initialize_config_dir."""
    loader = overrides.loader_here()
    overrides.check(words, loader)
    with overrides.explained(words, loader):
        return hydra.compose("config", words, return_hydra_config=True)


def compose(words: list[str]) -> RunConfig:
    """The checked config that a command line with these overrides would run.

    Raises:
        ConfigError: a word is wrong.
    """
    composition.register()
    with hydra.initialize_config_dir(str(composition.CONF), version_base="1.3"):
        composed = _composed(words)
        return overrides.complete(composed, composed.hydra)


def expand(
    words: list[str], choose: Callable[[list[list[str]]], list[list[str]]] = list
) -> tuple[list[RunConfig], DictConfig]:
    """The checked configs of all runs of `pai-bench -m` with these overrides, and hydra.launcher.

    Args:
        choose: selects runs by their overrides, before they are composed. Composing a run takes hundredths of a second.

    Raises:
        ConfigError: a word is wrong.
    """
    composition.register()
    with hydra.initialize_config_dir(str(composition.CONF), version_base="1.3"):
        overrides.check(words, overrides.loader_here())
        parsed = overrides.parsed(words)
        fixed = [o.input_line for o in parsed if o.input_line and not o.is_sweep_override()]
        base = _composed(fixed)
        of_hydra = [o.input_line for o in parsed if o.key_or_group.startswith("hydra") and o.input_line]
        params = [f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()]
        swept = overrides.parsed([*params, *(line for line in words if line not in of_hydra)])
        overrides.check_scale(base.hydra.runtime.choices)
        sweeper, given = base.hydra.sweeper, {override.get_key_element() for override in parsed}
        if not overrides.tries_all(sweeper):
            chosen = base.hydra.runtime.choices["hydra/sweeper"]
            raise ConfigError(f"hydra/sweeper={chosen}: its runs are not known before it has searched; leave it out")
        rules = {key: OmegaConf.select(sweeper, key) or [] for key in ("paired", "exclude", "drop")}
        jobs = sweeps.overrides_of_jobs(swept, **rules, scale=OmegaConf.select(sweeper, "scale"), given=given)
        loader = sweeps.SweepLoader(overrides.loader_here().get_search_path())
        runs = [loader.load_sweep_config(base, job) for job in choose(jobs)]
        return [overrides.complete(run, run.hydra) for run in runs], _launcher(base)


def launcher(words: list[str], folder: Path) -> DictConfig:
    """hydra.launcher of a command line with these overrides, for runs that have their settings in a results folder.

    Raises:
        ConfigError: a word is wrong.
    """
    composition.register()
    with hydra.initialize_config_dir(str(composition.CONF), version_base="1.3"):
        composed = _composed(words)
        OmegaConf.update(composed, "results_dir", str(folder))
        return _launcher(composed)


def _launcher(composed: DictConfig) -> DictConfig:
    """hydra.launcher of a config, without references to other settings."""
    settings = OmegaConf.create(OmegaConf.to_container(composed.hydra.launcher, resolve=True))
    assert isinstance(settings, DictConfig)
    return settings


def instantiated(launcher: DictConfig) -> Any:
    """The launcher that hydra.launcher describes."""
    return hydra.utils.instantiate(launcher)


def as_group(override: str) -> str:
    """An override in the spelling of Hydra. Two likely other spellings are corrected.

    Hydra's examples write +experiment=; here there is no +. The group of the optimizer lies inside another group, so
    Hydra wants a slash in training/optimizer=.
    """
    if override.startswith("+experiment="):
        return override.removeprefix("+")
    key, _, value = override.partition("=")
    if key == "training.optimizer" and not value.startswith("{"):
        return f"training/optimizer={value}"
    return override


def stored(directory: Path, tracker: Call | None = None, trusted: bool = False) -> RunConfig:
    """The checked config of a run, from its directory.

    Args:
        tracker: replaces the tracker of the run.
        trusted: the config may name functions of any package.

    Raises:
        ConfigError: this version lacks a setting of the config, or the config names functions that are not ours.
        DataError: config.yaml is missing or damaged.
    """
    composition.register()
    try:
        with hydra.initialize_config_dir(str(directory.resolve()), version_base="1.3"):
            composed = hydra.compose("config")
            if not trusted:
                composition.check_origin(OmegaConf.to_container(composed), directory / "config.yaml")
            run = checks.complete(composition.resolved(composed))
            return run if tracker is None else replace(run, tracker=tracker)
    except UserError:
        raise
    except Exception as error:  # the file may hold anything; yaml, OmegaConf and Hydra raise their own errors
        said = one_line(error).partition(";")[0]
        raise DataError(f"{directory / 'config.yaml'}: it is damaged ({said})") from error
