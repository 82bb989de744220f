"""GraSP: gradient signal preservation."""

from torch import Generator

from pai_bench.core import Batches, Loss, Scores, Subnetwork
from pai_bench.gradients import hessian_gradient


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, temperature: float) -> Scores:
    """w * (Hg), signed: removing a weight with a high value would shrink the squared gradient norm.

    The first-order change of g^T g when weight q is set to zero is -2 w_q (Hg)_q, so high = keep.

    Args:
        temperature: divides the logits while scoring; the authors use 200.

    Reference: Wang, Zhang and Grosse 2020, arXiv:2002.07376, eq. 8 (with the opposite sign: theirs is low = keep).
    Deviates: the authors' code redraws the classifier before scoring and splits each batch by class into halves with
        their own batch-norm statistics; here the network is scored as it will be trained, on shuffled batches.
    """
    weights, products = hessian_gradient(net, batches, loss, temperature=temperature)
    return {name: weight * products[name] for name, weight in weights.items()}
