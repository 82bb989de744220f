"""SynFlow-L2: synaptic flow through squared weights, without data."""

from typing import Literal

from torch import Generator

from pai_bench.core import Batches, Loss, Scores, Subnetwork
from pai_bench.pruners.synflow import Flow


def score(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, factor: Literal["square", "size"]
) -> Scores:
    """w^2 dR/d(w^2), where R is the sum of the outputs for an all-ones image, in the network of squared parameters.

    Running variances stay, and running means have their sizes. It is meant for eval mode and many exponential rounds.

    Args:
        factor: what dR/d(w^2) is multiplied by. "square": w^2, so that every layer of a chain has the same total.
            "size": |w|, as in released code; then the totals of layers differ.

    Raises:
        UserError: R overflows the precision of the network.

    Reference: Gebhart et al. 2021, arXiv:2101.10552; factor=size as in the released code of Iurada et al. 2024,
        arXiv:2406.01820.
    Deviates: that code squares running statistics too, which at initialization changes nothing.
    """
    if "synflow_l2" not in net.cache:
        net.cache["synflow_l2"] = Flow(net, "SynFlow-L2", squares=True)
    scores: Scores = net.cache["synflow_l2"].scores(net)
    if factor == "square":
        return scores
    weights = net.weights
    return {name: (values / weights[name].abs()).where(weights[name] != 0, 0.0) for name, values in scores.items()}
