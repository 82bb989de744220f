"""Which rule moves the mask while a network trains, and at which steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pai_bench.core import Count, Fraction, Positive, ProperFraction, TrainingLength
from pai_bench.errors import ConfigError

if TYPE_CHECKING:
    from pai_bench.rewiring.rewire import Rewire


@dataclass(frozen=True)
class Rewiring:
    """A rule, and the steps of the last training at which it moves the mask."""

    rule: Rewire | None  # None: the mask stays as it is, and all settings below do nothing
    # One of the three says when. Fractions are of the whole recipe; the first rewire is at begin.
    every_steps: Count | None = None
    every_epochs: Positive | None = None
    at: list[ProperFraction] | None = None
    begin: ProperFraction = 0.0
    end: Fraction = 1.0
    # None: training starts from a mask of the sparsity that is asked for. Otherwise from one of this sparsity (0: the
    # dense network), and the rule reaches what is asked for.
    start_sparsity: ProperFraction | None = None
    gradients: bool = False  # the rule looks at the gradients of all weights
    momentum: ProperFraction | None = None  # it looks at their running mean: the weight of the earlier mean
    skip_step: bool = False  # a rewire takes the place of the optimizer's step; otherwise it comes after it
    revive: Literal["zero", "value"] = "zero"  # what a weight returns with: 0, or its value when it was pruned
    name: str = ""


def rewire_steps(rewire: Rewiring, length: TrainingLength) -> list[int]:
    """The steps at which the mask moves, as times on the recipe's clock, in rising order.

    Raises:
        ConfigError: there are none.
    """
    total = length.epochs * length.steps_per_epoch
    if rewire.at is not None:
        return sorted({round(time * total) for time in rewire.at} - {total})
    begin, end = round(rewire.begin * total), round(rewire.end * total)
    every = rewire.every_steps or max(round((rewire.every_epochs or 0) * length.steps_per_epoch), 1)
    steps = list(range(begin, min(end, total - 1) + 1, every))
    if not steps:
        raise ConfigError(
            f"rewire={rewire.name}: no step of {total} lies between rewire.begin={rewire.begin:g} and "
            f"rewire.end={rewire.end:g}; give others"
        )
    return steps
