"""How a network is trained: the settings, how long they last, and the learning rate at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from pai_bench.core import Data, NonNegativeInt, Positive, ProperFraction, TrainingLength, num_steps

if TYPE_CHECKING:
    from pai_bench.training.optimizer import Method


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Durations are in epochs, a pass over the training split."""

    epochs: NonNegativeInt
    batch_size: Annotated[int, Ge(2)]
    lr: Annotated[float, Gt(0), Lt(3e38)]  # what float32 holds
    optimizer: Callable[[], Method]
    weight_decay: Annotated[float, Ge(0), Lt(3e38)]
    decay_norm_and_bias: bool  # False: weight decay on the weights of convolutions and linear layers alone
    lr_schedule: Literal["step", "cosine"]  # step: times lr_gamma at each of lr_milestones; cosine: to zero at the end
    lr_milestones: list[NonNegativeInt]
    lr_gamma: Annotated[float, Gt(0), Le(1)]
    warmup_epochs: NonNegativeInt  # the learning rate rises linearly from 0, step by step
    label_smoothing: ProperFraction
    temperature: Positive  # divides the logits in the loss
    precision: Literal["float32", "tfloat32", "bfloat16", "float16"]  # see devices.prepare
    compact: Literal["auto", "off"] = "auto"  # auto: train a smaller network where that saves work
    name: str = ""


def length(recipe: Recipe, data: Data) -> TrainingLength:
    """How long a recipe trains on a dataset."""
    steps = num_steps(data.num_examples["train"], recipe.batch_size)
    return TrainingLength(recipe.epochs, steps, last_rate_epochs(recipe))


def last_rate_epochs(recipe: Recipe) -> int:
    """For how many epochs at the end the learning rate is the last; 0 where it falls to zero."""
    if recipe.lr_schedule != "step":
        return 0
    last = max([drop for drop in recipe.lr_milestones if drop < recipe.epochs], default=0)
    return recipe.epochs - max(last, recipe.warmup_epochs)


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a time in epochs (a fraction within an epoch)."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * epoch / recipe.warmup_epochs
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.lr_gamma ** sum(epoch >= drop for drop in recipe.lr_milestones)
    done = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
