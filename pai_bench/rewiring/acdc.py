"""AC/DC: the network is compressed and decompressed in turn."""

from typing import Literal

from torch import Generator

from pai_bench.core import Mask, Weights
from pai_bench.rewiring.drop_and_grow import largest
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
    """In turn the largest weights alone are kept, and all of them. The last rewire keeps the largest.

    A pruned weight returns as 0.

    Args:
        scope: "global": the largest of the network are kept. "layer": every layer has the same density.

    Reference: Peste et al. 2021, AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks,
        arXiv:2106.12379, Algorithm 1, and their released code, whose scripts set all momentum to zero when the weights
        return (`rewire.forget=all`).
    """
    if progress.number % 2 == 0 and not progress.last:
        return {name: kept | ~kept for name, kept in mask.items()}
    return largest(weights, mask, progress.keep, scope)
