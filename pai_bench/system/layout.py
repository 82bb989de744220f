"""Memory layout: how the weights of a network and its images lie in memory. All code that needs this asks here."""

import torch
from torch import Tensor, nn

_NARROW = 16  # input channels


def suitable(net: nn.Module, device: torch.device, channels_last: bool) -> torch.memory_format:
    """The best layout for training a network on a device.

    On a CPU, oneDNN computes one gradient wrongly: that of a 1x1 convolution with a stride, with few input channels and
    in the channels-last layout. It writes outside its memory, and the process crashes or hangs (seen with up to 7 input
    channels, torch 2.4 to 2.15). A network with such a layer stays channels first.

    Args:
        channels_last: use the channels-last layout if it is safe.
    """
    if not channels_last or (device.type == "cpu" and any(map(_is_unsafe, net.modules()))):
        return torch.contiguous_format
    return torch.channels_last


def _is_unsafe(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < _NARROW
    )


def laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """The tensor itself if it has exactly the strides of a layout, else a copy with these strides.

    `Tensor.contiguous` is not enough. If a dimension has one entry (grey images, 1x1 kernels), torch finds that the
    tensor has both layouts, and returns it unchanged. But a convolution chooses its layout by the strides.
    """
    if tensor.stride() == strides(tensor.shape, layout):
        return tensor
    form = layout if tensor.ndim == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=form).copy_(tensor)


@torch.no_grad()
def lay_out_(net: nn.Module, layout: torch.memory_format) -> None:
    """Gives every parameter and buffer of a network exactly the strides of a layout, in place. Gradients are kept."""
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = laid_out(tensor.data, layout)
        if tensor.grad is not None:
            tensor.grad.data = laid_out(tensor.grad.data, layout)


def layout_of(net: nn.Module) -> torch.memory_format:
    """The layout of the weights of a network. Its input images should have the same layout.

    It is channels last if any kernel is channels last.
    """
    channels_last = any(_is_channels_last(parameter) for parameter in net.parameters())
    return torch.channels_last if channels_last else torch.contiguous_format


def _is_channels_last(tensor: Tensor) -> bool:
    # A kernel of one channel and one pixel has the same strides in both layouts, so it decides nothing.
    return tensor.ndim == 4 and (
        tensor.stride() == strides(tensor.shape, torch.channels_last) != strides(tensor.shape, torch.contiguous_format)
    )


def strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    """The strides, in entries, of a new tensor of a shape. The layout matters only for tensors of four dimensions."""
    if layout == torch.channels_last and len(shape) == 4:
        _, channels, height, width = shape
        return (channels * height * width, 1, channels * width, channels)
    result = [1]
    for size in reversed(shape[1:]):
        result.insert(0, result[0] * max(size, 1))
    return tuple(result[: len(shape)])
