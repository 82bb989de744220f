"""What is measured: the parts of runs as the config composes them, on images made up here."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Generator, nn
from torch.nn import functional as F

from benchmarks.measure import Rates
from pai_bench import experiment
from pai_bench.analysis.cost import CountFlops
from pai_bench.core import Batch, Batches, Change, Data, DataSettings, Mask, ScoringData, Shape, Subnetwork
from pai_bench.data.resident import Resident
from pai_bench.experiment import Parts
from pai_bench.launch import compose
from pai_bench.pruning.rounds import Pruned, prune
from pai_bench.system import devices
from pai_bench.training.trainer import Trainer

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]


@dataclass(frozen=True)
class Setting:
    """What every benchmark is told."""

    device: torch.device
    rates: Rates
    quick: bool = False  # everything runs, too little for figures
    full: bool = False  # as long as the experiments of the papers

    @property
    def fast_bfloat16(self) -> bool:
        """Whether bfloat16 is computed in earnest here, and not by way of float32."""
        return self.rates.convolution["bfloat16"] > 1.3 * self.rates.convolution["float32"]


def pixels(number: int, size: int) -> np.ndarray:
    """Images (N, H, W, 3) uint8 of noise."""
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def synthetic(place: DataSettings, *, size: int, num_classes: int, num_train: int) -> Resident:
    """A resident dataset of noise, in CIFAR's size unless told otherwise, with next to nothing to evaluate on."""
    train, test = pixels(num_train, size), pixels(2, size)
    labels = np.arange(num_train) % num_classes
    return Resident(
        (train, labels), (test, labels[:2]), num_classes, place,
        validation=0.0, mean=MEAN, std=STD, padding=4, flip=True,
    )  # fmt: skip


def parts(device: torch.device, *overrides: str, size: int = 32, num_classes: int = 10, num_train: int = 256) -> Parts:
    """The parts of the run that `python run.py *overrides` describes, on synthetic images."""
    cfg = compose.compose(["tracker=none", f"device={device}", *overrides])
    cfg["dataset"] = {
        "name": "synthetic", "_target_": "benchmarks.subjects.synthetic",
        "size": size, "num_classes": num_classes, "num_train": num_train,
    }  # fmt: skip
    devices.prepare(device, cfg["training"]["precision"])
    return experiment.assembled(cfg, device)


def ignore(metrics: dict[str, float], epoch: float) -> None:
    """Records nothing."""


def trainer(of: Parts, record: Callable[[dict[str, float], float], None] = ignore) -> Trainer:
    """The trainer of a run, with a freshly drawn network."""
    return experiment.trainer_for(of, of.build("init"), record)


def pruned(of: Parts, training: Trainer) -> Pruned:
    """The mask that a run finds, whose trainer this is."""
    model = training.model
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return prune(
        model, of.pruner, of.allocate, of.rounds, ablation=of.ablation, initial=initial,
        input_shape=of.data.input_shape, draw=of.data.draw, training=training, loss=F.cross_entropy,
        seed=of.cfg["seed"], record=ignore,
    )  # fmt: skip


def subnetwork(of: Parts, model: nn.Module, mask: Mask) -> Subnetwork:
    """What a score is given."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in mask}
    return Subnetwork(model, mask, weights, of.data.input_shape)


Noted = TypeVar("Noted")
_ENDLESS = 1_000_000  # steps of an epoch, so that a trainer expects a long run and no epoch ends


class _EnoughError(Exception):
    """Ends training after the steps that were asked for."""


class Repeated(Generic[Noted]):
    """A core.Data of one batch, again and again, that notes something before the first step and after each."""

    def __init__(self, data: Data, batch: Batch, num_steps: int, note: Callable[[], Noted]) -> None:
        self.input_shape: Shape = data.input_shape
        self.num_classes, self.checksum = data.num_classes, data.checksum
        self.data, self.batch, self.num_steps, self.note = data, batch, num_steps, note
        self.num_examples = {"train": _ENDLESS * len(batch[1]), "validation": 0, "test": 2}
        self.notes: list[Noted] = []

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        """The batch, once for each step.

        Raises:
            _EnoughError: the steps are taken.
        """
        self.notes = [self.note()]
        for _ in range(self.num_steps):
            yield self.batch
            self.notes.append(self.note())
        raise _EnoughError

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Two images."""
        images, labels = self.batch
        yield images[:2], labels[:2]

    def draw(
        self, examples: ScoringData, generator: Generator, dtype: torch.dtype, change: Change | None = None
    ) -> Batches:
        """Training images for scoring, as the dataset draws them."""
        return self.data.draw(examples, generator, dtype, change)


class Steps(Generic[Noted]):
    """Steps of training as a long run takes them, a few at each call, under a mask.

    Args:
        note: called before the first step and after each.
    """

    def __init__(self, of: Parts, mask: Mask, num_steps: int, note: Callable[[], Noted]) -> None:
        batch = next(of.data.train(of.recipe.batch_size, Generator(), Generator()))
        self.data = Repeated(of.data, batch, num_steps, note)
        self.trainer = experiment.trainer_for(replace(of, data=self.data), of.build("init"), ignore)
        self.mask = mask

    def __call__(self) -> list[Noted]:
        """Takes the steps, and returns what was noted."""
        with suppress(_EnoughError):
            self.trainer.until(self.mask, 1)
        return self.data.notes


def step_seconds(steps: Steps[float]) -> float:
    """Takes steps that note the time, and returns the shortest: what disturbs a step only makes it longer."""
    noted = steps()
    return min(after - before for before, after in itertools.pairwise(noted))


def clock() -> float:
    """The time, for `Steps`."""
    return time.perf_counter()


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in a function, two for a multiply-add."""
    counter = CountFlops()
    with counter:
        function()
    return counter.flops
