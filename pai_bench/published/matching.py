"""Finds the runs to compare with each published number: their config equals the recipe, except for the seed."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from pai_bench.config import identity
from pai_bench.config.schema import RunConfig, plain
from pai_bench.errors import ConfigError, DataError
from pai_bench.launch import compose
from pai_bench.published.numbers import NETWORK, Number
from pai_bench.published.verdicts import REPRODUCED, Rule, Sample, Verdict, judge, judge_exactly, sample

NOT_COMPARABLE = "NOT COMPARABLE"
MISSING = "MISSING"
NO_EXPERIMENT = "NO EXPERIMENT"

Config = dict[str, Any]
Row = dict[str, Any]
Differences = dict[str, tuple[Any, Any]]  # setting -> (value here, value in the recipe)

_NUMBER = (int, float)
# What is read of each row, and its type.
COLUMNS: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    dict.fromkeys(("group", "dataset_checksum", *NETWORK), str)
    | dict.fromkeys(("seed", "num_classes", "num_prunable"), int)
    | dict.fromkeys(("target_sparsity", "search_train_examples", "macs_masked", "macs_dense"), _NUMBER)
    | {"collapsed_layers": list}
)

_SAME_DENSITY = 0.002  # relative tolerance: papers and recipes round, and 1.778 stands for 10^0.25
_AFTER_THE_MASK = ("training", "on_collapse")  # these have no effect on a mask that is found before training
_GRID_STEP = 0.2501  # log10 of compression: the largest distance of the two points between which a layer empties
_CHANCE = 3.0  # the density of a layer may also be off by this many standard deviations of a binomial count
_AT_CHANCE = 0.001  # a published accuracy is that of guessing, if it differs by no more
_MAX_DIFFERENCES = 4  # how many different settings a reason names


@dataclass(frozen=True)
class Comparison:
    """A published number and the outcome of its comparison."""

    number: Number
    name: str  # one of the three names in verdicts.py, or of the three names above
    ours: Sample | None = None  # None: there are no runs, or they say only between which values it lies
    verdict: Verdict | None = None
    reason: str = ""
    groups: tuple[str, ...] = ()  # the names of the runs, without their seeds


@dataclass
class Group:
    """Finished runs that differ only in the seed."""

    root: Path  # the folder of their directories
    rows: list[Row] = field(default_factory=list)
    _layers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def config(self) -> Config:
        """The config of the first run.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self.root / str(self.rows[0]["id"]) / "config.yaml"
        settings = _read(path)
        if not isinstance(settings, dict):
            raise DataError(f"{path}: it holds no config; remove this run, or run it again")
        return settings

    def layers(self, row: Row) -> list[dict[str, Any]]:
        """The layers in the mask.json of one of the runs.

        Raises:
            DataError: it is missing or damaged.
        """
        run_id = str(row["id"])
        if run_id not in self._layers:
            path = self.root / run_id / "mask.json"
            found = _read(path)
            if not isinstance(found, dict) or not isinstance(found.get("layers"), list):
                raise DataError(f"{path}: it says nothing of layers; remove this run, or run it again")
            self._layers[run_id] = found["layers"]
        return self._layers[run_id]

    @property
    def density(self) -> float:
        """The target density of the runs."""
        return 1.0 - float(self.rows[0]["target_sparsity"])


class Recipes:
    """The configs of published numbers. Each is composed at most once, when it is first needed."""

    def __init__(self) -> None:
        self._composed: dict[tuple[str, ...], RunConfig] = {}

    def of(self, number: Number) -> RunConfig:
        """The config of a number, at any one target and seed. Other configs of the same curve differ only in these.

        Raises:
            ConfigError: the recipe does not compose. Errors of Hydra are possible too.
        """
        return self._at(overrides(number), number)

    def with_any_values(self, number: Number) -> RunConfig:
        """The config of a number, but for its target, its seed and the settings in `values(number)`.

        Numbers of one recipe share it. If the recipe is an experiment, these settings choose among its runs, and the
        config is that of `of`.

        Raises:
            ConfigError: like `of`.
        """
        free = set() if _names_experiment(number) else {*values(number), "density"}
        return self._at(tuple(word for word in overrides(number) if word.partition("=")[0] not in free), number)

    def _at(self, key: tuple[str, ...], number: Number) -> RunConfig:
        if key not in self._composed:
            words = list(overrides(number))
            try:
                # Only an experiment has several runs to choose from.
                self._composed[key] = (
                    compose.expand(words, lambda jobs: jobs[:1])[0][0]
                    if _names_experiment(number)
                    else compose.compose(words)
                )
            except Exception as error:
                error.add_note(f"in the recipe of {number.table.paper}, {number.table.name}: {' '.join(words)}")
                raise
        return self._composed[key]


def _names_experiment(number: Number) -> bool:
    return any(word.startswith("experiment=") for word in number.table.recipe or ())


def overrides(number: Number) -> tuple[str, ...]:
    """The overrides for one seed of the curve on which a number lies."""
    words = [*(number.table.recipe or ()), *(f"{key}={value}" for key, value in settings(number).items()), "seed=0"]
    if number.density is not None and not _names_experiment(number):
        words.append(f"density={number.density!r}")
    return tuple(words)


def settings(number: Number) -> dict[str, str]:
    """The settings of a number on the command line. At density 1, every pruner becomes `dense`."""
    return {**number.settings, "pruner": "dense"} if number.density == 1 else dict(number.settings)


def values(number: Number) -> dict[str, Any]:
    """The settings of a number that are no options of groups, such as schedule.levels, as a config has them.

    A dense number has none: a dense network is the same run whatever the settings of the search.
    """
    if number.density == 1:
        return {}
    return {key: _parsed(word) for key, word in number.settings.items() if "." in key}


def compare(numbers: Sequence[Number], rows: Sequence[Row], root: Path, rule: Rule) -> list[Comparison]:
    """The comparison of each number, in order. A recipe is composed only if there are runs that may match it.

    Args:
        rows: the rows of finished runs, with COLUMNS.
        root: the folder of their directories.

    Raises:
        ConfigError: like `Recipes.of`.
        DataError: a file of a run is damaged.
    """
    of_images: dict[tuple[str, str], Group] = {}
    for row in rows:
        of_images.setdefault((row["group"], row["dataset_checksum"]), Group(root)).rows.append(row)
    # A group on images of two kinds is two groups, which differ in a part of their names.
    num_kinds = Counter(name for name, _ in of_images)
    groups = {name if num_kinds[name] == 1 else f"{name}@{kind}": one for (name, kind), one in of_images.items()}
    of_network: dict[tuple[str, ...], dict[str, Group]] = defaultdict(dict)
    for name, group in groups.items():
        of_network[tuple(str(group.rows[0][key]) for key in NETWORK)][name] = group
    recipes = Recipes()
    configs: dict[str, Config] = {}

    def config(name: str) -> Config:
        if name not in configs:
            configs[name] = groups[name].config()
        return configs[name]

    def compared(number: Number) -> Comparison:
        if number.table.recipe is None:
            return Comparison(number, NO_EXPERIMENT, reason=number.table.no_recipe or "")
        network = tuple(settings(number)[key] for key in NETWORK)
        near = {
            name: group
            for name, group in of_network[network].items()
            if (number.density is None or _same(group.density, number.density)) and _has(config(name), values(number))
        }
        if not near:
            return Comparison(number, MISSING)
        matching: dict[str, Group] = {}
        reasons: dict[str, str] = {}  # why the other groups do not match
        recipe = recipes.with_any_values(number)
        for name, group in near.items():
            before_training = not number.table.is_accuracy and not group.rows[0]["search_train_examples"]
            ignored = ("sparsity", *(_AFTER_THE_MASK if before_training else ()))  # sparsities were compared above
            try:
                different = identity.differences(config(name), plain(recipe), ignored)
            except ConfigError as error:  # a file that the run has used is gone
                reasons[name] = str(error)
                continue
            except KeyError as error:
                reasons[name] = f"its config.yaml has no {error.args[0]}: another version of this program wrote it"
                continue
            different = {key: both for key, both in different.items() if key not in values(number)}
            if not different:
                matching[name] = group
            elif _same_options(config(name), number) and _breaks_as(group.rows[0], recipe):
                reasons[name] = _in_words(different)  # else it is another experiment
        if len(kinds := sorted({str(group.rows[0]["dataset_checksum"]) for group in matching.values()})) > 1:
            reason = f"the runs have images of different checksums ({', '.join(kinds)}); compare those of one alone"
            return Comparison(number, NOT_COMPARABLE, reason=reason, groups=tuple(matching))
        if matching:
            return _judged(number, matching, rule)
        if not reasons:
            return Comparison(number, MISSING)
        reason = " | ".join(dict.fromkeys(reasons.values()))
        return Comparison(number, NOT_COMPARABLE, reason=reason, groups=tuple(reasons))

    return [compared(number) for number in numbers]


def _breaks_as(row: Mapping[str, Any], recipe: RunConfig) -> bool:
    """Whether a run has no ablation, no rewire and no transfer but those of a recipe."""
    transfer = recipe.transfer.name if recipe.transfer else "none"
    known = {"ablation": recipe.ablation.name, "rewire": recipe.rewire.name, "transfer": transfer}
    return all(row.get(key, "none") in ("none", name) for key, name in known.items())


def _has(config: Config, wanted: Mapping[str, Any]) -> bool:
    """Whether a run has these values. If not, it belongs to another cell of the table, or to none."""

    def value_at(path: str) -> Any:
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return all(identity.same(value_at(path), value) for path, value in wanted.items())


def _same_options(config: Config, number: Number) -> bool:
    """Whether a run that does not match has the options that the number names beside its network."""
    named = [key for key in number.settings if "." not in key and key not in NETWORK]
    return all(config[key].get("name") == number.settings[key] for key in named if isinstance(config.get(key), dict))


def not_reproduced(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons that have an experiment here and did not get REPRODUCED, also if only runs are missing.

    Recalled numbers do not count.
    """
    spared = (REPRODUCED, NO_EXPERIMENT)
    return [c for c in comparisons if c.name not in spared and c.number.table.evidence != "R"]


def _judged(number: Number, groups: dict[str, Group], rule: Rule) -> Comparison:
    # Runs with the same mask and different training give the same value. So a seed counts once.
    once: dict[tuple[Any, ...], tuple[Group, Row]] = {}
    for group in sorted(groups.values(), key=lambda group: -abs(group.density - (number.density or 0.0))):
        for row in group.rows:  # the nearest density comes last and replaces the others
            once[(row["seed"],) if number.density is not None else (row["seed"], group.density)] = group, row
    rows = list(once.values())
    chance, between = 0.0, ""
    match number.table.quantity:
        case "layer_density":
            layers = [_layer(number, group, row) for group, row in rows]
            values = [layer["density"] for layer in layers]
            share = min(number.value + number.rounding, 1.0)
            chance = _CHANCE * math.sqrt(share * (1 - share) / layers[0]["size"])
        case "multiply_adds":
            values = [row["macs_masked"] / row["macs_dense"] for _, row in rows]
        case "critical_compression" | "collapse_threshold" as quantity:
            brackets = _collapses(rows)
            wide = [f"{seed}: {low:g} to {high:g}" for seed, (low, high) in brackets.items() if high - low > _GRID_STEP]
            if wide:
                reason = f"log10 of where a layer empties is known too roughly; seed {', '.join(wide)}"
                return Comparison(number, MISSING, reason=reason, groups=tuple(groups))
            if quantity == "critical_compression":
                values = [low for low, _ in brackets.values()]
            else:
                values = [min(max(number.value, low), high) for low, high in brackets.values()]
                lows, highs = zip(*brackets.values(), strict=True)
                between = f"here it lies between {min(lows):g} and {max(highs):g}"
        case accuracy:
            if any(row.get(accuracy) is None for _, row in rows):
                raise ConfigError(f"{number.table.paper}, {number.table.name}: runs of its recipe have no {accuracy}")
            values = [row[accuracy] for _, row in rows]
    ours = sample(values)
    tolerance = number.table.tolerance
    if tolerance is None:
        verdict = judge(ours, _theirs(number, rows[0][1]), rule, number.rounding)
    else:
        allowed = tolerance.absolute + tolerance.relative * number.value + chance
        verdict = judge_exactly(ours.mean, number.value, allowed, number.rounding)
    return Comparison(
        number, verdict.name, None if between else ours, verdict, between or verdict.reason, tuple(groups)
    )


def _theirs(number: Number, row: Row) -> Sample:
    """The published mean. A deviation of zero is that of runs at chance; elsewhere it is none that one can build on."""
    at_chance = abs(number.value - 1 / row["num_classes"]) <= max(number.rounding, _AT_CHANCE)
    return Sample(number.value, number.sd if number.sd or at_chance else None, number.num_runs)


def _layer(number: Number, group: Group, row: Row) -> dict[str, Any]:
    layers, position = group.layers(row), number.layer or 0
    if position > len(layers):
        raise DataError(f"{row['id']}: it has {len(layers)} layers; {number.table.paper} tells of layer {position}")
    return layers[position - 1]


def _collapses(rows: list[tuple[Group, Row]]) -> dict[int, tuple[float, float]]:
    """For each seed: the last log10 compression without an empty layer, and the first one with an empty layer."""
    curves: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    ends: dict[int, float] = {}
    for group, row in rows:
        curves[row["seed"]].append((round(-math.log10(group.density), 9), bool(row["collapsed_layers"])))
        ends[row["seed"]] = math.log10(
            row["num_prunable"] / len(group.layers(row))
        )  # above this compression there are fewer weights than layers
    found = {}
    for seed, curve in sorted(curves.items()):
        high = min((compression for compression, empty in curve if empty), default=math.inf)
        low = max((compression for compression, empty in curve if not empty and compression < high), default=0.0)
        found[seed] = low, min(high, max(ends[seed], low))
    return found


def _same(density: float, other: float) -> bool:
    return math.isclose(density, other, rel_tol=_SAME_DENSITY)


def _in_words(different: Differences) -> str:
    if different.get("dataset.verify", (True, True))[0] is False:
        others = {key: both for key, both in different.items() if key != "dataset.verify"}
        copy = "dataset.verify=false: the images are not the published files, but a copy of them"
        return "; ".join([copy, *([_in_words(others)] if others else [])])
    words = [f"{key}={_plain(here)}, published {_plain(there)}" for key, (here, there) in different.items()]
    more = len(words) - _MAX_DIFFERENCES
    settings = "setting" if more == 1 else "settings"
    return "; ".join([*words[:_MAX_DIFFERENCES], *([f"and {more} more {settings}"] if more > 0 else [])])


def _parsed(word: str) -> Any:
    """A value of the command line, as a config has it."""
    try:
        return float(word)  # YAML takes 1e-3 for a text
    except ValueError:
        return yaml.safe_load(word)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    return "unset" if value is None else str(value)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        found = (
            json.loads(text)
            if path.suffix == ".json"
            else yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        )
    except OSError as error:
        raise DataError(f"{path}: it cannot be read ({error.strerror}); remove this run, or run it again") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: it is damaged ({reason}); remove this run, or run it again") from error
    return found
