"""LAMP: magnitude that is comparable between layers."""

import torch
from torch import Generator

from pai_bench.core import Batches, Loss, Scores, Subnetwork


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """w^2 over the sum of the squares of all weights of the layer that are at least as large, itself included.

    The largest weight of each layer scores exactly 1, so no layer collapses while there is room for one weight in each.
    Of equal weights the first in the layer scores higher. Pruned weights score zero.

    Reference: Lee et al. 2021, arXiv:2010.07611, eq. 5.
    Deviates: none. Some released code adds 1e-8 to the sum, and then the largest score is not exactly 1.
    """
    scores: Scores = {}
    for name, weight in net.weights.items():
        squares = weight.flatten() ** 2
        ordered, order = squares.sort(descending=True, stable=True)
        ratios = torch.where(ordered > 0, ordered / ordered.cumsum(0), torch.zeros_like(ordered))
        scores[name] = torch.empty_like(squares).scatter_(0, order, ratios).view_as(weight)
    return scores
