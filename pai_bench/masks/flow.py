"""Repairs a mask so that signal flows through every channel: each output has an input, and each input an output."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pai_bench.core import Mask, Scores, Selection
from pai_bench.errors import ConfigError
from pai_bench.masks import masks

_PLAIN = torch.contiguous_format


def repaired(
    selection: Selection, scores: Scores, candidates: Mask, groups: Mapping[str, int] | None = None
) -> Selection:
    """The selection, with a weight for every output channel that had no input, and for every input that had no output.

    The weight is the candidate with the highest score there. As many weights are removed as came: those with the lowest
    scores whose output and input keep another one. They are removed from the same layer as long as it has such
    weights, and then from the others. So the number of weights stays. Then every weight that is added lies
    between an input and an output.

    Args:
        groups: of each layer; None: every layer has one. In convolutions in groups, every input of every group is one.

    Reference: Gadhikar et al. 2023, arXiv:2210.02412, for the repair of random masks.
    Deviates: they add a random weight, and the total changes.

    Raises:
        ConfigError: so few weights cannot serve all outputs and inputs, or no candidate is left for one of them.
    """
    layers = {
        name: _Layer(
            name,
            kept.clone(memory_format=_PLAIN),
            candidates[name],
            scores[name].contiguous(),
            1 if groups is None else groups[name],
        )
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
    kept: Tensor  # (O, I, ...) bool; I are the inputs of a group
    candidates: Tensor
    scores: Tensor
    groups: int
    outputs: list[int] = field(default_factory=list)  # weights of each output and of each input, once they are counted
    inputs: list[int] = field(default_factory=list)

    def connect(self) -> int:
        """Gives outputs and inputs that have no weight their best candidate, and returns the number of these."""
        before = masks.count(self.kept)
        for output in (~masks.connected(self.kept).any(1)).nonzero().flatten().tolist():
            self._serve(output, f"output {output}")
        per_group, num_in = len(self.kept) // self.groups, self.kept.shape[1]
        used = masks.connected(self.kept).reshape(self.groups, per_group, num_in).any(1)
        for group, within in (~used).nonzero().tolist():
            rows = slice(group * per_group, (group + 1) * per_group)
            self._serve((rows, within), f"input {group * num_in + within}")
        return masks.count(self.kept) - before

    def _serve(self, at: int | tuple[slice, int], what: str) -> None:
        """Keeps the best candidate of an output or an input, whose weights an index says."""
        here = self.candidates[at]
        if not here.any():
            raise ConfigError(
                f"repair=flow: no candidate is left for {what} of {self.name}; repair from the first round on"
            )
        best = torch.where(here, self.scores[at], -torch.inf).argmax()
        self.kept[at][torch.unravel_index(best, here.shape)] = True

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
            between = self.kept.flatten(2).sum(2) if self.kept.ndim > 2 else self.kept  # (O, I)
            self.outputs = between.sum(1).tolist()
            self.inputs = between.view(self.groups, -1, between.shape[1]).sum(1).flatten().tolist()
        num_out, num_in = self.kept.shape[:2]
        area = self.kept.numel() // (num_out * num_in)
        output = index // (num_in * area)
        of_input = output // (num_out // self.groups) * num_in + index // area % num_in
        if min(self.outputs[output], self.inputs[of_input]) == 1:
            return False
        self.kept.view(-1)[index] = False
        self.outputs[output] -= 1
        self.inputs[of_input] -= 1
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
