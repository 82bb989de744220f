"""How a network is trained: the settings, how long they last, and the learning rate at a time."""

import math
from dataclasses import dataclass

from pai_bench.core import Data, TrainingLength, num_steps
from pai_bench.training.optimizer import Method


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Durations are in epochs, a pass over the training split."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: Method
    weight_decay: float
    decay_norm_and_bias: bool  # False: weight decay on the weights of convolutions and linear layers alone
    lr_schedule: str  # "step": times lr_gamma at each of lr_milestones; "cosine": to zero at the end
    lr_milestones: list[int]
    lr_gamma: float
    warmup_epochs: int  # the learning rate rises linearly from 0, step by step
    label_smoothing: float
    temperature: float  # divides the logits in the loss
    precision: str  # float32, tfloat32 (see devices.prepare), or autocast to bfloat16 or float16


def length(recipe: Recipe, data: Data) -> TrainingLength:
    """How long a recipe trains on a dataset."""
    return TrainingLength(recipe.epochs, num_steps(data.num_examples["train"], recipe.batch_size))


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a time in epochs (a fraction within an epoch)."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * epoch / recipe.warmup_epochs
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.lr_gamma ** sum(epoch >= drop for drop in recipe.lr_milestones)
    done = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
