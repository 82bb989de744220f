"""PX: path exclusion, by the paths of the network and by which of them images open."""

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis import gates
from pai_bench.analysis.norm_statistics import uses_batch_statistics
from pai_bench.core import Batches, Loss, Scores, Subnetwork, Weights
from pai_bench.errors import UserError
from pai_bench.pruners.synflow import Flow

_NAME = "PX"


def score(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, gradient: Literal["sum", "sum_of_squares"]
) -> Scores:
    """w^2 dR/d(w^2). R sums, over images x and outputs k, a flow of weights times a flow of the image.

    The flow of weights is the k-th output for an image of ones in the network of squared parameters, without
    activations. The flow of the image is the k-th output for x^2 in the network of ones, whose activations multiply by
    the gates that the real network has for x. So a path counts by its squared weights, by the square of the pixel where
    it begins, and only if all of its units are active. Neither labels nor the loss play a part.

    Args:
        gradient: "sum": of all images, as in the paper. "sum_of_squares": dR/d(w^2) is squared for each batch and then
            summed, as in later released code.

    Raises:
        UserError: there are no images; train mode; an activation is no ReLU; a flow overflows the precision of the
            network.

    Reference: Iurada et al. 2024, arXiv:2406.01820, and the released code.
    Deviates: code released in February 2025 (commit ed6c40e) has batch statistics in the flow of weights. Where a
        network ends with a norm and average pooling, that flow then does not depend on the weights, so it is no option.
        R is divided by its largest weight of an output, which changes no rank and avoids overflow. In the network
        of ones, norms are the identity and biases zero. The squared network keeps running variances as they are,
        and subtracts no running means: they belong to no path.
    """
    if not batches:
        raise UserError("pruner.scoring_data=null: this score looks at images; say how many, as in conf/pruner/px.yaml")
    if uses_batch_statistics(net.model):
        raise UserError("pruner.mode=train: in the flows norms are scales, without statistics; set pruner.mode=eval")
    if "px" not in net.cache:
        net.cache["px"] = Flow(net, _NAME, squares=True, means=False)
    flow: Flow = net.cache["px"]
    of_batches = [_flow_of_images(net, images) for images, _ in batches]
    total = torch.stack(of_batches).sum(0)
    largest = total.max()
    precision = str(total.dtype).removeprefix("torch.")
    error = UserError(f"{_NAME} overflows {precision} on this model; choose a wider type")
    net.require(largest.isfinite(), lambda: error)
    scale = torch.where(largest > 0, 1 / largest, 1.0)
    if gradient == "sum":
        return flow.scores(net, total * scale)
    squares = {name: torch.zeros_like(weight) for name, weight in net.weights.items()}
    for of_batch in of_batches:
        for name, values in flow.scores(net, of_batch * scale).items():
            squares[name] += values**2
    # The sum of (w^2 g)^2 is w^4 times the sum of g^2.
    weights = net.weights
    return {name: (total / weights[name] ** 2).where(weights[name] != 0, 0.0) for name, total in squares.items()}


@torch.no_grad()
def _flow_of_images(net: Subnetwork, images: Tensor) -> Tensor:
    """The outputs (K,) for squared images, summed, in the network of ones with the gates of the real network."""
    found: list[Tensor] = []
    with gates.recorded(_NAME, found):
        net(images, net.weights)
    values = net.free(_ones(net.model) | {name: kept.to(images) for name, kept in net.mask.items()})
    buffers = {name: _of_identity(name, buffer) for name, buffer in net.model.named_buffers()}
    with gates.replayed(_NAME, found):
        outputs: Tensor = torch.func.functional_call(net.model, (values, buffers), (images**2,))
    return outputs.sum(0)


def _ones(model: nn.Module) -> Weights:
    """One for every parameter called weight, zero for every bias. Other parameters as they are."""
    kinds = {"weight": torch.ones_like, "bias": torch.zeros_like}
    named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {name: kinds.get(name.rpartition(".")[2], torch.clone)(value) for name, value in named}


def _of_identity(name: str, buffer: Tensor) -> Tensor:
    """The value that a buffer has in a norm that changes nothing; of other buffers a copy."""
    last = name.rpartition(".")[2]
    if last in ("running_mean", "running_var"):
        return torch.zeros_like(buffer) if last == "running_mean" else torch.ones_like(buffer)
    return buffer.clone()
