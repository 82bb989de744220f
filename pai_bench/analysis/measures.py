"""What a masked network costs and whether it still carries signal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pai_bench.analysis import operations
from pai_bench.analysis.gradients import hessian_gradient, mean_gradient
from pai_bench.core import Batches, Loss, Mask, Shape, Subnetwork, labels_of
from pai_bench.masks import masks


class CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations while it is active, two for a multiply-add.

    Matrix products, convolutions and attention count, as in torch.utils.flop_counter, whose formulas these are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # imports triton, which takes a fifth of a second

        self.flops, self._formulas = 0, flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # scores are not compiled, and to be skipped would import torch._dynamo, which takes a second

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = self._formulas.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Runs a block with every module in train or eval mode, and puts each back into its own."""
    changed = [module for module in model.modules() if module.training != training]
    for module in changed:
        vars(module)["training"] = training  # a tenth of the time of an assignment, which looks for parameters first
    try:
        yield
    finally:
        for module in changed:
            vars(module)["training"] = not training


def multiply_adds(model: nn.Module, input_shape: Shape) -> dict[str, int]:
    """Multiply-adds of one image (C, H, W), dense, by the weight that is applied; biases and norms do not count.

    Prunable weights come first; products of two activations, as in attention, count under operations.ACTIVATIONS.
    """
    with mode(model, training=False):
        return operations.watch(model, input_shape).multiply_adds


def masked_multiply_adds(counts: dict[str, int], mask: Mask) -> int:
    """Multiply-adds for one image if every pruned weight were free: a bound, not a speed."""
    densities = masks.densities(mask)
    return round(sum(count * densities.get(name, 1.0) for name, count in counts.items()))


def output_depends_on_input(model: nn.Module, images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> bool:
    """Whether the outputs for images (B, C, H, W) depend on them, by one forward and one backward pass in train mode.

    The model's weights must be masked already. Its buffers and gradients are left as they were.

    Args:
        parameters: values to use in place of the model's own.
    """
    images = images.detach().requires_grad_()
    state = dict(parameters or {}) | {name: buffer.clone() for name, buffer in model.named_buffers()}
    with mode(model, training=True):
        logits = torch.func.functional_call(model, state, (images,))
        # Weighted at random: norms make plain sums over a batch constant, and a loss may be saturated.
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), images, materialize_grads=True)
    return bool((gradient.isfinite() & (gradient != 0)).any())


def dead_units(reached: Mask) -> dict[str, int]:
    """Output units (filters, neurons) of each layer that no path runs through, given the effective weights."""
    return {name: int((~tensor.flatten(1).any(1)).sum()) for name, tensor in reached.items()}


def gradient_flow(net: Subnetwork, batches: Batches, loss: Loss) -> dict[str, float]:
    """Loss, |w|, |g|, w'g, w'Hg and g'Hg over all trainable parameters, in the mode that the model is in.

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
