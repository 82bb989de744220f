"""How scores and frozen weights begin."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

Frozen = Literal["signed_constant", "drawn"]  # the values of frozen weights


def fan_in(weight: Tensor) -> int:
    """Inputs of one output of a layer: entries of a weight (outputs, inputs of a group, ...) over the outputs."""
    return weight.numel() // len(weight)


def kaiming_uniform(weight: Tensor, generator: Generator) -> Tensor:
    """Scores of the shape of a weight, uniform in +-1 / sqrt(fan_in), as torch draws weights."""
    bound: float = fan_in(weight) ** -0.5
    return (2 * torch.rand(weight.shape, generator=generator) - 1) * bound


def unit_uniform(weight: Tensor, generator: Generator) -> Tensor:
    """Scores of the shape of a weight, uniform in [0, 1)."""
    return torch.rand(weight.shape, generator=generator)


def frozen(weights: Frozen, scale_fan: bool) -> Callable[[Tensor, float], Tensor]:
    """What makes frozen weights of drawn ones, given the density of their layer.

    Args:
        weights: "drawn" leaves them as they are. "signed_constant" gives all weights of a layer the same size,
            sqrt(2 / fan_in), with the sign that was drawn.
        scale_fan: divide what is under the root by the density, so that a sparse layer keeps the size of its outputs.
            Drawn weights are divided by the root of the density.
    """

    def values(weight: Tensor, density: float) -> Tensor:
        scale = density**-0.5 if scale_fan and density > 0 else 1.0
        size: float = (2 / fan_in(weight)) ** 0.5
        return (weight if weights == "drawn" else torch.sign(weight) * size) * scale

    return values
