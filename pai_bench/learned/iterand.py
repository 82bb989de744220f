"""IteRand: edge-popup on weights that are drawn again where they are not chosen."""

from collections.abc import Sequence

import torch

from pai_bench.core import Count, Fraction, TrainingLength
from pai_bench.learned.initial import Frozen, frozen, kaiming_uniform
from pai_bench.learned.method import Event, Method, Occasion, Searched


def iterand(*, weights: Frozen, scale_fan: bool, every_steps: Count, probability: Fraction) -> Method:
    """As edge-popup. Every so many steps each weight outside the mask is drawn again with a probability.

    Args:
        weights: values of the frozen weights: "signed_constant", or "drawn" by the network's own law.
        scale_fan: make the weights larger where the layer is sparser.
        every_steps: steps between two draws.
        probability: of a weight outside the mask to be drawn again.

    Reference: Chijiwa et al. 2021, arXiv:2106.09269.
    Deviates: the magnitude of a score decides, as in edge_popup. The authors' code ranks signed scores, and draws the
        first ones in an interval 2.4 times as wide. Weights are drawn by the law of the whole network's initialization.
        After the last step nothing is drawn again. Numbers of kept weights are rounded as in edge_popup.
    """

    def steps(length: TrainingLength) -> Sequence[int]:
        return range(every_steps, length.epochs * length.steps_per_epoch, every_steps)

    def happen_(net: Searched, occasion: Occasion) -> None:
        mask, fresh = net.mask(), occasion.redraw()
        for name, weight in net.weights.items():
            lot = torch.rand(weight.shape, generator=occasion.generator) < probability
            weight.copy_(torch.where(~mask[name] & lot.to(weight.device), fresh[name], weight))

    return Method(draw=kaiming_uniform, weights=frozen(weights, scale_fan), event=Event(steps, happen_))
