"""GraNet: gradual pruning, and after each of its steps a part of the weights is exchanged."""

import math

from torch import Generator

from pai_bench.core import Fraction, Mask, Positive, Weights
from pai_bench.masks import masks
from pai_bench.masks.selection import keep_largest
from pai_bench.rewiring.drop_and_grow import decayed, drop_and_grow, on_the_way, sizes_of
from pai_bench.rewiring.rewire import RewireProgress


def rule(
    weights: Weights,
    gradients: Weights,
    momentum: Weights,
    mask: Mask,
    progress: RewireProgress,
    generator: Generator,
    *,
    prune_until: Positive,
    drop_fraction: Fraction,
    last_drop_fraction: Fraction,
) -> Mask:
    """The smallest weights of the network are pruned, on a cubic; then each layer exchanges a part of those it keeps.

    The smallest are dropped, and as many with the largest gradients grow. After the pruning the exchange goes on.

    Args:
        prune_until: where the pruning ends, as a fraction of the way from the start to the last rewire.
        drop_fraction: of the kept weights of each layer, at the first rewire.
        last_drop_fraction: at the end. In between it falls as a cosine.

    Reference: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration,
        arXiv:2106.10404, and their released code.
    Deviates: the code misses the sparsity a little: its last step of pruning lies before the end of the cubic, and it
        keeps weights that are strictly larger than the threshold. Here the number is exact.

    Raises:
        ConfigError: rewire.gradients is false.
    """
    growth = sizes_of(gradients, "rewire.gradients=false")
    number = on_the_way(progress, min(progress.fraction / prune_until, 1.0))
    pruned = keep_largest({name: weight.abs() for name, weight in weights.items()}, mask, number).mask
    exchanged = decayed(drop_fraction, last_drop_fraction, "cosine", progress.fraction)
    numbers = {
        name: min(math.ceil(exchanged * kept), kept) for name, kept in zip(pruned, masks.counts(pruned), strict=True)
    }
    return drop_and_grow(weights, growth, pruned, numbers)
