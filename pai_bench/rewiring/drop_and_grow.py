"""What the rules have in common: how many weights are dropped at a time, which of them, and which others grow."""

import math
from typing import Literal

import torch
from torch import Generator

from pai_bench.core import Fraction, Mask, Scores, Weights
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.masks.allocation import by_density
from pai_bench.masks.selection import keep_largest
from pai_bench.rewiring.rewire import RewireProgress

Decay = Literal["cosine", "linear", "cubic", "constant"]


def decayed(first: Fraction, last: Fraction, decay: Decay, fraction: float) -> float:
    """The drop fraction: `first` at the beginning, and `last` at the end unless it is constant.

    Args:
        fraction: of the way from beginning to end, in [0, 1].
    """
    match decay:
        case "cosine":
            left = (1 + math.cos(math.pi * fraction)) / 2
        case "linear":
            left = 1 - fraction
        case "cubic":
            left = (1 - fraction) ** 3
        case "constant":
            left = 1.0
    return last + (first - last) * left


def dropped(mask: Mask, fraction: float) -> dict[str, int]:
    """How many weights each layer drops: a fraction of those that it keeps, rounded down."""
    return {name: int(fraction * number) for name, number in zip(mask, masks.counts(mask), strict=True)}


def drop_and_grow(weights: Weights, growth: Scores, mask: Mask, numbers: dict[str, int]) -> Mask:
    """In each layer the smallest kept weights are dropped, and as many others grow. The numbers of layers stay.

    A weight that was dropped a moment ago may grow again.

    Args:
        growth: what decides who grows: the largest of those that are not kept.
        numbers: how many weights each layer drops.
    """
    return grown(smallest_dropped(weights, mask, numbers), growth, numbers)


def smallest_dropped(weights: Weights, mask: Mask, numbers: dict[str, int]) -> Mask:
    """The mask without the smallest weights of each layer. Of equal ones the last in order go."""
    return {
        name: _largest(weights[name].abs(), kept, number - numbers[name])
        for (name, kept), number in zip(mask.items(), masks.counts(mask), strict=True)
    }


def grown(mask: Mask, growth: Scores, numbers: dict[str, int]) -> Mask:
    """The mask with the weights of each layer that it lacks and whose scores are the largest."""
    return {name: kept | _largest(growth[name], ~kept, numbers[name]) for name, kept in mask.items()}


def random_scores(mask: Mask, generator: Generator) -> Scores:
    """Uniform noise for every entry, the same on every device."""
    return {name: torch.rand(kept.shape, generator=generator).to(kept.device) for name, kept in mask.items()}


def sizes_of(values: Weights, setting: str) -> Scores:
    """The absolute values of gradients or of their mean.

    Raises:
        ConfigError: a run does not supply them.
    """
    if not values:
        raise ConfigError(f"{setting}: this rule grows weights by them; set it")
    return {name: value.abs() for name, value in values.items()}


def on_the_way(progress: RewireProgress, fraction: float) -> int:
    """How many weights the network keeps on a cubic way from the mask of the start to that of the end.

    Args:
        fraction: of the way, in [0, 1]. The last rewire is at the end of it.
    """
    start = sum(progress.kept_at_start.values())
    left = 0.0 if progress.last else (1 - fraction) ** 3
    return progress.keep + round((start - progress.keep) * left)


def largest(weights: Weights, mask: Mask, number: int, scope: Literal["layer", "global"]) -> Mask:
    """The largest of all weights, those outside the mask too.

    Args:
        scope: "layer": every layer has the same density. "global": the largest of the network are kept.
    """
    sizes = {name: weight.abs() for name, weight in weights.items()}
    everything = {name: kept | ~kept for name, kept in mask.items()}
    if scope == "layer":
        return by_density(sizes, everything, number, dict.fromkeys(mask, 1.0)).mask
    return keep_largest(sizes, everything, number).mask


def _largest(scores: torch.Tensor, candidates: torch.Tensor, number: int) -> torch.Tensor:
    return keep_largest({"": scores}, {"": candidates}, number).mask[""]
