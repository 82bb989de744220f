"""Norms that are moved while a batch passes: towards a scale of one and a shift of zero."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pai_bench.errors import ConfigError

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def shares(number: int, generator: Generator) -> list[float]:
    """How far the norms of each of so many steps are moved: numbers in [0, 1), drawn uniformly."""
    drawn: list[float] = torch.rand(number, generator=generator).tolist()
    return drawn


class NormInterpolation:
    """The norms of a network while a batch passes: scale a + (1 - a) scale, shift (1 - a) shift.

    a is the same for all norms. The parameters themselves and their optimizer see nothing of it but gradients, which
    are those of this function. Nothing is read from the device, so a CUDA graph can hold it.

    Args:
        net: on the device.

    Raises:
        ConfigError: the network has no norm with a scale.

    Reference: Oh et al. 2025, Find A Winning Sign (AWS), arXiv:2504.05357, and its released code.
    Deviates: their code moves 2D batch norm and layer norm; here group and instance norm, too.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        norms = [module for module in net.modules() if isinstance(module, _NORMS)]
        self._scales: list[Tensor] = [norm.weight for norm in norms if norm.weight is not None]
        self._shifts: list[Tensor] = [norm.bias for norm in norms if norm.bias is not None]
        if not self._scales:
            raise ConfigError(
                "training.norm_interpolation=uniform: the network has no norm with a scale; give null, or another model"
            )
        self.share = torch.zeros((), device=device)  # a, of the next step

    @contextmanager
    def during_pass(self) -> Iterator[None]:
        """Inside the block the norms are moved. Gradients of a backward pass there become those of the parameters."""
        moved = [*self._scales, *self._shifts]
        rest = 1 - self.share
        before = [parameter.detach().clone() for parameter in moved]
        with torch.no_grad():
            for parameter in moved:
                parameter.mul_(rest)
            for scale in self._scales:
                scale.add_(self.share)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(moved, before, strict=True):
                    parameter.copy_(value)
                    if parameter.grad is not None:
                        parameter.grad.mul_(rest)
