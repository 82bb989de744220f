"""IteRand: edge-popup on weights that are drawn again where they are not chosen."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from pai_bench.core import Count, Fraction, TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.learned.initial import Frozen, frozen, kaiming_uniform
from pai_bench.learned.method import Event, Method, Occasion, Searched, same_scores


def kaiming_uniform_relu(weight: Tensor, generator: Generator) -> Tensor:
    """Scores of the shape of a weight, uniform in +-sqrt(6 / fan_in)."""
    return kaiming_uniform(weight, generator) * 6**0.5


def iterand(
    *,
    weights: Frozen,
    scale_fan: bool,
    every_steps: Count,
    probability: Fraction,
    scores: Literal["signed", "magnitude"],
) -> Method:
    """As edge-popup. Every so many steps each weight outside the mask is drawn again with a probability.

    Args:
        weights: values of the frozen weights: "signed_constant", or "drawn" by the network's own law.
        scale_fan: make the weights larger where the layer is sparser.
        every_steps: steps between two draws.
        probability: of a weight outside the mask to be drawn again.
        scores: which weights are kept: "signed": those with the highest scores, which begin in +-sqrt(6 / fan_in).
            "magnitude": those with the highest |score|, as in edge_popup.

    Reference: Chijiwa et al. 2021, arXiv:2106.09269, and their released code, which has signed scores.
    Deviates: weights are drawn by the law of the whole network's initialization. After the last step nothing is drawn
        again. Numbers of kept weights are rounded as in edge_popup.

    Raises:
        ConfigError: the search is too short for a draw; by the steps of its event.
    """

    def steps(length: TrainingLength) -> Sequence[int]:
        total = length.epochs * length.steps_per_epoch
        if every_steps >= total:
            raise ConfigError(
                f"search.method.every_steps={every_steps}: the search has {total} steps, so no weight would be drawn "
                "again; give fewer, or search=edge_popup"
            )
        return range(every_steps, total, every_steps)

    def happen_(net: Searched, occasion: Occasion) -> None:
        mask, fresh = net.mask(), occasion.redraw()
        for name, weight in net.weights.items():
            lot = torch.rand(weight.shape, generator=occasion.generator) < probability
            weight.copy_(torch.where(~mask[name] & lot.to(weight.device), fresh[name], weight))

    return Method(
        draw=kaiming_uniform_relu if scores == "signed" else kaiming_uniform,
        weights=frozen(weights, scale_fan),
        strength=same_scores if scores == "signed" else torch.abs,
        event=Event(steps, happen_),
    )
