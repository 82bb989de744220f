"""Names of models that are changed: a ResNet-20 with other widths is no longer called resnet20."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from pai_bench.config.schema import RunConfig


def with_changes(run: RunConfig, of_hydra: Any) -> RunConfig:
    """The run, with the changed settings of its model in the name of the model, as in resnet20-w8.16.32.

    How the weights are drawn is no part of the name, nor is a change in a model that was given a name of its own.

    Args:
        of_hydra: Hydra's part of the config, which knows the option and the folders of configs.
    """
    option = of_hydra.runtime.choices.get("model")
    if option is None:  # the model comes from the config of a run, with its name
        return run
    folders = tuple((one.provider, f"{one.schema}://{one.path}") for one in of_hydra.runtime.config_sources)
    original = _original(folders, option)
    if run.model.name != original["name"]:
        return run
    before, after = dict(_sizes(original)), dict(_sizes(run.model.settings))
    changes = [_short(key, value, after) for key, value in after.items() if before.get(key) != value]
    return replace(run, model=replace(run.model, name="-".join([run.model.name, *changes])))


@cache
def _original(folders: tuple[tuple[str, str], ...], option: str) -> Mapping[str, Any]:
    """The settings of a model as its file has them."""
    search_path = ConfigSearchPathImpl()
    for provider, folder in folders:
        search_path.append(provider, folder)
    composed = ConfigLoaderImpl(search_path).load_configuration(f"model/{option}", [], RunMode.RUN)
    return cast(dict[str, Any], OmegaConf.to_container(composed.model))


def _sizes(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a model by their last names, without its name and without how its weights are drawn."""
    for key, value in settings.items():
        if key == "options":
            yield from value.items()
        elif key not in ("name", "_target_", "init"):
            yield key, value


def _short(key: str, value: Any, among: Mapping[str, Any]) -> str:
    """A setting in few letters: w8.16.32 for widths=[8,16,32], classifier_mlp for a word."""
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
        return f"{key}_{value}".lower()
    lengths = range(1, len(key) + 1)
    shortest = next((n for n in lengths if sum(other.startswith(key[:n]) for other in among) == 1), len(key))
    return key[:shortest] + ".".join(f"{one:g}" for one in numbers)
