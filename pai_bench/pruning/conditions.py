"""When a round takes place: conditions that are asked after every epoch of the training before it.

A condition is a function of a moment. It says whether the round takes place now, what to record, and what it wants to
know after the next epoch. It keeps nothing itself, so a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pai_bench.core import Mask, State, Weights

if TYPE_CHECKING:
    from torch import Tensor

Held = tuple[bool, dict[str, float], State]  # whether the condition holds, what to record, notes


@dataclass(frozen=True)
class Moment:
    """The network after an epoch of the training before a round."""

    weights: Weights  # of the prunable layers
    choose: Callable[[], Mask]  # the units that the round would keep now
    notes: State  # what the condition noted after the epoch before; empty after the first


def weights_settle(moment: Moment, *, fraction: float) -> Held:
    """Whether the weights have moved little in this epoch.

    The distance |w - w_1| / |w_1| is from the weights w_1 after the first epoch. The condition holds where an epoch has
    changed it by less than `fraction` times the distance after the second epoch.

    Reference: Rachwan et al. 2022, arXiv:2206.10451, and their released code.
    """
    import torch

    notes, weights = moment.notes, _vector(moment.weights)
    if not notes:
        start = torch.zeros((), dtype=torch.float64, device=weights.device)
        return False, {"condition/distance": 0.0}, {"first_weights": weights, "distance": start}
    first = notes["first_weights"].double()
    distance = (weights.double() - first).norm() / first.norm()
    second = notes.get("second_distance", distance)
    change, threshold = float((distance - notes["distance"]).abs()), fraction * float(second)
    metrics = {"distance": float(distance), "change": change, "threshold": threshold}
    noted = notes | {"distance": distance, "second_distance": second}
    return change < threshold, {f"condition/{name}": value for name, value in metrics.items()}, noted


def masks_settle(moment: Moment, *, num_masks: int, max_distance: float) -> Held:
    """Whether the masks that the round would have chosen after the last `num_masks` epochs agree with the newest one.

    The distance of two masks is the share of the units that one keeps and the other prunes. For random masks of
    sparsity q it is 2 q (1 - q), which is recorded as `condition/chance`, beside the largest distance.

    Reference: You et al. 2020, arXiv:1909.11957, and their released code.
    """
    import torch

    newest = torch.cat([kept.flatten() for kept in moment.choose().values()])
    earlier = moment.notes.get("masks", newest[None][:0])[1 - num_masks :]
    density = float(newest.double().mean())
    metrics = {"condition/chance": 2 * density * (1 - density)}
    notes = {"masks": torch.cat([earlier, newest[None]])}
    if not len(earlier):
        return False, metrics, notes
    distance = float((earlier != newest).double().mean(1).max())
    holds = len(earlier) == num_masks - 1 and distance <= max_distance
    return holds, {"condition/distance": distance} | metrics, notes


def _vector(weights: Weights) -> Tensor:
    """All weights in one vector (N,), in the order of their indices, whatever their memory layout."""
    import torch

    return torch.cat([weight.flatten() for weight in weights.values()])
