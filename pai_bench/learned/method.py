"""What a method of learning a mask consists of. Each method is a file beside this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from pai_bench.core import Mask, Scores, TrainingLength, Weights


@dataclass(frozen=True)
class Occasion:
    """One of the times at which a method changes something between two steps."""

    number: int  # 1 is the first
    total: int  # how often it happens in the whole search
    redraw: Callable[[], Weights]  # draws the weights anew by the network's own law; `Method.weights` is applied
    generator: Generator  # of this occasion, on the CPU


class Searched(Protocol):
    """What an event finds: a network whose mask is being learned."""

    num_kept: int  # weights that the search keeps in the end

    @property
    def weights(self) -> Weights:
        """The frozen weights; not copies."""

    @property
    def candidates(self) -> Mask:
        """The weights that may be chosen; not copies."""

    def strengths(self) -> Scores:
        """What is ranked: higher = keep."""

    def mask(self) -> Mask:
        """The mask that the scores choose now."""


@dataclass(frozen=True)
class Event:
    """Something that happens between two steps."""

    # After how many steps, in rising order, before the last step. It refuses a training without any.
    steps: Callable[[TrainingLength], Sequence[int]]
    happen_: Callable[[Searched, Occasion], None]  # changes the network in place; a function of its arguments


def same_values(weight: Tensor, kept: Tensor) -> Tensor:
    """The weights themselves."""
    return weight


def same_scores(scores: Tensor) -> Tensor:
    """The scores themselves."""
    return scores


@dataclass(frozen=True)
class Method:
    """How scores begin, which weights they choose, and what values these have."""

    draw: Callable[[Tensor, Generator], Tensor]  # the first scores of a weight, on the CPU
    weights: Callable[[Tensor, float], Tensor]  # the frozen values: from those drawn and the density of the layer
    strength: Callable[[Tensor], Tensor] = torch.abs  # of scores: what is ranked
    threshold: float | None = None  # None: the strongest are chosen. Otherwise those above it, until the search ends
    limits: tuple[float, float] | None = None  # between which scores stay
    values: Callable[[Tensor, Tensor], Tensor] = same_values  # of a ticket, from frozen values and the mask
    event: Event | None = None
