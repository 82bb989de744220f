"""What a masked network costs and whether it still carries signal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from pai_bench import masks
from pai_bench.core import Batch, Batches, Loss, Mask, Shape, Subnetwork
from pai_bench.gradients import hessian_gradient, mean_gradient


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
    """Multiply-adds of each prunable layer for one image (C, H, W), dense. Biases and norms do not count."""
    names = {id(weight): name for name, weight in masks.prunable(model).items()}
    counts: dict[str, int] = {}

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        channels = weight.shape[0] if isinstance(module, nn.Linear) else output.shape[1]
        name = names[id(weight)]
        counts[name] = counts.get(name, 0) + weight.numel() * (output.numel() // channels)

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if id(getattr(module, "weight", None)) in names
    ]
    try:
        with mode(model, training=False), torch.no_grad():
            model(torch.zeros((1, *input_shape)).to(next(model.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: counts[name] for name in masks.prunable(model) if name in counts}


def masked_multiply_adds(counts: dict[str, int], mask: Mask) -> int:
    """Multiply-adds for one image if every pruned weight were free: a bound, not a speed."""
    densities = masks.densities(mask)
    return round(sum(count * densities[name] for name, count in counts.items()))


def carries_signal(model: nn.Module, batch: Batch, loss: Loss) -> bool:
    """Whether the loss on a batch still depends on the images, by one forward and one backward pass in train mode.

    The model's weights must be masked already. Its buffers and gradients are left as they were.
    """
    images, labels = batch
    images = images.detach().requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with mode(model, training=True):
        logits = torch.func.functional_call(model, buffers, (images,))
        (gradient,) = torch.autograd.grad(loss(logits, labels), images, materialize_grads=True)
    return bool((gradient.isfinite() & (gradient != 0)).any())


class _Presence(torch.autograd.Function):
    """1 where a signal is and 0 elsewhere, forwards and backwards: sums of paths neither overflow nor vanish."""

    @staticmethod
    def forward(_: Any, signal: Tensor) -> Tensor:
        return (signal > 0).to(signal.dtype)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return (gradient > 0).to(gradient.dtype)


def effective(model: nn.Module, mask: Mask, input_shape: Shape) -> Mask:
    """The kept weights that lie on a path of kept weights from a pixel to an output.

    Residual connections are paths, too. Biases start no path. Exact for networks of convolutions and linear layers,
    whatever their depth. Through softmax attention only values are followed: queries and keys count as on no path.

    Reference: Vysogorets and Kempe 2023, arXiv:2107.02306, for effective sparsity.
    Deviates: decided by reachability alone, so no path is lost to rounding.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if name in mask:
            state[name] = mask[name].to(parameter.dtype).requires_grad_()
        else:  # layer scales are open; biases, position and class embeddings are no path from the image
            is_scale = parameter.ndim == 1 and not name.endswith("bias")
            state[name] = torch.full_like(parameter, float(is_scale))
    weights = {name: state[name] for name in mask}
    norms = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)

    def presence(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(module, norms):
            return inputs[0]
        if isinstance(module, nn.MaxPool2d):  # its gradient would follow one of several equals
            settings = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
            return F.avg_pool2d(inputs[0], *settings)
        marked: Tensor = _Presence.apply(output)  # type: ignore[no-untyped-call]
        return marked

    prunable = {id(weight) for weight in masks.prunable(model).values()}
    hooks = [
        module.register_forward_hook(presence)
        for module in model.modules()
        if isinstance(module, (*norms, nn.MaxPool2d)) or id(getattr(module, "weight", None)) in prunable
    ]
    try:
        with mode(model, training=False):
            image = next(iter(weights.values())).new_ones((1, *input_shape), requires_grad=False)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            outputs = torch.func.functional_call(model, state | buffers, (image,))
            gradients = torch.autograd.grad(outputs.sum(), list(weights.values()), materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: mask[name] & (gradient > 0) for (name, _), gradient in zip(weights.items(), gradients, strict=True)}


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

    number = sum(len(labels) for _, labels in batches)
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
