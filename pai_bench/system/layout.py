"""Memory layout: how the weights of a network and its images lie in memory. Everybody who needs to know asks here."""

import torch
from torch import Tensor, nn

_NARROW = 16  # input channels


def suitable(net: nn.Module, device: torch.device, channels_last: bool) -> torch.memory_format:
    """The layout in which a network is best trained on a device.

    On a CPU, oneDNN computes the gradient of a 1x1 convolution with a stride wrongly when it reads few channels that
    are laid out channels last: it writes outside its memory, and the process crashes or hangs (seen with up to 7 input
    channels, torch 2.4 to 2.15). A network with such a layer keeps its channels first.

    Args:
        channels_last: whether to lay out channels last where that is safe.
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
    """The tensor itself if it has exactly the strides of a layout, else a copy that has them.

    `Tensor.contiguous` does not do: where a dimension has one entry (grey images, 1x1 kernels) torch takes a tensor for
    both layouts at once and returns it as it is, but a convolution goes by the strides, and hands its layout on.
    """
    if tensor.stride() == strides(tensor.shape, layout):
        return tensor
    form = layout if tensor.ndim == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=form).copy_(tensor)


@torch.no_grad()
def lay_out_(net: nn.Module, layout: torch.memory_format) -> None:
    """Gives every parameter and buffer of a network exactly the strides of a layout, in place. Drops no gradient."""
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = laid_out(tensor.data, layout)
        if tensor.grad is not None:
            tensor.grad.data = laid_out(tensor.grad.data, layout)


def layout_of(net: nn.Module) -> torch.memory_format:
    """The layout that the weights of a network have; images that it is given should have the same.

    Channels last is told by any kernel that lies so and not otherwise.
    """
    told = any(_lies_channels_last(parameter) for parameter in net.parameters())
    return torch.channels_last if told else torch.contiguous_format


def _lies_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and (
        tensor.stride() == strides(tensor.shape, torch.channels_last) != strides(tensor.shape, torch.contiguous_format)
    )


def strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    """The strides, in entries, of a fresh tensor of a shape; a layout matters to tensors of four dimensions alone."""
    if layout == torch.channels_last and len(shape) == 4:
        _, channels, height, width = shape
        return (channels * height * width, 1, channels * width, channels)
    found = [1]
    for size in reversed(shape[1:]):
        found.insert(0, found[0] * max(size, 1))
    return tuple(found[: len(shape)])
