"""What a masked network costs and whether it still carries signal."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pai_bench import masks
from pai_bench.core import Batch, Loss, Mask, Shape


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Runs a block with every module in train or eval mode, and puts each back into its own."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


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
            model(torch.zeros((1, *input_shape), device=next(model.parameters()).device))
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
