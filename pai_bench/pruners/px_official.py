"""PX as the released code of its authors had it in 2024."""

import torch
from torch import Generator, Tensor

from pai_bench.analysis import gates
from pai_bench.core import Batches, Loss, Scores, Subnetwork, Weights
from pai_bench.errors import UserError

_NAME = "PX"


def score(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
    """|dR/d(w^2)| w^4. R sums, over images x and outputs k, a flow of weights times a flow of the image.

    The flow of weights is the k-th output for x in the network of squared parameters, without activations. The flow of
    the image is the k-th output for x in the network of ones, whose activations multiply by the gates that the real
    network has for x. All three networks normalise by batch statistics: set pruner.mode=train. Norms keep their
    parameters.

    Raises:
        UserError: there are no images; eval mode; an activation is no ReLU; R overflows the precision of the network.

    Reference: the released code of Iurada et al. 2024, arXiv:2406.01820, at commit 82ce2bf.
    Deviates: they tell norms by the name "bn", so the norms of their shortcuts are squared too. At initialization that
        changes nothing.
    """
    if not batches:
        raise UserError("pruner.scoring_data=null: this score looks at images; say how many, as in conf/pruner/px.yaml")
    if not net.model.training:
        raise UserError(
            "the network is in eval mode, and this version of PX uses batch statistics; set pruner.mode=train"
        )
    squared = _squared(net)
    ones = {name: kept.to(squared[name]) for name, kept in net.mask.items()}
    leaves = [squared[name] for name in net.mask]
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    precision = str(next(iter(squared.values())).dtype).removeprefix("torch.")
    error = UserError(f"{_NAME} overflows {precision} on this model; choose a wider type")
    for images, _ in batches:
        of_images = _flow_of_images(net, images, ones)
        with gates.opened(_NAME):
            flow = (of_images * net(images, squared)).sum()
        net.require(flow.isfinite(), lambda: error)
        for total, gradient in zip(totals, torch.autograd.grad(flow, leaves, materialize_grads=True), strict=True):
            total.add_(gradient)
    return {name: total.abs() * net.weights[name] ** 4 for name, total in zip(net.mask, totals, strict=True)}


def _squared(net: Subnetwork) -> Weights:
    """The parameters of the network of squares. The prunable ones require a gradient."""
    modules = dict(net.model.named_modules())
    found = {}
    for name, parameter in net.model.named_parameters():
        is_norm = hasattr(modules[name.rpartition(".")[0]], "running_mean")
        found[name] = parameter.detach().clone() if is_norm else parameter.detach() ** 2
    return {name: value.requires_grad_(name in net.mask) for name, value in found.items()}


@torch.no_grad()
def _flow_of_images(net: Subnetwork, images: Tensor, ones: Weights) -> Tensor:
    """The outputs (B, K) in the network of ones with the gates of the real network."""
    found: list[Tensor] = []
    with gates.recorded(_NAME, found):
        net(images, net.weights)
    with gates.replayed(_NAME, found):
        return net(images, ones)
