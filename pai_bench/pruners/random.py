"""Random pruning."""

import torch
from torch import Generator

from pai_bench.core import Batches, Loss, Scores, Subnetwork


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """Independent uniform noise. Weights, images and labels play no part.

    It is drawn on the CPU in float64, so every device gives the same mask, and ties hardly ever occur.

    Reference: the random baseline of Tanaka et al. 2020, arXiv:2006.05467 (there it is N(0, 1); only the order counts).
    Deviates: none.
    """
    return {
        name: torch.rand(weight.shape, dtype=torch.float64, generator=generator).to(weight.device)
        for name, weight in net.weights.items()
    }
