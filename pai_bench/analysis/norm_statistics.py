"""The statistics that norms keep of the images that pass through them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pai_bench.core import State, Weights


def with_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that keep running statistics, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "running_mean", None) is not None}


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a norm that keeps running statistics is in train mode, and so uses those of the batch."""
    return any(norm.training for norm in with_statistics(model).values())


@torch.no_grad()
def statistics(model: nn.Module, weights: Weights, batches: Iterable[Tensor]) -> State:
    """The buffers of a network after one pass of images, from fresh statistics on. The model stays as it was.

    Running means and variances are the means over batches of the mean and the unbiased variance of each. Batches count
    by their size. Only norms are in train mode meanwhile, so dropout does nothing.

    Args:
        weights: values of parameters that take the place of the model's.
        batches: images (B, C, H, W). Without any, statistics are 0 and 1.
    """
    norms = with_statistics(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name in norms:
        buffers[_of(name, "running_mean")].zero_()
        buffers[_of(name, "running_var")].fill_(1)
    modes = {module: module.training for module in model.modules()}
    momenta = {module: module.momentum for module in norms.values()}
    num_images = 0
    try:
        for module in modes:
            module.training = module in momenta
        for images in batches:
            num_images += len(images)
            for module in momenta:
                module.momentum = len(images) / num_images  # type: ignore[assignment]  # of a norm, not a module
            torch.func.functional_call(model, (weights, buffers), (images,))
    finally:
        for module, training in modes.items():
            module.training = training
        for module, momentum in momenta.items():
            module.momentum = momentum
    return buffers


def _of(norm: str, buffer: str) -> str:
    return f"{norm}.{buffer}" if norm else buffer
