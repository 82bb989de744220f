"""The runs of a sweep: the product of its settings, with paired settings, exclusions and a scale."""

import copy
import itertools
import json
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pai_bench.errors import ConfigError
from pai_bench.launch import overrides as words

Job = dict[str, str]  # setting -> value, as on the command line
Columns = Mapping[str, Sequence[Any]]  # setting -> its values; all settings have the same number of values
Rows = Sequence[Mapping[str, Any]]  # each row gives values to settings; rows may name different settings


def jobs(
    swept: Mapping[str, Sequence[str]],
    paired: Sequence[Columns | Rows] = (),
    exclude: Sequence[Mapping[str, Any]] = (),
    drop: Sequence[Mapping[str, Any]] = (),
) -> list[Job]:
    """The runs of a sweep, in the order of their settings. Equal runs appear once.

    Args:
        swept: the values of each setting. All combinations are made.
        paired: settings that change together. Either columns: the first values belong together, then the second
            values, and so on. Or rows: each row is one pair. If a paired setting is swept too, only pairs with a swept
            value stay.
        exclude: combinations to leave out. Each gives a value, or a list of values, for some settings.
        drop: rules with `where` and `settings`. Runs that match `where` lose these settings: they have no effect there.

    Raises:
        ConfigError: paired settings have different numbers of values; no pair has a swept value; a rule names a setting
            that is not in the sweep; or a rule of `drop` is incomplete.
    """
    axes = []
    taken = set()
    for group in paired:
        rows = _rows(group)
        keys = list(dict.fromkeys(key for row in rows for key in row))
        given = [key for key in keys if key in swept]
        for key in given:
            _check_paired(key, swept[key], [row[key] for row in rows if key in row])
        chosen = [row for row in rows if all(key in row and _among(row[key], swept[key]) for key in given)]
        if not chosen:
            said = ", ".join(f"{key}={','.join(swept[key])}" for key in given)
            raise ConfigError(f"{said}: none of the pairs of hydra.sweeper.paired has all of it; see {keys} there")
        axes.append(chosen)
        taken |= set(keys)
    axes += [[{key: value} for value in values] for key, values in swept.items() if key not in taken]
    found = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]
    known = taken | set(swept)
    for rule in exclude:
        _check_known("exclude", rule, known)
        found = [job for job in found if not _matches(job, rule)]
    for rule in drop:
        if set(rule) != {"where", "settings"}:
            raise ConfigError(f"hydra.sweeper.drop: {dict(rule)}: give `where` and `settings`, and nothing else")
        _check_known("drop", rule["where"], known)
        dropped = set(_values(rule["settings"]))
        _check_known("drop", dropped, known)
        found = [
            {key: value for key, value in job.items() if key not in dropped} if _matches(job, rule["where"]) else job
            for job in found
        ]
    return _unique(found)


def _check_paired(key: str, given: Sequence[str], paired: Sequence[str]) -> None:
    absent = [value for value in given if not _among(value, paired)]
    if absent:
        raise ConfigError(
            f"{key}={','.join(absent)}: none of the pairs of hydra.sweeper.paired has it; "
            f"there are {', '.join(dict.fromkeys(paired))}"
        )


def _check_known(name: str, keys: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(key for key in keys if key not in known)
    if unknown:
        raise ConfigError(f"hydra.sweeper.{name}: {unknown[0]} is not in the sweep; add it there or drop the rule")


def _matches(job: Job, rule: Mapping[str, Any]) -> bool:
    return all(key in job and _among(job[key], _values(value)) for key, value in rule.items())


def _unique(found: Sequence[Job]) -> list[Job]:
    first: dict[frozenset[tuple[str, str]], Job] = {}
    for job in found:
        first.setdefault(frozenset((key, _meaning(value)) for key, value in job.items()), job)
    return list(first.values())


def _rows(group: Columns | Rows) -> list[Job]:
    """The pairs as rows, with values as on the command line."""
    if not isinstance(group, Mapping):
        return [{key: _text(value) for key, value in row.items()} for row in group]
    lengths = {key: len(values) for key, values in group.items()}
    if len(set(lengths.values())) > 1:
        numbers = ", ".join(f"{key} has {number}" for key, number in lengths.items())
        raise ConfigError(f"hydra.sweeper.paired: as many values for each setting are needed; {numbers}")
    return [dict(zip(group, map(_text, row), strict=True)) for row in zip(*group.values(), strict=True)]


@dataclass(frozen=True)
class Scale:
    """How the runs of an experiment are made smaller. The values are in conf/scale/. Words of the command line stay.

    Args:
        replace: group -> the option that every run gets. The experiment's own settings in this group are removed. A
            setting outside all groups gets a value likewise.
        keep: group -> options that are small enough and stay.
        at_most: setting -> its greatest value, if the experiment names the setting.
        points: setting -> new values, if the experiment names the setting. They replace the old values in order: of two
            new values, the first replaces the first half of the old ones, the second replaces the second half.
    """

    replace: Mapping[str, str] = field(default_factory=dict)
    keep: Mapping[str, Sequence[str]] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    points: Mapping[str, Sequence[float]] = field(default_factory=dict)


def scaled(found: Sequence[Job], scale: Scale, given: Collection[str]) -> list[Job]:
    """The runs of an experiment at a scale. Runs that have become equal appear once.

    Args:
        given: the settings that the command line names. They stay as they are.
    """
    values = {key: list(dict.fromkeys(job[key] for job in found if key in job)) for key in scale.points}
    small: list[Job] = []
    for job in found:
        groups = {
            group: option
            for group, option in scale.replace.items()
            if group not in given and job.get(group) not in scale.keep.get(group, ())
        }
        job = groups | {key: value for key, value in job.items() if key in given or key.partition(".")[0] not in groups}
        for key in set(job) - set(given):
            if key in scale.at_most and isinstance(value := yaml.safe_load(job[key]), (int, float)):
                job[key] = _text(min(value, scale.at_most[key]))
            if key in scale.points:
                points = scale.points[key]
                job[key] = _text(points[values[key].index(job[key]) * len(points) // len(values[key])])
        small.append(job)
    return _unique(small)


def overrides_of_jobs(
    overrides: Sequence[Override],
    paired: Sequence[Columns | Rows] = (),
    exclude: Sequence[Mapping[str, Any]] = (),
    drop: Sequence[Mapping[str, Any]] = (),
    scale: Mapping[str, Any] | None = None,
    given: Collection[str] = (),
) -> list[list[str]]:
    """The overrides of every run of a sweep, from the overrides of its command line. Applies `jobs` and `scaled`.

    Args:
        given: the settings that the command line names itself.

    Raises:
        ConfigError: like `jobs`; also for a sweep over an interval, or if no run is left.
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
    grid = {"paired": list(paired), "exclude": list(exclude), "drop": list(drop)}
    found = jobs(swept, **_plain(grid))
    if not found:
        raise ConfigError("hydra.sweeper.exclude: it leaves no run; take a rule out")
    if scale:
        unknown = sorted(set(scale) - {f.name for f in fields(Scale)})
        if unknown:
            raise ConfigError(f"hydra.sweeper.scale.{unknown[0]}: there is no such rule; see conf/scale/smoke.yaml")
        found = scaled(found, Scale(**_plain(scale)), given)
    return [[f"{key}={value}" for key, value in job.items()] for job in found]


def _plain(settings: Any, resolve: bool = True) -> dict[str, Any]:
    """Settings from Hydra as plain dictionaries and lists of Python."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(settings), resolve=resolve))


class SweepLoader(ConfigLoaderImpl):
    """Hydra's loader, with a cache for sweeps: runs that differ only in values are composed once and then copied.

    Hydra needs 0.1 s to compose a config; a copy needs 0.002 s.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._composed: dict[tuple[str, ...], Callable[[], DictConfig]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_composed": {}}  # every run sends this object to another process: keep it small

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of one run of the sweep that `master_config` describes."""
        # Hydra's own overrides hold for every run. They can change the folders of configs.
        of_hydra: Any = OmegaConf.to_container(master_config.hydra.overrides.hydra, resolve=False)
        with words.explained([*of_hydra, *sweep_overrides], self, master_config.hydra.job.config_name):
            return self._load(master_config, of_hydra, sweep_overrides)

    def _load(self, master_config: DictConfig, of_hydra: list[str], sweep_overrides: list[str]) -> DictConfig:
        overrides = words.parsed(sweep_overrides)
        if any(o.type is not OverrideType.CHANGE or o.is_sweep_override() for o in overrides):
            return super().load_sweep_config(master_config, sweep_overrides)
        values: list[Override] = []
        options: list[Override] = []
        for override in overrides:
            (values if self._is_value(override, master_config) else options).append(override)
        chosen = tuple(override.input_line or "" for override in options)
        if chosen not in self._composed:
            words.check([*of_hydra, *chosen], self)
            self._composed[chosen] = _copies(super().load_sweep_config(master_config, list(chosen)))
        composed = self._composed[chosen]()
        try:
            for override in values:
                is_null = OmegaConf.select(composed, override.key_or_group) is None  # null cannot be merged
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=not is_null)
        except OmegaConfBaseException:
            return super().load_sweep_config(master_config, sweep_overrides)  # its error says what is wrong
        composed.hydra.overrides.task = list(sweep_overrides)
        return composed

    def _is_value(self, override: Override, master_config: DictConfig) -> bool:
        """Whether an override only changes a value of a composed config, and chooses no option of a group."""
        key = override.key_or_group
        is_group = key in master_config.hydra.runtime.choices or self.repository.group_exists(key)
        return override.package is None and not is_group and not override.is_hydra_override()


def _copies(config: DictConfig) -> Callable[[], DictConfig]:
    """A function that copies a config."""
    try:  # a fifth of the time of deepcopy
        packed = pickle.dumps(config)
    except pickle.PicklingError:  # Hydra imports its plugins twice, and pickle knows one of their types only
        return lambda: copy.deepcopy(config)
    return lambda: cast(DictConfig, pickle.loads(packed))


def _text(value: Any) -> str:
    """A value from yaml, as one writes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _values(value: Any) -> list[str]:
    return [_text(item) for item in (value if isinstance(value, list) else [value])]


def _among(value: str, others: Sequence[str]) -> bool:
    """Whether a value is one of several. 0.90 and 0.9 count as equal."""
    return _meaning(value) in map(_meaning, others)


@lru_cache(maxsize=10_000)
def _meaning(text: str) -> str:
    """A value of the command line in a normal form. 1 and 1.0 give the same form; true gives another one."""
    try:  # by Hydra's rules for files, in which 1e-3 is a number
        value = _plain(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"] if text else text
    except (yaml.YAMLError, OmegaConfBaseException):
        value = text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)
