"""Gradual magnitude pruning (GMP) with weights that may return."""

from typing import Literal

from torch import Generator

from pai_bench.core import Mask, Weights
from pai_bench.rewiring.drop_and_grow import largest, on_the_way
from pai_bench.rewiring.rewire import RewireProgress


def rule(
    weights: Weights,
    gradients: Weights,
    momentum: Weights,
    mask: Mask,
    progress: RewireProgress,
    generator: Generator,
    *,
    scope: Literal["layer", "global"],
) -> Mask:
    """The largest of all weights are kept, those among them that were pruned earlier. Their number falls by a cubic.

    A pruned weight keeps the value that it had when it was pruned (`rewire.revive: value`). It returns when others have
    become smaller than that. A weight that the start mask prunes has its initial value, or the value to which the
    schedule rewinds.

    Args:
        scope: "layer": every layer has the same density. "global": the largest of the network are kept.

    Reference: Zhu and Gupta 2017, arXiv:1710.01878, section 3; Gale et al. 2019, arXiv:1902.09574.
    Deviates: the momentum of a weight that returns is 0, and weight decay does not change the value of a pruned weight.
        The last rewire keeps exactly the number that is asked for.
    """
    return largest(weights, mask, on_the_way(progress, progress.fraction), scope)
