"""Magnitude pruning."""

from torch import Generator

from pai_bench.core import Batches, Loss, Scores, Subnetwork


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|w|. At initialization it ranks little more than the scale of each layer's initialization.

    Reference: Han et al. 2015, arXiv:1506.02626; at initialization as in Tanaka et al. 2020, arXiv:2006.05467.
    Deviates: none.
    """
    return {name: weight.abs() for name, weight in net.weights.items()}
