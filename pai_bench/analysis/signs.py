"""Signs of weights: how many of them training changes."""

from dataclasses import dataclass

import torch
from torch import nn

from pai_bench.core import Mask, Weights
from pai_bench.masks import masks


@dataclass(frozen=True)
class Agreement:
    """The share of the kept weights that have the sign with which training began. None: nothing was kept all along."""

    overall: float | None
    layers: dict[str, float | None]


def of(model: nn.Module) -> Weights:
    """The signs of all weights that can be pruned: -1, 0 or 1, as int8."""
    return {name: weight.detach().sign().to(torch.int8) for name, weight in masks.prunable(model).items()}


def agreement(before: Weights, model: nn.Module, mask: Mask) -> Agreement:
    """How many of the kept weights have the same sign as before.

    Weights that were zero before, such as those that a moving mask has brought, do not count.

    Args:
        before: the signs, as `of` returns them.
        mask: which weights count.
    """
    now = of(model)
    counted = {name: kept & (before[name] != 0) for name, kept in mask.items()}
    same = {name: counted[name] & (before[name] == now[name]) for name in mask}
    numbers = dict(zip(mask, zip(masks.counts(same), masks.counts(counted), strict=True), strict=True))
    total = masks.kept(counted)
    layers = {name: equal / all_of if all_of else None for name, (equal, all_of) in numbers.items()}
    return Agreement(sum(equal for equal, _ in numbers.values()) / total if total else None, layers)
