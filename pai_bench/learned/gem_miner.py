"""Gem-Miner: a threshold chooses the weights, and the lowest scores are frozen out step by step."""

from collections.abc import Sequence

from pai_bench.core import Count, TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.learned.initial import Frozen, frozen, unit_uniform
from pai_bench.learned.method import Event, Method, Occasion, Searched, same_scores
from pai_bench.masks import masks
from pai_bench.masks.selection import keep_largest


def num_left(total: int, target: int, number: int, of: int) -> int:
    """How many weights of `total` are not frozen out after the freezing of a number: a geometric fall to the target."""
    return target if number == of else max(target, round(total * (target / total) ** (number / of)))


def gem_miner(*, weights: Frozen, scale_fan: bool, freeze_every_epochs: Count) -> Method:
    """Keeps the weights with a score above 0.5. Scores begin uniform in [0, 1) and stay there.

    Every so many epochs the weights with the lowest scores of the network are frozen out, by the same factor each time,
    until the last time leaves the target. In the end the highest scores are kept, first those that are not frozen out.

    Args:
        weights: values of the frozen weights: "signed_constant", or "drawn" by the network's own law.
        scale_fan: make the weights larger where the layer is sparser.
        freeze_every_epochs: epochs between two such times.

    Reference: Sreenivasan et al. 2022, arXiv:2202.12002.
    Deviates: the released code gives biases scores too, and applies the mask of the weights to them. Here biases stay
        as they were drawn. The training of the weights afterwards is that of `training`.

    Raises:
        ConfigError: the search is too short to freeze; by the steps of its event.
    """

    def steps(length: TrainingLength) -> Sequence[int]:
        times = (length.epochs - 1) // freeze_every_epochs
        if not times:
            raise ConfigError(
                f"search.method.freeze_every_epochs={freeze_every_epochs}: the search ends with epoch {length.epochs}, "
                "so no weight would be frozen out; give fewer"
            )
        return [number * freeze_every_epochs * length.steps_per_epoch for number in range(1, times + 1)]

    def happen_(net: Searched, occasion: Occasion) -> None:
        left = num_left(masks.total(net.candidates), net.num_kept, occasion.number, occasion.total)
        for name, stays in keep_largest(net.strengths(), net.candidates, left).mask.items():
            net.candidates[name].copy_(stays)

    return Method(
        draw=unit_uniform,
        weights=frozen(weights, scale_fan),
        strength=same_scores,
        threshold=0.5,
        limits=(0.0, 1.0),
        event=Event(steps, happen_),
    )
