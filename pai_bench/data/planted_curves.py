"""Curves over one number, made on the spot: the regressions of the ReLU ticket and of the helix ticket."""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Generator, Tensor

from pai_bench.core import DataSettings, NonNegative, NonNegativeInt, ProperFraction
from pai_bench.data.points import Points, split


def planted_relu(
    place: DataSettings,
    *,
    num_examples: Annotated[int, Ge(3)],
    test_fraction: Annotated[float, Gt(0), Lt(1)],
    noise: NonNegative,
    seed: NonNegativeInt,
    validation: ProperFraction,
) -> Points:
    """Numbers x, uniform in [-1, 1]. The target is max(x, 0), plus normal noise.

    Args:
        num_examples: of training and test split together.
        noise: its standard deviation, in the test split too.
        seed: of numbers and noise. The seed of a run does not change them.

    Raises:
        ConfigError: a split would be empty, or there is only one training point.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153, and their released code.
    Deviates: the data has a seed of its own, as in planted_circle.
    """
    return _curve(lambda x: x.clamp(min=0), 1, place, num_examples, test_fraction, noise, seed, validation)


def planted_helix(
    place: DataSettings,
    *,
    num_examples: Annotated[int, Ge(3)],
    test_fraction: Annotated[float, Gt(0), Lt(1)],
    noise: NonNegative,
    seed: NonNegativeInt,
    validation: ProperFraction,
) -> Points:
    """Numbers t, uniform in [-1, 1]. The targets are a point of a helix that widens, plus normal noise.

    With y = 5 pi + 3 pi t, they are (y cos y, y sin y, y) / (8 pi), each in [-1, 1].

    Args:
        num_examples: of training and test split together.
        noise: its standard deviation, in the test split too.
        seed: of numbers and noise. The seed of a run does not change them.

    Raises:
        ConfigError: a split would be empty, or there is only one training point.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153, and their released code.
    Deviates: the data has a seed of its own, as in planted_circle.
    """
    return _curve(_helix, 3, place, num_examples, test_fraction, noise, seed, validation)


def _helix(t: Tensor) -> Tensor:
    """(N, 1) -> (N, 3)."""
    y = 5 * math.pi + 3 * math.pi * t
    return torch.cat([y * y.cos(), y * y.sin(), y], 1) / (8 * math.pi)


def _curve(
    function: Callable[[Tensor], Tensor],
    num_targets: int,
    place: DataSettings,
    num_examples: int,
    test_fraction: float,
    noise: float,
    seed: int,
    validation: float,
) -> Points:
    """Points of a curve, of which function (N, 1) -> (N, num_targets) gives the targets without noise."""
    generator = Generator().manual_seed(seed)
    points = 2 * torch.rand(num_examples, 1, dtype=torch.float64, generator=generator) - 1
    noises = noise * torch.randn(num_examples, num_targets, dtype=torch.float64, generator=generator)
    train, test = split(points.float(), (function(points) + noises).float(), test_fraction)
    return Points(train, test, num_targets, place, validation=validation)
