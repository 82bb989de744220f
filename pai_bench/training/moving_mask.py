"""A mask that moves while a network trains, and what is known about its way."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pai_bench.core import Mask, TrainingLength, Weights
from pai_bench.errors import UserError
from pai_bench.masks import masks
from pai_bench.rewiring.rewire import RewireProgress
from pai_bench.system import distributed, seeding
from pai_bench.training.rewires import Rewiring, rewire_steps, steps_early
from pai_bench.training.step import Step


@dataclass
class Way:
    """Sums over the way of a mask, from which a run's costs and curves follow."""

    since: int  # the clock up to which steps are counted
    num_rewires: int = 0
    churn: float = 0.0  # sum over rewires: the fraction of the kept weights that were dropped
    churn_of_epoch: float = 0.0
    num_of_epoch: int = 0
    num_steps: int = 0
    dense_steps: int = 0  # that computed the gradients of all weights
    densities: dict[str, float] = field(default_factory=dict)  # of each layer, summed over steps
    sparse_densities: dict[str, float] = field(default_factory=dict)  # over the steps that are not dense_steps


class MovingMask:
    """Moves the mask of a network at the steps that `Rewiring` names, and takes these steps itself.

    Args:
        rewire: with a rule.
        start: of the prunable weights, which training starts from.
        keep: the number of weights in the last mask.
        unmasked: the weights before the start mask pruned some. A rule whose weights return with a value needs them.
        clock: the step from which on it moves.

    Raises:
        ConfigError: there is no step at which it moves.
    """

    def __init__(
        self,
        rewire: Rewiring,
        start: Mask,
        *,
        keep: int,
        length: TrainingLength,
        seed: int,
        unmasked: Weights,
        clock: int = 0,
    ) -> None:
        self._rewire, self.keep, self._seed, self._unmasked = rewire, keep, seed, unmasked
        self.mask = start
        self.explored = {name: kept.clone() for name, kept in start.items()}
        self._kept_at_start = dict(zip(start, masks.counts(start), strict=True))
        self._values: Weights = {}  # of pruned weights, when they were pruned
        self._steps = rewire_steps(rewire, length)
        self._total = length.epochs * length.steps_per_epoch
        self._early = steps_early(rewire)
        self._begins = -self._early if rewire.begin is None else self._steps[0]
        self._ends = self._steps[-1]
        if rewire.at is None:
            self._ends = min(round(rewire.end * self._total) - self._early, self._total - 1)
        self._num_due = {step: number for number, step in enumerate(self._steps, start=1)}
        self.way = Way(clock)

    def begin(self, step: Step, state: dict[str, Any] | None) -> None:
        """Prepares a step, and goes on from what `state` returned."""
        parameters = dict(step.net.named_parameters())
        if self._rewire.revive == "value":
            self._values = {
                name: torch.where(kept, parameters[name].detach(), self._unmasked[name])
                for name, kept in self.mask.items()
            }
        if self._rewire.momentum is not None:
            step.average_gradients(self.mask, self._rewire.momentum)
        if state is None:
            return
        self.mask = {name: state["mask"][name].to(kept.device) for name, kept in self.mask.items()}
        self.way = Way(**state["way"])
        for name, kept in self.explored.items():
            kept.copy_(state["explored"][name])
        for tensors, key in ((self._values, "values"), (step.averages, "averages")):
            for name, tensor in tensors.items():
                tensor.copy_(state[key][name])

    def state(self, step: Step) -> dict[str, Any]:
        """What `begin` goes on from. Tensors are those in use, not copies."""
        return {
            "mask": self.mask,
            "way": asdict(self.way),
            "explored": self.explored,
            "values": self._values,
            "averages": step.averages,
        }

    def is_due(self, clock: int) -> bool:
        """Whether the mask moves at this step."""
        return clock in self._num_due

    def step(self, step: Step, images: Tensor, labels: Tensor, num_images: int, clock: int) -> None:
        """Takes the step at which the mask moves. Arguments as in `Step`.

        Raises:
            UserError: the gradients are not finite.
        """
        step.backward(images, labels, num_images)
        gradients: Weights = {}
        if self._rewire.gradients:
            found = step.gradients(self.mask)
            gradients = {
                name: found[name].clone() if name in found else torch.zeros_like(kept, dtype=torch.float32)
                for name, kept in self.mask.items()
            }
        if not self._rewire.skip_step:
            step.update()
        self._count(self.way, clock, rewires=True)
        self._move(step, gradients, clock)

    @torch.no_grad()
    def _move(self, step: Step, gradients: Weights, clock: int) -> None:
        rewire, before = self._rewire, self.mask
        parameters = dict(step.net.named_parameters())
        weights = {name: parameters[name].detach() for name in before}
        if self._values:
            weights = {name: torch.where(kept, weights[name], self._values[name]) for name, kept in before.items()}
        ranked = [*weights.values(), *gradients.values(), *step.averages.values()]
        if not torch.stack([value.isfinite().all() for value in ranked]).all():
            raise UserError(
                f"rewire={rewire.name}: weights or gradients are not finite at step {clock}; lower training.lr"
            )
        assert rewire.rule is not None
        generator = seeding.generator(self._seed, "rewire", clock)
        after: Mask = rewire.rule(weights, gradients, step.averages, before, self._progress(clock), generator)
        after = distributed.from_first(after)
        self._check(before, after, clock)
        if self._values:
            for name, value in weights.items():
                self._values[name].copy_(value)
        step.optimizer.apply_mask(after, moves=True)
        if rewire.forget == "all" and any((after[name] & ~kept).any() for name, kept in before.items()):
            step.optimizer.load_state({})
        for name, values in self._values.items():
            parameters[name].copy_(torch.where(after[name] & ~before[name], values, parameters[name]))
        self._note(before, after, clock)
        self.mask = after

    def _progress(self, clock: int) -> RewireProgress:
        return RewireProgress(
            number=self._num_due[clock],
            last=clock == self._steps[-1],
            time=(clock + self._early) / self._total,
            fraction=(clock - self._begins) / max(self._ends - self._begins, 1),
            kept_at_start=self._kept_at_start,
            keep=self.keep,
        )

    def _check(self, before: Mask, after: Mask, clock: int) -> None:
        """Refuses what is no mask of this network, or has not the number of the end at the end."""
        shapes, wanted = ({name: (kept.shape, kept.dtype) for name, kept in mask.items()} for mask in (after, before))
        if shapes != wanted:
            raise UserError(f"rewire={self._rewire.name}: its rule returns no mask of this network; correct it")
        if clock == self._steps[-1] and masks.kept(after) != self.keep:
            raise UserError(
                f"rewire={self._rewire.name}: its last mask keeps {masks.kept(after)} weights, not {self.keep}; "
                "choose a rule that reaches this number, or leave rewire.start_sparsity out"
            )

    def _note(self, before: Mask, after: Mask, clock: int) -> None:
        way = self.way
        churn = masks.kept({name: kept & ~after[name] for name, kept in before.items()}) / masks.kept(before)
        way.num_rewires += 1
        way.churn += churn
        way.num_of_epoch += 1
        way.churn_of_epoch += churn
        for name, kept in after.items():
            self.explored[name] |= kept

    def _count(self, way: Way, clock: int, *, rewires: bool) -> None:
        """Counts the steps up to a time on the clock, and the step at which the mask moves if it does so then."""
        plain, dense = clock - way.since, int(rewires)
        if self._rewire.momentum is not None:
            plain, dense = 0, plain + dense
        elif not self._rewire.gradients:
            plain, dense = plain + dense, 0
        for name, density in masks.densities(self.mask).items():
            way.densities[name] = way.densities.get(name, 0.0) + (plain + dense) * density
            way.sparse_densities[name] = way.sparse_densities.get(name, 0.0) + plain * density
        way.num_steps += plain + dense
        way.dense_steps += dense
        way.since = clock + int(rewires)

    def metrics(self) -> dict[str, float]:
        """What the curve says about an epoch, which ends with this call."""
        way = self.way
        found = {
            "rewire/density": 1 - masks.sparsity(self.mask),
            "rewire/explored": 1 - masks.sparsity(self.explored),
            "rewire/churn": way.churn_of_epoch / max(way.num_of_epoch, 1),
        }
        way.churn_of_epoch, way.num_of_epoch = 0.0, 0
        return found

    def multiply_adds(self, macs: Mapping[str, int], clock: int) -> float:
        """Of a training step for one image, as a mean over the steps: forward, and backward twice.

        A step that needs the gradients of all weights computes them as for a dense network.

        Args:
            macs: of one pass through the dense network, by layer.
            clock: the end of the training.
        """
        way = deepcopy(self.way)
        self._count(way, clock, rewires=False)
        if not way.num_steps:
            return 0.0
        total = 0.0
        for name, number in macs.items():
            forward = way.densities.get(name, way.num_steps)
            sparse = way.sparse_densities.get(name, way.num_steps - way.dense_steps)
            total += number * (2 * forward + sparse + way.dense_steps)
        return total / way.num_steps
