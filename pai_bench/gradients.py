"""Derivatives of the mean loss with respect to the prunable weights of a subnetwork."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pai_bench.core import Batches, Loss, Subnetwork, Weights
from pai_bench.errors import UserError


def _batch_loss(
    net: Subnetwork, weights: Weights, batch: tuple[torch.Tensor, torch.Tensor], loss: Loss, temperature: float
) -> torch.Tensor:
    images, labels = batch
    return loss(net(images, weights) / temperature, labels)


def mean_gradient(
    net: Subnetwork, batches: Batches, loss: Loss, *, temperature: float = 1.0
) -> tuple[Weights, Weights]:
    """The masked weights w and the gradient of the mean loss over all examples at w, both detached.

    The gradient is also given where a weight is pruned. Batches count by their size, so a short last batch is not
    over-weighted. `temperature` divides the logits.

    Raises:
        UserError: there are no batches.
    """
    if not batches:
        raise UserError("pruner.examples=null: this score looks at images; say how many, as in conf/pruner/snip.yaml")
    weights = net.masked()
    leaves = list(weights.values())
    num_examples = sum(len(labels) for _, labels in batches)
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for batch in batches:
        value = _batch_loss(net, weights, batch, loss, temperature)
        share = len(batch[1]) / num_examples
        for total, gradient in zip(sums, torch.autograd.grad(value, leaves), strict=True):
            total.add_(gradient, alpha=share)
    return {name: leaf.detach() for name, leaf in weights.items()}, dict(zip(weights, sums, strict=True))


def hessian_gradient(
    net: Subnetwork, batches: Batches, loss: Loss, *, temperature: float = 1.0
) -> tuple[Weights, Weights]:
    """The masked weights w and Hg at w, detached: g and H are the gradient and Hessian of the mean loss.

    H and g live on the prunable weights alone. g is held constant while g^T g is differentiated, so that several
    batches give (mean H)(mean g) and not the mean of H_b g_b.

    Raises:
        UserError: there are no batches.
    """
    weights = net.masked()
    leaves = list(weights.values())
    num_examples = sum(len(labels) for _, labels in batches)
    single = len(batches) == 1  # then gradient and product come from one forward pass
    if not single:
        constant = list(mean_gradient(net, batches, loss, temperature=temperature)[1].values())
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            value = _batch_loss(net, weights, batch, loss, temperature)
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
        if single:
            constant = [gradient.detach() for gradient in gradients]
        inner = torch.stack([(g * c).sum() for g, c in zip(gradients, constant, strict=True)]).sum()
        share = len(batch[1]) / num_examples
        products = torch.autograd.grad(inner, leaves, materialize_grads=True)
        for total, product in zip(sums, products, strict=True):
            total.add_(product, alpha=share)
    return {name: leaf.detach() for name, leaf in weights.items()}, dict(zip(weights, sums, strict=True))
