"""FORCE: foresight connection sensitivity."""

from torch import Generator

from pai_bench.analysis.gradients import mean_gradient, minus_true_logit
from pai_bench.core import Batches, Loss, Scores, Subnetwork


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|w0 dL/dw|: the initial weights times the gradient at the masked network.

    A pruned weight has a score too, so with `regrow` it can return in a later round. With nothing pruned this is SNIP.

    Reference: de Jorge et al. 2021, arXiv:2006.09081, section 4.
    Deviates: the loss is cross-entropy, as in the paper. The authors' code gives raw logits to the negative
        log-likelihood (pruner=force_official). With the same loss and the same numbers of weights
        (schedule.rounding=down; their last round rounds down too) masks equal those of their loop, bit for bit in
        float64. If fewer weights score above zero than are to be kept, their code keeps all weights. Here the first in
        parameter order stay.
    """
    _, gradients = mean_gradient(net, batches, loss)
    return {name: (net.initial[name] * gradient).abs() for name, gradient in gradients.items()}


def score_true_logit(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """FORCE with the loss of the authors' code: minus the mean logit of the true class.

    Reference: de Jorge et al. 2021, arXiv:2006.09081, released code.
    Deviates: none from the code; the paper says cross-entropy.
    """
    return score(net, batches, minus_true_logit, generator)
