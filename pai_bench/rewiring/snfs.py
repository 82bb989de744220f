"""Sparse networks from scratch (SNFS): the smallest weights go, those with the largest mean gradients come."""

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
    """In each layer the smallest weights are dropped, and as many with the largest mean gradients grow.

    Args:
        drop_fraction: of the kept weights of each layer, at the first rewire.
        last_drop_fraction: at the end.
        decay: of the fraction in between.

    Reference: Dettmers and Zettlemoyer 2019, arXiv:1907.04840; as in the comparison of Evci et al. 2020,
        arXiv:1911.11134, and their released code.
    Deviates: Dettmers and Zettlemoyer also move weights from layer to layer, by the mean momentum of the layers. Here,
        as in the code of Evci et al., the number of each layer stays. That code adds noise of size 1e-5 to the
        absolute values that decide who is dropped; here there is none.

    Raises:
        ConfigError: rewire.momentum is null.
    """
    fraction = decayed(drop_fraction, last_drop_fraction, decay, progress.fraction)
    growth = sizes_of(momentum, "rewire.momentum=null")
    return drop_and_grow(weights, growth, mask, dropped(mask, fraction))
