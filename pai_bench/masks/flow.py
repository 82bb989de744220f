"""Repairs a mask so that signal flows through every channel: each output has an input, and each input an output."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pai_bench.core import Mask, Scores, Selection
from pai_bench.errors import ConfigError
from pai_bench.masks import masks

_PLAIN = torch.contiguous_format


def repaired(selection: Selection, scores: Scores, candidates: Mask) -> Selection:
    """The selection, with a weight for every output channel that had no input, and for every input that had no output.

    The weight is the candidate with the highest score there. As many weights are removed as came: those with the lowest
    scores whose output and input keep another one. They are removed from the same layer as long as it has such
    weights, and then from the others. So the number of weights stays. Then every kept weight lies on a path.

    Reference: Gadhikar et al. 2023, arXiv:2210.02412, for the repair of random masks.
    Deviates: they add a random weight, and the total changes. In convolutions in groups, inputs are those of a group.

    Raises:
        ConfigError: so few weights cannot serve all outputs and inputs, or no candidate is left for one of them.
    """
    layers = {
        name: _Layer(name, kept.clone(memory_format=_PLAIN), candidates[name], scores[name].contiguous())
        for name, kept in selection.mask.items()
    }
    surplus = 0
    for layer in layers.values():
        added = layer.connect()
        surplus += added - layer.remove(added)
    if surplus:
        surplus -= _remove_anywhere(layers, surplus)
    if surplus:
        needed = masks.kept({name: layer.kept for name, layer in layers.items()})
        raise ConfigError(
            f"repair=flow: the mask is to keep {needed - surplus} weights, and outputs and inputs need {needed}; lower "
            "the sparsity, or give repair=null"
        )
    return replace(selection, mask={name: layer.kept for name, layer in layers.items()})


@dataclass
class _Layer:
    """The mask of a layer while it is repaired."""

    name: str
    kept: Tensor  # (O, I, ...) bool
    candidates: Tensor
    scores: Tensor
    outputs: list[int] = field(default_factory=list)  # weights of each output and of each input, once they are counted
    inputs: list[int] = field(default_factory=list)

    def connect(self) -> int:
        """Gives outputs and inputs that have no weight their best candidate, and returns the number of these."""
        before = masks.count(self.kept)
        for dimension in (0, 1):
            used = masks.connected(self.kept).any(1 - dimension)
            for channel in (~used).nonzero().flatten().tolist():
                here = self.candidates.select(dimension, channel)
                if not here.any():
                    what = ("output", "input")[dimension]
                    raise ConfigError(
                        f"repair=flow: no candidate is left for {what} {channel} of {self.name}; repair from the first "
                        "round on"
                    )
                best = torch.where(here, self.scores.select(dimension, channel), -torch.inf).argmax()
                self.kept.select(dimension, channel)[torch.unravel_index(best, here.shape)] = True
        return masks.count(self.kept) - before

    def remove(self, number: int) -> int:
        """Removes up to so many weights, the lowest scores first, and returns how many."""
        removed = 0
        for index in self.by_score() if number else []:
            if removed == number:
                break
            removed += self.drop(index)
        return removed

    def by_score(self) -> list[int]:
        """The flat indices of the kept weights, from the lowest score to the highest; of equal ones the last first."""
        at = self.kept.flatten().nonzero().flatten().flip(0)
        found: list[int] = at[self.scores.flatten()[at].sort(stable=True).indices].tolist()
        return found

    def drop(self, index: int) -> bool:
        """Removes a weight if its output and its input keep another one, and says whether it did."""
        if not self.outputs:
            dims = list(range(self.kept.ndim))
            self.outputs = self.kept.sum(dims[1:]).tolist()
            self.inputs = self.kept.sum([0, *dims[2:]]).tolist()
        num_out, num_in = self.kept.shape[:2]
        area = self.kept.numel() // (num_out * num_in)
        output, within = index // (num_in * area), index // area % num_in
        if min(self.outputs[output], self.inputs[within]) == 1:
            return False
        self.kept.view(-1)[index] = False
        self.outputs[output] -= 1
        self.inputs[within] -= 1
        return True


def _remove_anywhere(layers: dict[str, _Layer], number: int) -> int:
    """Removes up to so many weights of all layers, the lowest scores first, and returns how many."""
    order = [
        (float(layer.scores.flatten()[index]), -place, -index, layer)
        for place, layer in enumerate(layers.values())
        for index in layer.by_score()
    ]
    removed = 0
    for _, _, index, layer in sorted(order, key=lambda entry: entry[:3]):
        if removed == number:
            break
        removed += layer.drop(-index)
    return removed
