"""Small random images, and training on them: data, a recipe, a mask and a trainer."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from pai_bench.core import Batch, Batches, Mask, ScoringData
from pai_bench.masks import masks
from pai_bench.training.optimizers.sgd import sgd
from pai_bench.training.recipe import Recipe
from pai_bench.training.recording import Observers
from pai_bench.training.step import Execution
from pai_bench.training.trainer import Trainer

CPU = torch.device("cpu")


class FewImages:
    """A core.Data of forty small random images."""

    input_shape, num_classes, checksum = (3, 8, 8), 4, ""

    def __init__(self, validation: int = 0) -> None:
        generator = Generator().manual_seed(0)
        self.images = torch.randn(40, 3, 8, 8, generator=generator)
        self.labels = torch.randint(4, (40,), generator=generator)
        self.num_examples = {"train": 40, "validation": validation, "test": 10}

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        permutation = torch.randperm(40, generator=order)
        noise = 0.1 * torch.randn(40, 3, 8, 8, generator=augment)
        for part in permutation.split(batch_size)[start:]:
            yield self.images[part] + noise[part], self.labels[part]

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        for i in range(0, self.num_examples[split], batch_size):
            part = slice(i, min(i + batch_size, self.num_examples[split]))
            yield self.images[part], self.labels[part]

    def draw(self, examples: ScoringData, generator: Generator, dtype: torch.dtype) -> Batches:
        return [(self.images.to(dtype), self.labels)]


RECIPE = Recipe(
    epochs=3,
    batch_size=8,
    lr=0.1,
    optimizer=partial(sgd, momentum=0.9, nesterov=True),
    weight_decay=5e-4,
    decay_norm_and_bias=False,
    lr_schedule="step",
    lr_milestones=[2],
    lr_gamma=0.1,
    warmup_epochs=0,
    label_smoothing=0.1,
    temperature=1.0,
    precision="float32",
)


def half(model: nn.Module) -> masks.Mask:
    generator = Generator().manual_seed(0)
    return {n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in masks.prunable(model).items()}


def trainer(model: nn.Module, recipe: Recipe = RECIPE, data: Any = None, **settings: Any) -> Trainer:
    """A trainer of few images; the settings are those of Execution, Observers and Trainer."""
    execution = {"device": CPU, "channels_last": False, "compile_model": False, "capture": True}
    observers = {
        "record": lambda metrics, epoch: None, "diagnose": None, "checkpoint": lambda epoch_ended: None,
        "validate_every": None,
    }  # fmt: skip
    others = {"seed": 0, "compact_training": False, "keep_epochs": ()}
    unknown = settings.keys() - execution.keys() - observers.keys() - others.keys()
    assert not unknown, unknown

    def given(defaults: dict[str, Any]) -> dict[str, Any]:
        return {key: settings.get(key, value) for key, value in defaults.items()}

    data = data or FewImages()
    return Trainer(model, data, recipe, Execution(**given(execution)), Observers(**given(observers)), **given(others))


SHAPE = (3, 8, 8)


def same(one: Mask, other: Mask) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def random_batches(number: int = 10, size: int = 16, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = Generator().manual_seed(1)
    return [
        (torch.randn(size, *SHAPE, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(number)
    ]
