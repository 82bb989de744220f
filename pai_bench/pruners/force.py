"""FORCE: foresight connection sensitivity."""

from torch import Generator

from pai_bench.analysis.gradients import mean_gradient, minus_true_logit
from pai_bench.core import Batches, Loss, Scores, Subnetwork


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|w0 dL/dw| with the gradient taken at the masked network and the weights dense, as they were initialized.

    A pruned weight keeps a score, so with `regrow` it can return in a later round. With nothing pruned it is SNIP.

    Reference: de Jorge et al. 2021, arXiv:2006.09081, section 4.
    Deviates: the loss is cross-entropy, as in the paper; the authors' code feeds raw logits to the negative
        log-likelihood (pruner=force_official). Masks equal those of their loop, bit for bit in float64, with the same
        loss and the same numbers of weights: set schedule.rounding=down; their last round rounds down too. Where fewer
        weights score above zero than are to be kept, their code keeps all; here the first in parameter order stay.
    """
    _, gradients = mean_gradient(net, batches, loss)
    return {name: (net.initial[name] * gradient).abs() for name, gradient in gradients.items()}


def score_true_logit(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """FORCE with the loss of the authors' code: minus the mean logit of the true class.

    Reference: de Jorge et al. 2021, arXiv:2006.09081, released code.
    Deviates: none from the code; the paper says cross-entropy.
    """
    return score(net, batches, minus_true_logit, generator)
