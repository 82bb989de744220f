"""Asks the condition of a round after every epoch of the training before it, and keeps what a checkpoint needs."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pai_bench.analysis.cost import CountFlops
from pai_bench.core import Condition, Mask, Round, Training, Weights
from pai_bench.pruning.conditions import Moment
from pai_bench.pruning.pruned import Pruned
from pai_bench.system import devices, distributed

log = logging.getLogger(__name__)


class ConditionWatch:
    """A core.Watch that ends the training before a round where the condition of the round holds.

    Of several processes the first decides.

    Args:
        weights: the prunable weights as they are now.
        choose: the units that the round would keep now.
    """

    def __init__(self, condition: Condition, weights: Callable[[], Weights], choose: Callable[[], Mask]) -> None:
        self._condition, self._weights, self._choose = condition, weights, choose
        self.state: dict[str, Any] = {"ended": False, "notes": {}, "seconds": 0.0, "flops": 0}

    @property
    def ended(self) -> bool:
        """Whether the condition holds."""
        return bool(self.state["ended"])

    @property
    def seconds(self) -> float:
        """Time that the condition has taken, in all epochs."""
        return float(self.state["seconds"])

    @property
    def flops(self) -> int:
        """Operations of the scores that the condition has asked for, in all epochs."""
        return int(self.state["flops"])

    def __call__(self) -> dict[str, float]:
        """Asks the condition, and returns what it has measured."""
        started, counter = time.perf_counter(), CountFlops()
        weights = self._weights()
        device = next(iter(weights.values())).device
        notes = {name: tensor.to(device) for name, tensor in self.state["notes"].items()}
        with counter:
            holds, metrics, notes = self._condition.holds(Moment(weights, self._choose, notes))
        ended, agreed = distributed.agree(lambda: (holds, metrics))
        devices.wait(device)
        seconds = self.seconds + time.perf_counter() - started
        self.state = {"ended": ended, "notes": notes, "seconds": seconds, "flops": self.flops + counter.flops}
        return agreed


def train_before(
    number: int,
    goal: Round,
    before: Pruned,
    training: Training,
    weights: Callable[[], Weights],
    choose: Callable[[], Mask],
) -> ConditionWatch | None:
    """Trains as far as a round asks, or until its condition holds, and says in the log which of both it was.

    Args:
        number: of the round, from 1.
        before: what the rounds so far have reached.
        weights: the prunable weights as they are now.
        choose: the units that the round would keep now.
    """
    watch = None if goal.when is None else ConditionWatch(goal.when, weights, choose)
    training.until(before.mask_with_coupled, goal.until_epoch, watch)
    if watch is None:
        return None
    if watch.ended:
        log.info("round %d: its condition holds, at epoch %.4g", number, training.epoch)
    else:
        late = "round %d: its condition has not held by epoch %.4g, the latest time for this round; it takes place now"
        log.warning(late, number, training.epoch)
    return watch


def timed(pruned: Pruned, before: Pruned, watch: ConditionWatch | None, epoch: float) -> Pruned:
    """What has been reached with a round, with its time, and with what it has cost to find that time.

    Args:
        epoch: the recipe's clock at the round.
    """
    pruned = replace(pruned, epoch=epoch, condition_met=before.condition_met, condition_flops=before.condition_flops)
    if watch is None:
        return pruned
    return replace(
        pruned,
        condition_met=watch.ended and before.condition_met is not False,
        condition_flops=before.condition_flops + watch.flops,
        seconds=pruned.seconds + watch.seconds,
    )
