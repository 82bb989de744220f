"""What the rounds of a search have reached."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from pai_bench.core import Mask, Scores, Weights


@dataclass(frozen=True)
class Pruned:
    """A mask and how it came about."""

    mask: Mask  # of the prunable weights
    units: Mask  # what was ranked: the weights, or the filters of each layer (O,)
    coupled: Mask = field(default_factory=dict)  # norms and biases that are pruned with their filters
    without_ablation: Mask | None = None  # the mask before an ablation changed it
    scores: Scores | None = None  # of the units in the last round; None: there was no round
    seconds: float = 0.0  # spent on scores and masks, without training
    num_examples: int = 0  # images that scores looked at, in all rounds
    flops: int = 0  # of the scores, in all rounds; a multiply-add counts two
    sparsities: list[float] = field(default_factory=list)  # of the prunable weights, after each round
    num_tied: list[int] = field(default_factory=list)  # for each round: candidates among which the order decided
    epoch: float | None = None  # of the recipe, at which the last round took place; None: there was no round
    condition_met: bool | None = None  # whether the conditions of all rounds held in time; None: they have none
    condition_flops: int = 0  # of scores that conditions asked for before the rounds
    moved: Weights | None = None  # the values that weights had when they were last kept; None: nobody asks for them

    @property
    def mask_with_coupled(self) -> Mask:
        """Everything that training has to keep at zero."""
        return self.mask | self.coupled

    def state(self) -> dict[str, Any]:
        """The fields as plain values, for a checkpoint."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "Pruned":
        """The record that `state` was taken from, its tensors on a device."""

        def on_device(value: Any) -> Any:
            return {name: tensor.to(device) for name, tensor in value.items()} if isinstance(value, dict) else value

        return cls(**{name: on_device(value) for name, value in state.items()})
