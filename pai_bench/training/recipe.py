"""How a network is trained: the settings, how long they last, and the learning rate at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from pai_bench.core import (
    Count,
    Data,
    NonNegative,
    NonNegativeInt,
    Positive,
    ProperFraction,
    TrainingLength,
    num_steps,
)

if TYPE_CHECKING:
    from pai_bench.training.optimizer import Method

_SIZE_STEP = 32  # pixels: networks halve an image five times


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Durations are in epochs, a pass over the training split."""

    epochs: NonNegativeInt
    batch_size: Annotated[int, Ge(2)]
    lr: Annotated[float, Gt(0), Lt(3e38)]  # what float32 holds
    optimizer: Callable[[], Method]
    weight_decay: Annotated[float, Ge(0), Lt(3e38)]
    decay_norm_and_bias: bool  # False: weight decay on the weights of convolutions and linear layers alone
    # step: times lr_gamma at each of lr_milestones; cosine and linear: to zero at the end
    lr_schedule: Literal["step", "cosine", "linear"]
    lr_milestones: list[NonNegativeInt]
    lr_gamma: Annotated[float, Gt(0), Le(1)]
    warmup_epochs: NonNegativeInt  # the learning rate rises linearly from 0, step by step
    label_smoothing: ProperFraction
    temperature: Positive  # divides the logits in the loss
    precision: Literal["float32", "tfloat32", "bfloat16", "float16"]  # see devices.prepare
    compact: Literal["auto", "off"] = "auto"  # auto: train a smaller network where that saves work
    # Progressive resizing: from the first to the last of these epochs, counted from 0, training images grow from the
    # first to the last of these sizes. None: images have the size of the dataset.
    image_sizes: list[Count] | None = None
    image_size_epochs: list[NonNegativeInt] | None = None
    batch_norm_l1: NonNegative = 0.0  # times the sign of a scale of a batch norm: is added to its gradient
    # uniform: in every step, scales and shifts of norms lie between ones and zeros and their values, at a point that is
    # drawn uniformly. None: they are as they are. See training/norms.py.
    norm_interpolation: Literal["uniform"] | None = None
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
    done = min(done, 1.0)
    return recipe.lr * (1 - done if recipe.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def image_size(recipe: Recipe, epoch: int) -> int | None:
    """Pixels of each side of the training images in an epoch, a multiple of 32; None where the recipe does not say.

    Sizes lie on straight lines between the epochs that the recipe names.

    Args:
        epoch: 0 is the first.
    """
    if not recipe.image_sizes or not recipe.image_size_epochs:
        return None
    points = list(zip(recipe.image_size_epochs, recipe.image_sizes, strict=True))
    size = float(points[0][1])
    for (start, low), (end, high) in itertools.pairwise(points):
        if epoch > start:
            size = low + (high - low) * min((epoch - start) / (end - start), 1.0)
    return round(size / _SIZE_STEP) * _SIZE_STEP


def unreached(recipe: Recipe) -> list[str]:
    """What a recipe says of epochs that it does not have, as after a change of its length: a line for each setting."""
    epochs, found = recipe.epochs, []
    late = [drop for drop in recipe.lr_milestones if drop >= epochs]
    if recipe.lr_schedule == "step" and late:
        found.append(f"training.lr_milestones={_listed(recipe.lr_milestones)}: there is no epoch {_listed(late)}")
    if recipe.warmup_epochs > epochs:
        found.append(f"training.warmup_epochs={recipe.warmup_epochs}: the learning rate never reaches training.lr")
    if recipe.image_sizes and recipe.image_size_epochs and image_size(recipe, epochs - 1) != recipe.image_sizes[-1]:
        said = f"images never have {recipe.image_sizes[-1]} pixels"
        found.append(f"training.image_size_epochs={_listed(recipe.image_size_epochs)}: {said}")
    return [f"{line} with training.epochs={epochs}; give others" for line in found] if epochs > 0 else []


def _listed(numbers: Sequence[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"
