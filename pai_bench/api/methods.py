"""From the names and settings of a method to its functions, with the defaults of conf/."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pai_bench.config import checks, schema
from pai_bench.config.schema import RunConfig
from pai_bench.config.signatures import shown
from pai_bench.core import (
    Allocate,
    Call,
    Mask,
    Pruner,
    Round,
    Schedule,
    Score,
    Scores,
    Selection,
    Target,
    TrainingLength,
)
from pai_bench.errors import ConfigError
from pai_bench.launch.compose import compose
from pai_bench.launch.embedded import embedded
from pai_bench.masks import masks

# Scores of ours that ask for nothing but weights. All others pass an image through the network.
_OF_WEIGHTS_ALONE = {f"pai_bench.pruners.{name}.score" for name in ("lamp", "magnitude", "random")}
_BEFORE_TRAINING = "one_shot, exponential, exponential_10, linear or constant"
# The recipe plays no part. This one is long, so that every schedule fits into it.
_RECIPE = "cifar"


@dataclass(frozen=True)
class Method:
    """A pruner, and how it comes from scores to a mask."""

    pruner: Pruner
    allocate: Allocate
    repair: bool
    rounds: Sequence[Round]
    prunable: masks.Which
    target: Target
    needs_shape: bool  # whether the score passes an image through the network


def method(
    pruner: str | Score,
    targets: Mapping[str, float | None],
    *,
    schedule: str | Schedule | None,
    allocation: str | Allocate | None,
    prunable: str | Sequence[str],
    target: str,
    repair: str | None,
    settings: Mapping[str, Any],
    seed: int,
    has_data: bool,
) -> Method:
    """The method of these names, functions and settings.

    Args:
        targets: sparsity, density and compression; one of them is a number.
        has_data: whether there are images for a score.

    Raises:
        ConfigError: a name or a setting is wrong; it needs data or training.
    """
    sparsity = _sparsity(targets, seed)
    words = []
    # A function of the user's is scored under the conditions of the simplest method of its kind.
    default = "snip" if has_data else "magnitude"
    words.append(f"pruner={_option('pruner', default if callable(pruner) else pruner)}")
    for group, chosen in (("schedule", schedule), ("allocation", allocation)):
        if chosen is not None and not callable(chosen):
            words.append(f"{group}={_option(group, chosen)}")
    functions = {"pruner.score": pruner, "schedule": schedule, "allocation": allocation}
    words += [f"prunable={_text(prunable)}", f"target={_text(target)}", f"repair={_text(repair)}"]
    words += _setting_words(settings, [path for path, function in functions.items() if callable(function)])
    run = _composed(tuple(words))
    found = run.pruner
    if callable(pruner):
        found = replace(found, score=pruner, name=_name_of(pruner), label=None)
    if found.score is None:
        raise ConfigError(f"pruner={found.name}: it prunes nothing; give another pruner, such as snip")
    if found.scoring_data is not None and not has_data:
        raise ConfigError(
            f"pruner={found.name}: its score looks at images; give data=, a DataLoader or a list of batches (images, "
            "labels)"
        )
    allocate: Any = _checked(allocation) if callable(allocation) else run.allocation
    alone = (isinstance(found.score, Call) and found.score.target in _OF_WEIGHTS_ALONE) or callable(pruner)
    needs_shape = found.reduce is not None or not alone or run.target == "effective"
    return Method(
        found,
        allocate,
        run.repair == "flow",
        _rounds(run, found, schedule, sparsity),
        run.prunable,
        run.target,
        needs_shape,
    )


@lru_cache(maxsize=256)
def _composed(words: tuple[str, ...]) -> RunConfig:
    """The config of a method. Composing takes a fifth of a second, and loops ask for one method again and again."""
    with embedded():
        return compose(["tracker=none", f"training={_RECIPE}", "sparsity=0.5", *words])


def _sparsity(targets: Mapping[str, float | None], seed: int) -> float:
    """The sparsity that is asked for in one of three ways.

    Raises:
        ConfigError: it is missing, or said twice; it or the seed is no number, or lies outside its range.
    """
    given = {key: value for key, value in targets.items() if value is not None}
    for key, value in (*given.items(), ("seed", seed)):
        if said := schema.wanted(key, value):
            raise ConfigError(f"{key}={shown(value)}: give {said}")
    sparsity = checks.target(given)
    if sparsity is None:
        raise ConfigError("sparsity: how much is to be pruned? give sparsity=0.9 (or density=0.1, or compression=10)")
    return sparsity


def _option(group: str, name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ConfigError(f"{group}={name}: give the name of one option of conf/{group}, or a function")
    return name


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _setting_words(settings: Mapping[str, Any], functions: Sequence[str]) -> list[str]:
    """Settings as words of a command line.

    Raises:
        ConfigError: a key is no setting of the method, or one of a function that is given as a function.
    """
    words = []
    for key, value in settings.items():
        if not re.fullmatch(r"(pruner|schedule|allocation)\.[\w.]+", str(key)):
            raise ConfigError(f"settings: {key!r} plays no part here; give those of pruner., schedule. or allocation.")
        if key == "pruner.scoring_data.augment":
            raise ConfigError(f"settings: {key!r} plays no part here, as images are used as data= gives them")
        if of := next((path for path in functions if key.startswith(f"{path}.")), None):
            raise ConfigError(f"settings: {key!r}: {of} is a function of yours; give its settings by functools.partial")
        words.append(f"{key}={_text(value)}")
    return words


def _text(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def _rounds(run: RunConfig, pruner: Pruner, schedule: str | Schedule | None, sparsity: float) -> Sequence[Round]:
    """The rounds, all of them before training.

    Raises:
        ConfigError: the schedule trains.
    """
    length = TrainingLength(run.training.epochs, 1000)
    rounds = (schedule if callable(schedule) else run.schedule)(sparsity, length)
    name = _name_of(schedule) if callable(schedule) else run.schedule.name
    if not rounds:
        raise ConfigError(f"schedule={name}: it has no round, so it prunes nothing; give another, such as one_shot")
    if any(one.until_epoch > 0 or one.rewind_epoch is not None or one.when is not None for one in rounds):
        between = "" if pruner.reduce is not None else ", train between calls and pass the last mask as mask="
        raise ConfigError(
            f"pruner={pruner.name}: schedule={name} trains between its rounds, and prune does not train; give a "
            f"schedule before training ({_BEFORE_TRAINING}){between}, or do the whole run with pai_bench.run"
        )
    return rounds


def _checked(allocation: Allocate) -> Allocate:
    """A function of the user's that is refused if it keeps another number of weights, or other weights."""

    def allocate(scores: Scores, candidates: Mask, keep: int, generator: Any) -> Selection:
        selection = allocation(scores, candidates, keep, generator)
        if not isinstance(selection, Selection):
            raise ConfigError(f"allocation: it returned {type(selection).__name__}; return core.Selection(mask)")
        if masks.kept(selection.mask) != keep:
            raise ConfigError(f"allocation: it keeps {masks.kept(selection.mask)} weights; keep exactly {keep}")
        if any((kept & ~candidates[name]).any() for name, kept in selection.mask.items()):
            raise ConfigError("allocation: it keeps weights that are no candidates; choose among candidates")
        return selection

    return allocate
