"""Points of the plane in four rings around the origin, made on the spot: the task of the circle ticket."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Generator, Tensor

from pai_bench.core import DataSettings, Fraction, NonNegativeInt, ProperFraction
from pai_bench.data.points import Points, split

_BORDERS = (0.2, 0.5, 0.7)  # of |x|^2, between the four classes


def planted_circle(
    place: DataSettings,
    *,
    num_examples: Annotated[int, Ge(3)],
    test_fraction: Annotated[float, Gt(0), Lt(1)],
    noise: Fraction,
    seed: NonNegativeInt,
    validation: ProperFraction,
) -> Points:
    """Points x, uniform in [-1, 1]^2. Their class says between which borders |x|^2 lies: 0.2, 0.5 and 0.7.

    Args:
        num_examples: of training and test split together.
        noise: probability that a label is that of the second likeliest class, in the test split too.
        seed: of points and labels. The seed of a run does not change them.

    Raises:
        ConfigError: a split would be empty, or there is only one training point.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153, and their released code.
    Deviates: the data has a seed of its own. The authors draw from NumPy's global generator, which no setting of theirs
        seeds, so every start has other data.
    """
    generator = Generator().manual_seed(seed)
    points = (2 * torch.rand(num_examples, 2, dtype=torch.float64, generator=generator) - 1).float()
    labels = _labels(points, torch.rand(num_examples, generator=generator) < noise)
    train, test = split(points, labels, test_fraction)
    return Points(train, test, len(_BORDERS) + 1, place, validation=validation)


def _labels(points: Tensor, noisy: Tensor) -> Tensor:
    """The class of each point; of noisy ones the second likeliest.

    A class's logit is a line over |x|^2. Its slope doubles from class to class, and neighbours cross at the borders.
    """
    slopes = 2.0 ** torch.arange(len(_BORDERS) + 1, dtype=torch.float64)
    steps = -slopes.diff() * torch.tensor(_BORDERS, dtype=torch.float64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    logits = points.double().square().sum(1, keepdim=True) * slopes + offsets
    first, second = logits.topk(2).indices.unbind(1)
    return torch.where(noisy, second, first)
