"""Masks as parametrizations of torch.nn.utils.parametrize, for training loops of other programs."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pai_bench.core import Mask
from pai_bench.errors import ConfigError


class Masked(nn.Module):
    """Multiplies a weight by a mask. The mask is a buffer, so it is in the state dict of the network."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros where it is pruned. Its gradient is zero there too."""
        return weight * self.mask


def parametrize_(model: nn.Module, mask: Mask) -> None:
    """Puts a mask on a network, so that its pruned weights act as zeros whatever an optimizer does.

    `mask=FILE` takes the state dict of such a network. parametrize.remove_parametrizations(module, name) takes a mask
    off again, and leaves the zeros.

    Args:
        mask: by parameter name, True = kept; parameters without a mask stay as they are.

    Raises:
        ConfigError: the network has no such parameter, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, kept in mask.items():
        if name not in parameters or parameters[name].shape != kept.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "none of that name"
            raise ConfigError(f"{name}: the mask is {tuple(kept.shape)}, and in the network {shape}; give its own mask")
    for name, kept in mask.items():
        owner, _, own = name.rpartition(".")
        on_device = kept.to(parameters[name].device)
        parametrize.register_parametrization(model.get_submodule(owner), own, Masked(on_device), unsafe=False)
