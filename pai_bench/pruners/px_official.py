"""PX as the released code of its authors has it, in two versions."""

from typing import Literal

import torch
from torch import Generator, Tensor

from pai_bench.analysis import gates
from pai_bench.analysis.mode import mode
from pai_bench.core import Batches, Loss, Scores, Subnetwork, Weights
from pai_bench.errors import UserError

_NAME = "PX"


def score(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, version: Literal["2024", "2025"]
) -> Scores:
    """|dR/d(w^2)| w^4 (2024) or |dR/d(w^2)| w^2 (2025), where R is that of PX with the networks of the released code.

    Both use batch statistics in both flows: set pruner.mode=train.

    Args:
        version: "2024": both flows see the images as they are, and the gates are of train mode. "2025": the flow of
            weights sees ones and the flow of the image its square; the gates are of eval mode, and the last layer keeps
            its signed weights and its bias in both flows.

    Raises:
        UserError: there are no images; eval mode; an activation is no ReLU.

    Reference: the released code of Iurada et al. 2024, arXiv:2406.01820: commits 82ce2bf (2024) and ed6c40e (2025).
    Deviates: they tell norms by the name "bn". So the norms of shortcuts, which have other names, get a shift of one in
        the flow of the image, and squares in the flow of weights, in 2025 (squares in both versions). Here all norms
        keep their parameters. Version 2025 takes the first images of each class; here they are drawn.
    """
    if not batches:
        raise UserError("pruner.scoring_data=null: this score looks at images; say how many, as in conf/pruner/px.yaml")
    if not net.model.training:
        raise UserError("pruner.mode=eval: this version of PX uses batch statistics; set pruner.mode=train")
    squared, ones = _networks(net, version)
    leaves = [squared[name] for name in net.mask]
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for images, _ in batches:
        of_images = _flow_of_images(net, images, ones, version)
        with gates.opened(_NAME):
            of_weights = net(torch.ones_like(images) if version == "2025" else images, squared)
        flow = (of_images * of_weights).sum()
        if not flow.isfinite():
            name = str(flow.dtype).removeprefix("torch.")
            raise UserError(f"{_NAME} overflows {name} on this model; choose a wider type")
        for total, gradient in zip(totals, torch.autograd.grad(flow, leaves), strict=True):
            total.add_(gradient)
    power = 4 if version == "2024" else 2
    return {name: total.abs() * net.weights[name] ** power for name, total in zip(net.mask, totals, strict=True)}


def _networks(net: Subnetwork, version: str) -> tuple[Weights, Weights]:
    """The parameters of the network of squares, leaves that require a gradient, and of the network of ones."""
    weights, norms = net.weights, _norm_parameters(net)
    last = list(weights)[-1].rpartition(".")[0]
    squared: Weights = {}
    ones: Weights = {}
    for name, parameter in net.model.named_parameters():
        value = parameter.detach()
        signed = version == "2025" and name.rpartition(".")[0] == last
        squared[name] = value.clone() if signed or name in norms else value**2
        if name in net.mask:
            squared[name].requires_grad_()
            ones[name] = value.clone() if signed else net.mask[name].to(value)
        else:
            filled = version == "2025" and not signed and name not in norms
            ones[name] = torch.ones_like(value) if filled else value.clone()
    return squared, ones


def _norm_parameters(net: Subnetwork) -> set[str]:
    modules = dict(net.model.named_modules())
    named = [name for name, _ in net.model.named_parameters()]
    return {name for name in named if hasattr(modules[name.rpartition(".")[0]], "running_mean")}


@torch.no_grad()
def _flow_of_images(net: Subnetwork, images: Tensor, ones: Weights, version: str) -> Tensor:
    """The outputs (B, K) in the network of ones with the gates of the real network."""
    found: list[Tensor] = []
    with mode(net.model, training=version == "2024"), gates.recorded(_NAME, found):
        net(images, net.weights)
    with gates.replayed(_NAME, found):
        return net(images**2 if version == "2025" else images, ones)
