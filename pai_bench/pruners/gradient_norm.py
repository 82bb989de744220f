"""Gradient magnitude and diagonal Fisher information: cheap baselines."""

from torch import Generator

from pai_bench.analysis.gradients import mean_gradient, mean_square_gradient
from pai_bench.core import Batches, Loss, Scores, Subnetwork
from pai_bench.errors import UserError


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|dL/dw|, whatever the size of the weight.

    Reference: a baseline of zero-cost proxies, Abdelfattah et al. 2021, arXiv:2101.08134.
    Deviates: this scores weights; theirs scores a network.
    """
    return {name: gradient.abs() for name, gradient in mean_gradient(net, batches, loss)[1].items()}


def fisher(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, per_example: bool, temperature: float
) -> Scores:
    """w^2 times the diagonal of the empirical Fisher information: the mean of the squared gradient.

    Args:
        per_example: whether the gradient of every image is squared, which costs a backward pass for each and needs
            eval mode. Otherwise the gradient of every batch's mean loss is squared, and batches count by their size.
        temperature: divides the logits.

    Raises:
        UserError: per_example in train mode.

    Reference: Theis et al. 2018, arXiv:1801.05787, eq. 8 without the constant 1/2; by batches as in the released code
        of Lubana and Dick 2021, arXiv:2009.11839.
    Deviates: this scores weights, not feature maps. Their code scores a feature map by the sum over its filter, as
        pruner=filter_fisher does.
    """
    if per_example and net.model.training:
        raise UserError("pruner.mode=train: an image by itself has no batch statistics; set pruner.mode=eval")
    weights, squares = mean_square_gradient(net, batches, loss, temperature=temperature, per_example=per_example)
    return {name: weight**2 * squares[name] for name, weight in weights.items()}
