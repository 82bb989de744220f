"""Convolutions as matrix products.

For one image in float64, libraries of convolutions are far from the rate of a GPU, and matrix products are not.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pay(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products are faster. On a CPU they were measured to be as fast as convolutions, or slower."""
    return device.type == "cuda" and dtype == torch.float64


def use_(model: nn.Module) -> None:
    """Makes every convolution of a model that can be one a matrix product from now on. Batches have one image."""
    for layer in model.modules():
        if type(layer) is not nn.Conv2d or not isinstance(layer.padding, tuple):
            continue
        if layer.groups == 1 and layer.padding_mode == "zeros":
            layer.forward = partial(convolved, layer)  # type: ignore[method-assign]


def convolved(layer: nn.Conv2d, image: Tensor) -> Tensor:
    """What a convolution without groups makes of one image (1, C, H, W): its weight times the patches of the image."""
    assert len(image) == 1 and isinstance(layer.padding, tuple)
    sides = zip(image.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    height, width = (
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, padding, dilation, kernel, stride in sides
    )
    if layer.kernel_size == (1, 1) and layer.padding == (0, 0):
        patches = image[0, :, :: layer.stride[0], :: layer.stride[1]].flatten(1)
    else:
        patches = F.unfold(image, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0]
    result = layer.weight.flatten(1) @ patches
    if layer.bias is not None:
        result = result + layer.bias[:, None]
    return result.view(1, -1, height, width)
