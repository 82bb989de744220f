"""Whether a masked network still carries signal, and how its gradients flow."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pai_bench.analysis.gradients import hessian_gradient, mean_gradient
from pai_bench.analysis.mode import mode
from pai_bench.batches import labels_of
from pai_bench.core import Batches, Loss, Subnetwork


def output_depends_on_input(model: nn.Module, images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> bool:
    """Whether the outputs for images (B, C, H, W) depend on them. One forward and backward pass in train mode tells.

    The model's weights must be masked already. Its buffers and gradients stay as they were.

    Args:
        parameters: values that take the place of the model's own.
    """
    images = images.detach().requires_grad_()
    state = dict(parameters or {}) | {name: buffer.clone() for name, buffer in model.named_buffers()}
    with mode(model, training=True):
        logits = torch.func.functional_call(model, state, (images,))
        # With random weights, because norms make plain sums over a batch constant, and a loss may be saturated.
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), images, materialize_grads=True)
    return bool((gradient.isfinite() & (gradient != 0)).any())


def gradient_flow(net: Subnetwork, batches: Batches, loss: Loss) -> dict[str, float]:
    """The loss, |w|, |g|, w'g, w'Hg and g'Hg over all parameters w (frozen ones, too), in the mode that the model
    is in.

    g and H are the gradient and the Hessian of the loss.

    Under gradient flow d|w|^2/dt = -2 w'g, d^2|w|^2/dt^2 = 2 (|g|^2 + w'Hg) and d|g|^2/dt = -2 g'Hg.

    Reference: Lubana and Dick 2021, arXiv:2009.11839.
    """
    at = net.masked() | net.others()
    weights, gradients = mean_gradient(net, batches, loss, at=at)
    gradients = net.free(gradients)
    products = hessian_gradient(net, batches, loss, at=at, along=gradients)[1]

    def inner(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
        return sum(float((tensor.double() * two[name].double()).sum()) for name, tensor in one.items())

    number = sum(map(len, labels_of(batches)))
    with torch.no_grad():
        value = sum(float(loss(net(images, at), labels)) * len(labels) / number for images, labels in batches)
    return {
        "flow/loss": value,
        "flow/parameter_norm": inner(weights, weights) ** 0.5,
        "flow/gradient_norm": inner(gradients, gradients) ** 0.5,
        "flow/weight_gradient": inner(weights, gradients),
        "flow/weight_hessian_gradient": inner(weights, products),
        "flow/gradient_hessian_gradient": inner(gradients, products),
    }
