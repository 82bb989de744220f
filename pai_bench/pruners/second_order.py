"""The change of the loss to second order when a weight is removed, with a diagonal in place of the Hessian."""

from typing import Literal

import torch
from torch import Generator

from pai_bench.analysis.gradients import hessian_gradient, mean_gradient, mean_square_gradient
from pai_bench.core import Batches, Count, Loss, Scores, Subnetwork, Weights
from pai_bench.errors import UserError


def score(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    generator: Generator,
    *,
    curvature: Literal["hessian", "fisher"],
    first_order: Literal["minus", "plus", "none"],
    probes: Count,
    temperature: float,
) -> Scores:
    """|-w g + h w^2 / 2|, where g is the gradient of the loss and h the diagonal of its curvature.

    Removing w changes the loss by -w g + h w^2 / 2 to second order.

    Args:
        curvature: "hessian": the diagonal of the Hessian, estimated with random signs z as the mean of z (H z).
            "fisher": the mean of the squared gradient of single images; it needs eval mode.
        first_order: the sign of w g. "minus" is the change of the loss. "plus" is what released code computes. "none"
            leaves the term out, and keeps the sign of the rest: at a minimum g is zero.
        probes: how many z for the Hessian; 1 with curvature=fisher, which has none.
        temperature: divides the logits.

    Raises:
        UserError: curvature=fisher in train mode.

    Reference: LeCun et al. 1990 (Optimal Brain Damage) for the expansion, without the first-order term; Gollini et al.
        2025, arXiv:2502.11450, and the released code, for these scores at initialization.
    Deviates: with first_order=minus the first-order term has the sign of the expansion; their code adds it.
    """
    if curvature == "fisher" and net.model.training:
        raise UserError("pruner.mode=train: an image by itself has no batch statistics; set pruner.mode=eval")
    weights, gradient = mean_gradient(net, batches, loss, temperature=temperature)
    if curvature == "fisher":
        diagonal = mean_square_gradient(net, batches, loss, temperature=temperature, per_example=True)[1]
    else:
        diagonal = _hessian_diagonal(net, batches, loss, generator, probes, temperature)
    scores: Scores = {}
    for name, weight in weights.items():
        second = diagonal[name] * weight**2 / 2
        if first_order == "none":
            scores[name] = second
        else:
            first = weight * gradient[name]
            scores[name] = (second - first if first_order == "minus" else second + first).abs()
    return scores


def _hessian_diagonal(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, probes: int, temperature: float
) -> Weights:
    """The diagonal of the Hessian of the mean loss, as the mean of z (H z) over random signs z."""
    weights = net.weights
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(probes):
        signs = {
            name: (torch.randint(2, weight.shape, generator=generator) * 2 - 1).to(weight)
            for name, weight in weights.items()
        }
        products = hessian_gradient(net, batches, loss, temperature=temperature, along=signs, repeats=probes)[1]
        for name, product in products.items():
            total[name].add_(product * signs[name], alpha=1 / probes)
    return total
