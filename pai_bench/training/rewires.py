"""Which rule moves the mask while a network trains, and at which steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pai_bench.core import Count, Fraction, Positive, ProperFraction, TrainingLength
from pai_bench.errors import ConfigError

if TYPE_CHECKING:
    from pai_bench.rewiring.rewire import Rewire


_FEWEST = 3  # rewires on the way from one sparsity to another


@dataclass(frozen=True)
class Rewiring:
    """A rule, and the steps of the last training at which it moves the mask."""

    rule: Rewire | None  # None: the mask stays as it is, and all settings below do nothing
    # One of the three says when. Fractions are of the whole recipe.
    every_steps: Count | None = None
    every_epochs: Positive | None = None
    at: list[ProperFraction] | None = None
    begin: ProperFraction | None = 0.0  # of the first rewire. None: it comes one interval after the start
    end: Fraction = 1.0
    # None: training starts from a mask of the sparsity that is asked for. Otherwise from one of this sparsity (0: the
    # dense network), and the rule reaches what is asked for.
    start_sparsity: ProperFraction | None = None
    reaches_target: bool = False  # the rule ends at the sparsity that is asked for, whatever it starts from
    gradients: bool = False  # the rule looks at the gradients of all weights
    momentum: ProperFraction | None = None  # it looks at their running mean: the weight of the earlier mean
    skip_step: bool = False  # a rewire takes the place of the optimizer's step; otherwise it comes after it
    revive: Literal["zero", "value"] = "zero"  # what a weight returns with: 0, or its value when it was pruned
    # A weight that returns has no state in the optimizer. "all": when one returns, no weight keeps its state.
    forget: Literal["all"] | None = None
    name: str = ""


def rewire_steps(rewire: Rewiring, length: TrainingLength) -> list[int]:
    """The steps at which the mask moves, as times on the recipe's clock, in rising order.

    Steps count from 0. With `every_steps=5` and `begin=0` they are 0, 5, 10 and so on. Without `begin` the mask moves
    when 5, 10, 15 steps are done, so at the steps 4, 9, 14, and with `at` when these fractions of the steps are. A
    rewire that takes the place of a step takes that of the next one.

    Raises:
        ConfigError: there are none, or too few for a way from one sparsity to another; or two times of `at` are one
            step.
    """
    total = length.epochs * length.steps_per_epoch
    early = steps_early(rewire)
    if rewire.at is not None:
        return _steps_at(rewire, rewire.at, total, early)
    end = min(round(rewire.end * total), total - 1)
    every = rewire.every_steps or max(round((rewire.every_epochs or 0) * length.steps_per_epoch), 1)
    if rewire.begin is None:
        steps = [time - early for time in range(every, end + 1, every)]
        remedy = f"its first rewire comes after {every} of {total} steps; give a shorter interval, or rewire.begin=0"
    else:
        steps = list(range(round(rewire.begin * total), end + 1, every))
        remedy = f"no step of {total} lies between rewire.begin={rewire.begin:g} and rewire.end={rewire.end:g}"
        remedy += "; give a wider interval, or train longer"
    if not steps:
        raise ConfigError(f"rewire={rewire.name}: {remedy}")
    if rewire.start_sparsity is not None and len(steps) < _FEWEST:
        interval = "every_steps" if rewire.every_steps else "every_epochs"
        raise ConfigError(
            f"rewire.{interval}={getattr(rewire, interval):g}: {len(steps)} rewire{'s' * (len(steps) > 1)} in {total} "
            f"steps make no gradual way from rewire.start_sparsity={rewire.start_sparsity:g}; give a shorter interval, "
            "or train longer"
        )
    return steps


def steps_early(rewire: Rewiring) -> int:
    """How many steps before its time a rewire takes place: 1 where it follows the step that ends at that time."""
    return int(not rewire.skip_step and (rewire.begin is None or rewire.at is not None))


def _steps_at(rewire: Rewiring, times: Sequence[float], total: int, early: int) -> list[int]:
    """The steps at fractions of the training. Those that round to its end are none."""
    steps = [max(round(time * total) - early, 0) for time in sorted(times) if round(time * total) < total]
    if not steps or len(set(steps)) < len(steps):
        what = "two times are one step" if steps else "no time lies before the last step"
        given = ",".join(f"{time:g}" for time in times)
        raise ConfigError(f"rewire.at=[{given}]: {what} of a training of {total} steps; train longer, or give others")
    return steps
