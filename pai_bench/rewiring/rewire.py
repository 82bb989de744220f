"""What a rule that moves a mask is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pai_bench.core import Mask, Weights

if TYPE_CHECKING:
    from torch import Generator


@dataclass(frozen=True)
class RewireProgress:
    """Where in training a rewire takes place, and between which numbers of kept weights it lies."""

    number: int  # of this rewire; 1 is the first
    last: bool
    time: float  # fraction of the training that is done, in [0, 1)
    fraction: float  # of the way from the first step at which the mask may move to the last, in [0, 1]
    kept_at_start: dict[str, int]  # of each layer, in the mask that training starts from
    keep: int  # of the whole network, in the mask that training ends with


class Rewire(Protocol):
    """How a mask moves while a network trains."""

    def __call__(
        self,
        weights: Weights,
        gradients: Weights,
        momentum: Weights,
        mask: Mask,
        progress: RewireProgress,
        generator: Generator,
    ) -> Mask:
        """The next mask. No argument is changed.

        Args:
            weights: zero where pruned; with `rewire.revive=value` the values with which they were pruned.
            gradients: of the loss of one batch at the masked weights, for every entry. Empty if nobody asked for them.
            momentum: the running mean of these gradients. Empty if nobody asked for it.
            generator: of this rewire, on the CPU.
        """
