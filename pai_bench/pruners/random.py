"""Random pruning."""

import torch
from torch import Generator

from pai_bench.core import Batches, Loss, Scores, Subnetwork


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """Independent uniform noise; the weights, images and labels play no part.

    Drawn on the CPU in float64, so that every device gives the same mask and no two scores tie in practice.

    Reference: the random baseline of Tanaka et al. 2020, arXiv:2006.05467 (there N(0, 1); only the order matters).
    Deviates: none.
    """
    return {
        name: torch.rand(weight.shape, dtype=torch.float64, generator=generator).to(weight.device)
        for name, weight in net.weights.items()
    }
