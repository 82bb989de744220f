"""RigL: the smallest weights go, and those with the largest gradients come."""

from torch import Generator

from pai_bench.core import Fraction, Mask, Weights
from pai_bench.rewiring.drop_and_grow import Decay, decayed, drop_and_grow, dropped, sizes_of
from pai_bench.rewiring.rewire import RewireProgress


def rule(
    weights: Weights,
    gradients: Weights,
    momentum: Weights,
    mask: Mask,
    progress: RewireProgress,
    generator: Generator,
    *,
    drop_fraction: Fraction,
    last_drop_fraction: Fraction,
    decay: Decay,
) -> Mask:
    """In each layer the smallest weights are dropped, and as many with the largest gradients grow.

    Args:
        drop_fraction: of the kept weights of each layer, at the first rewire.
        last_drop_fraction: at the end.
        decay: of the fraction in between.

    Reference: Evci et al. 2020, arXiv:1911.11134, Algorithm 1, and their released code. With rare rewires that never
        stop it is RigL-ITOP, Liu et al. 2021, arXiv:2102.02887.
    Deviates: the code adds noise of size 1e-5 to the absolute values that decide who is dropped, which lets pruned
        weights win against tiny ones. Here there is no noise. With rewire.begin above 0 its cosine starts at step 0;
        here it starts with the first rewire, and ends at 0 all the same.

    Raises:
        ConfigError: rewire.gradients is false.
    """
    fraction = decayed(drop_fraction, last_drop_fraction, decay, progress.fraction)
    growth = sizes_of(gradients, "rewire.gradients=false")
    return drop_and_grow(weights, growth, mask, dropped(mask, fraction))
