"""SNIP: connection sensitivity."""

from torch import Generator

from pai_bench.analysis.gradients import mean_gradient, minus_true_logit
from pai_bench.core import Batches, Loss, Scores, Subnetwork


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|w dL/dw|, which is |dL/dm| at the current mask m, for a mask that multiplies the weights.

    Pruned weights score exactly zero, so the masks of several rounds nest.

    Reference: Lee et al. 2019, arXiv:1810.02340, section 4.
    Deviates: scores are not divided by their sum (the order is the same). Biases are not prunable. The scored network
        is the one that is trained; the authors' code trains another draw of the initialization.
    """
    weights, gradients = mean_gradient(net, batches, loss)
    return {name: (weight * gradients[name]).abs() for name, weight in weights.items()}


def score_true_logit(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """SNIP with the loss of the code released with FORCE: minus the mean logit of the true class.

    Reference: de Jorge et al. 2021, arXiv:2006.09081, released code, iterative SNIP.
    Deviates: none from the code; the paper says cross-entropy.
    """
    return score(net, batches, minus_true_logit, generator)
