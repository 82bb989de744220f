"""Sparse evolutionary training (SET): the smallest weights go, random others come."""

from torch import Generator

from pai_bench.core import Fraction, Mask, Weights
from pai_bench.rewiring.drop_and_grow import Decay, decayed, drop_and_grow, dropped, random_scores
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
    """In each layer the smallest weights are dropped, and as many random ones grow.

    Args:
        drop_fraction: of the kept weights of each layer, at the first rewire.
        last_drop_fraction: at the end.
        decay: of the fraction in between.

    Reference: Mocanu et al. 2018, arXiv:1707.04780; as in the comparison of Evci et al. 2020, arXiv:1911.11134, and
        their released code. With rare rewires that never stop it is SET-ITOP, Liu et al. 2021, arXiv:2102.02887.
    Deviates: Mocanu et al. drop the smallest positive and the largest negative weights, at the end of every epoch. As
        in the code of Evci et al., the smallest absolute values go; they add noise of size 1e-5 to these, which lets
        pruned weights win against tiny ones. Here there is no noise.
    """
    fraction = decayed(drop_fraction, last_drop_fraction, decay, progress.fraction)
    return drop_and_grow(weights, random_scores(mask, generator), mask, dropped(mask, fraction))
