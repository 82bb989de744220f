"""SynFlow: synaptic flow, without data."""

import logging
from typing import Literal

import torch
from torch import Generator, nn

from pai_bench.core import Batches, Loss, Scores, Subnetwork
from pai_bench.errors import UserError

log = logging.getLogger(__name__)


def score(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, dtype: Literal["float32", "float64"]
) -> Scores:
    """|w| * dR/d|w|, where R is the sum of the outputs for an all-ones image when every parameter is replaced by |.|.

    Biases, norm parameters and running statistics enter R by their absolute value too. Pruned weights score exactly
    zero. Meant for eval mode (batch statistics of a constant image are meaningless) and many exponential rounds.

    Args:
        dtype: float64, or float32 to equal the authors' loop bit for bit. Masks from float32 depend on the
            convolution algorithm, and deep networks overflow.

    Raises:
        UserError: R overflows `dtype`.

    Reference: Tanaka et al. 2020, arXiv:2006.05467, eq. 1 and Algorithm 1.
    Deviates: float64 by default; the authors' code scores in float32.
    """
    if all(kept.all() for kept in net.mask.values()) and (odd := _without_conservation(net.model)):
        log.warning("SynFlow's conservation laws do not hold through %s; its scores are taken as they come", odd)
    precision = {"float32": torch.float32, "float64": torch.float64}[dtype]
    others = [*net.model.named_parameters(), *net.model.named_buffers()]
    state = {
        name: tensor.detach().to(precision).abs() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in others
        if name not in net.mask
    }
    # Contiguous, so that a mask does not depend on the memory format in which the network will be trained.
    weights = {
        name: weight.to(precision, memory_format=torch.contiguous_format, copy=True).abs_().requires_grad_()
        for name, weight in net.weights.items()
    }
    image = torch.ones((1, *net.input_shape), dtype=precision, device=next(iter(weights.values())).device)
    flow = torch.func.functional_call(net.model, state | weights, (image,)).sum()
    if not flow.isfinite():
        raise UserError(f"SynFlow overflows {dtype} on this model; set pruner.score.dtype=float64")
    gradients = torch.autograd.grad(flow, list(weights.values()))
    return {name: g.mul_(weight.detach()) for (name, weight), g in zip(weights.items(), gradients, strict=True)}


def _without_conservation(model: nn.Module) -> str:
    """The kinds of layers in a model through which flow is not conserved, as words; empty if there are none."""
    names = {type(module).__name__.lower() for module in model.modules()}
    signs = {"attention": "attention", "layernorm": "layer norm", "groupnorm": "group norm", "sigmoid": "sigmoid gates"}
    return ", ".join(kind for sign, kind in signs.items() if any(sign in name for name in names))
