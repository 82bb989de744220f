"""Memory-economic sparse training (MEST): random weights come, and fewer are exchanged from phase to phase."""

from typing import Annotated

from annotated_types import Len
from torch import Generator

from pai_bench.core import Fraction, Mask, NonNegative, Weights
from pai_bench.errors import ConfigError
from pai_bench.rewiring.drop_and_grow import grown, random_scores, smallest_dropped
from pai_bench.rewiring.rewire import RewireProgress

Phases = Annotated[list[Fraction], Len(1)]


def rule(
    weights: Weights,
    gradients: Weights,
    momentum: Weights,
    mask: Mask,
    progress: RewireProgress,
    generator: Generator,
    *,
    until: Phases,
    drop: Phases,
    surplus: Annotated[list[NonNegative], Len(1)],
) -> Mask:
    """In each layer the smallest weights are dropped, and random ones grow, less and less from phase to phase.

    Args:
        until: the end of each phase, as a fraction of the training.
        drop: in each phase, the fraction of a layer's number that is dropped below that number.
        surplus: in each phase, the fraction of a layer's size that it has on top of its number between two rewires.

    Reference: Yuan et al. 2021, MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge,
        arXiv:2110.14032, and their released code.
    Deviates: the paper drops by |w| + lambda |g|; here, as in the code, by |w|. In the code a weight that is dropped
        and drawn again at once becomes 0; here it keeps its value and its momentum. The last rewire drops the surplus
        and exchanges nothing, so every layer ends with the number that it started with.

    Raises:
        ConfigError: the phases are not in order, or are not as many in all three lists.
    """
    if not len(until) == len(drop) == len(surplus) or until != sorted(until) or until[-1] < 1:
        raise ConfigError(
            f"rewire.rule.until={until}, drop={drop}, surplus={surplus}: give as many values in each, the times in "
            "rising order, the last of them 1"
        )
    phase = next(index for index, end in enumerate(until) if progress.time < end)
    exchanged, added = (0.0, 0.0) if progress.last else (drop[phase], surplus[phase])
    least = {name: number - int(exchanged * number) for name, number in progress.kept_at_start.items()}
    most = {
        name: min(number + int(added * mask[name].numel()), mask[name].numel())
        for name, number in progress.kept_at_start.items()
    }
    counts = {name: int(kept.sum()) for name, kept in mask.items()}
    fewer = smallest_dropped(weights, mask, {name: max(counts[name] - least[name], 0) for name in mask})
    left = {name: min(counts[name], least[name]) for name in mask}
    return grown(fewer, random_scores(mask, generator), {name: max(most[name] - left[name], 0) for name in mask})
