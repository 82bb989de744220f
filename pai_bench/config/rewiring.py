"""Rules for a mask that moves while a network trains: what it needs, and what does not go with it."""

from collections.abc import Sequence
from dataclasses import fields

from pai_bench.config.schema import RunConfig
from pai_bench.config.signatures import shown
from pai_bench.config.timing import latest_clock
from pai_bench.config.what_is_pruned import has_structure
from pai_bench.core import Round
from pai_bench.errors import ConfigError


def check_rewire(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses a rewire that cannot be, and settings of one where there is none.

    Raises:
        ConfigError: in one line.
    """
    rewire, pruner = run.rewire, run.pruner
    if not run.rewires:
        for key in fields(rewire):
            value = getattr(rewire, key.name)
            if key.name not in ("rule", "name") and value != key.default:
                raise ConfigError(
                    f"rewire.{key.name}={shown(value)}: rewire={rewire.name} moves no mask; choose a rule such as "
                    "rewire=rigl"
                )
        return
    if pruner.reduce is not None:
        raise ConfigError(f"rewire={rewire.name}: filters do not return; choose a pruner of weights, or rewire=none")
    if has_structure(run):
        raise ConfigError(
            f"allocation={run.allocation.name}: rewire={rewire.name} would move weights out of the structure; give "
            "another allocation, or rewire=none"
        )
    if run.training.epochs == 0:
        raise ConfigError(f"rewire={rewire.name}: training.epochs=0 has no step to move a mask at; give 1 or more")
    if run.training.precision == "float16" and (rewire.gradients or rewire.momentum is not None):
        raise ConfigError(
            f"training.precision=float16: rewire={rewire.name} ranks gradients, which may overflow there; give bfloat16"
        )
    _check_start(run)
    _check_times(run, rounds)


def _check_start(run: RunConfig) -> None:
    """Refuses a mask of the start that is not there, or that nothing asks for."""
    rewire, pruner, start = run.rewire, run.pruner, run.rewire.start_sparsity
    searched = pruner.score is not None
    if run.mask is not None:
        if start is not None:
            raise ConfigError(
                f"rewire.start_sparsity={start:g}: mask={run.mask} has a sparsity of its own; use a rule that "
                "keeps it, such as rewire=rigl"
            )
    elif run.search is not None:
        remedy = (
            "run the search alone, then give its mask with mask=results/RUN/mask.safetensors"
            if start is None
            else "leave search= or rewire= out"
        )
        raise ConfigError(f"search={run.search.name}: rewire={rewire.name} does not start from a search; {remedy}")
    elif start == 0:
        if searched:
            raise ConfigError(
                f"pruner={pruner.name}: rewire={rewire.name} starts from the dense network, where nothing is scored; "
                "use pruner=dense, or give rewire.start_sparsity above 0"
            )
    elif not searched:
        raise ConfigError(
            f"pruner={pruner.name}: rewire={rewire.name} needs a mask to start from; choose another pruner, such as "
            "pruner=random allocation=erk"
        )


def _check_times(run: RunConfig, rounds: Sequence[Round]) -> None:
    """Refuses times that exclude each other, or lie before the mask is there."""
    rewire = run.rewire
    given = {key: getattr(rewire, key) for key in ("every_steps", "every_epochs", "at")}
    if sum(value is not None for value in given.values()) != 1:
        said = ", ".join(f"rewire.{key}={shown(value)}" for key, value in given.items())
        raise ConfigError(f"{said}: give one of the three and null the others")
    if rewire.at is not None:
        if not rewire.at or rewire.at != sorted(set(rewire.at)):
            raise ConfigError(
                f"rewire.at={shown(rewire.at)}: give fractions of the training in rising order, each once"
            )
        if (rewire.begin, rewire.end) != (0, 1):
            raise ConfigError(f"rewire.at={shown(rewire.at)}: it says when; leave rewire.begin=0 and rewire.end=1")
    elif rewire.begin is not None and rewire.begin >= rewire.end:
        raise ConfigError(f"rewire.begin={rewire.begin:g}: give less than rewire.end={rewire.end:g}")
    starts = latest_clock(rounds) if rounds else 0
    if not starts:
        return
    there = starts / run.training.epochs
    if rewire.at is None:
        said = f"begin={'null' if rewire.begin is None else f'{rewire.begin:g}'}"
        early, wanted = (rewire.begin or 0) < there, f"{there:.4g} or more"
    else:  # a rewire follows the step that ends at its time
        said, early, wanted = f"at={shown(rewire.at)}", rewire.at[0] <= there, f"times above {there:.4g}"
    if early:
        raise ConfigError(
            f"rewire.{said}: with schedule={run.schedule.name} the mask is there from epoch {starts:g} of "
            f"training.epochs={run.training.epochs} on; give {wanted}"
        )


def check_reach(run: RunConfig) -> None:
    """Refuses sparsities of start and end that no rule can connect. The target is known.

    Raises:
        ConfigError: in one line.
    """
    if not run.rewires:
        return
    rewire, start = run.rewire, run.rewire.start_sparsity
    if run.sparsity == 0:
        raise ConfigError(f"sparsity=0: rewire={rewire.name} has no mask to move; give a sparsity above 0")
    if start is not None and start > run.sparsity:
        raise ConfigError(
            f"rewire.start_sparsity={start:g}: the sparsity rises to sparsity={run.sparsity:g}; give at most that"
        )
    if start not in (None, run.sparsity) and not rewire.reaches_target:
        raise ConfigError(
            f"rewire.start_sparsity={start:g}: rewire={rewire.name} ends with as many weights as it starts with, and "
            f"would not reach sparsity={run.sparsity:g}; give null, or a rule that does, such as rewire=granet"
        )
