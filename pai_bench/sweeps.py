"""Which runs a sweep consists of: the product of its settings, with settings that go in pairs and exclusions."""

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pai_bench.errors import ConfigError

Job = dict[str, str]  # setting -> value, as on the command line


def jobs(
    swept: Mapping[str, Sequence[str]],
    paired: Sequence[Mapping[str, Sequence[Any]]] = (),
    exclude: Sequence[Mapping[str, Any]] = (),
) -> list[Job]:
    """The runs of a sweep, in the order of their settings.

    Args:
        swept: the values of each setting, which are combined each with each.
        paired: settings whose first values go together, their second values, and so on; one that is swept as well
            keeps only those of its pairs.
        exclude: combinations to leave out: a value, or a list of values, for each of some settings.

    Raises:
        ConfigError: paired settings have different numbers of values, or exclusions or pairs name what is not swept.
    """
    axes = []
    taken = {key for group in paired for key in group}
    for group in paired:
        lengths = {key: len(values) for key, values in group.items()}
        if len(set(lengths.values())) > 1:
            numbers = ", ".join(f"{key} has {number}" for key, number in lengths.items())
            raise ConfigError(f"hydra.sweeper.paired: as many values for each setting are needed; {numbers}")
        rows = [dict(zip(group, map(_text, row), strict=True)) for row in zip(*group.values(), strict=True)]
        chosen = [row for row in rows if all(_among(row[key], swept[key]) for key in row if key in swept)]
        if not chosen:
            given = ", ".join(f"{key}={','.join(swept[key])}" for key in group if key in swept)
            raise ConfigError(f"{given}: none of the pairs of hydra.sweeper.paired has it; see {list(group)} there")
        axes.append(chosen)
    axes += [[{key: value} for value in values] for key, values in swept.items() if key not in taken]
    found = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]
    for rule in exclude:
        unknown = [key for key in rule if found and key not in found[0]]
        if unknown:
            raise ConfigError(f"hydra.sweeper.exclude: {unknown[0]} is not in the sweep; add it there or drop the rule")
        found = [job for job in found if not all(_among(job[key], _values(value)) for key, value in rule.items())]
    return found


def overrides_of_jobs(
    overrides: Sequence[Override],
    paired: Sequence[Mapping[str, Sequence[Any]]] = (),
    exclude: Sequence[Mapping[str, Any]] = (),
) -> list[list[str]]:
    """The overrides of every run of a sweep, from those of its command line: `jobs` in Hydra's words.

    Raises:
        ConfigError: as `jobs`, a sweep over an interval, or nothing is left.
    """
    swept: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            swept[key] = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            swept[key] = list(override.sweep_string_iterator())
        else:
            raise ConfigError(f"{override.input_line}: a sweep needs values; use choice() or range()")
    # Hydra's lists are no lists of Python's.
    rules = OmegaConf.to_container(OmegaConf.create({"paired": list(paired), "exclude": list(exclude)}), resolve=True)
    found = [[f"{key}={value}" for key, value in job.items()] for job in jobs(swept, **cast(dict[str, Any], rules))]
    if not found:
        raise ConfigError("hydra.sweeper.exclude: it leaves no run; take a rule out")
    return found


class SweepLoader(ConfigLoaderImpl):
    """Hydra's own way to configs, which composes runs of a sweep that differ in nothing but values only once.

    Composing takes Hydra a tenth of a second, a copy a tenth of that.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_composed": {}}  # it goes to another process with every run

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of one run of the sweep that `master_config` describes."""
        overrides = OverridesParser.create().parse_overrides(sweep_overrides)
        if any(o.type is not OverrideType.CHANGE or o.is_sweep_override() for o in overrides):
            return super().load_sweep_config(master_config, sweep_overrides)
        values: list[Override] = []
        options: list[Override] = []
        for override in overrides:
            (values if self._is_value(override, master_config) else options).append(override)
        chosen = tuple(override.input_line or "" for override in options)
        if chosen not in self._composed:
            self._composed[chosen] = super().load_sweep_config(master_config, list(chosen))
        composed = copy.deepcopy(self._composed[chosen])
        try:
            for override in values:
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return super().load_sweep_config(master_config, sweep_overrides)  # which says what is wrong
        composed.hydra.overrides.task = list(sweep_overrides)
        return composed

    def _is_value(self, override: Override, master_config: DictConfig) -> bool:
        """Whether Hydra applies an override to what has been composed, rather than composing something else."""
        key = override.key_or_group
        is_group = key in master_config.hydra.runtime.choices or self.repository.group_exists(key)
        return override.package is None and not is_group and not override.is_hydra_override()


def _text(value: Any) -> str:
    """A value from yaml as it would stand on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _values(value: Any) -> list[str]:
    return [_text(item) for item in (value if isinstance(value, list) else [value])]


def _among(value: str, others: Sequence[str]) -> bool:
    """Whether a value is one of several, 0.90 and 0.9 being the same."""
    return yaml.safe_load(value) in [yaml.safe_load(other) for other in others]
