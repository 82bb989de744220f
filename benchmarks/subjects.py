"""What is measured: the parts of runs as the config composes them, on images made up here."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Generator, nn
from torch.nn import functional as F

from benchmarks.measure import Rates
from pai_bench import assembly
from pai_bench.analysis.cost import CountFlops
from pai_bench.assembly import Parts
from pai_bench.core import Call, DataSettings, Mask, Subnetwork
from pai_bench.data.resident import Resident
from pai_bench.launch import compose
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.rounds import prune
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


def synthetic(place: DataSettings, *, size: int, num_classes: int, num_train: int, num_test: int) -> Resident:
    """A resident dataset of noise, in CIFAR's size unless told otherwise, with next to nothing to evaluate on."""
    train, test = pixels(num_train, size), pixels(num_test, size)
    labels = np.arange(num_train) % num_classes
    return Resident(
        (train, labels),
        (test, np.arange(num_test) % num_classes),
        num_classes,
        place,
        validation=0.0,
        mean=MEAN,
        std=STD,
        padding=4,
        flip=True,
    )


def parts(
    device: torch.device,
    *overrides: str,
    size: int = 32,
    num_classes: int = 10,
    num_train: int = 256,
    num_test: int = 2,
) -> Parts:
    """The parts of the run that `python run.py *overrides` describes, on synthetic images."""
    settings = {"size": size, "num_classes": num_classes, "num_train": num_train, "num_test": num_test}
    dataset = Call("benchmarks.subjects.synthetic", settings, "synthetic")
    run = replace(compose.compose(["tracker=none", f"device={device}", *overrides]), dataset=dataset)
    devices.prepare(device, run.training.precision)
    return assembly.assembled(run, device)


def ignore(metrics: dict[str, float], epoch: float) -> None:
    """Records nothing."""


def trainer(of: Parts, record: Callable[[dict[str, float], float], None] = ignore) -> Trainer:
    """The trainer of a run, with a freshly drawn network."""
    return assembly.trainer_for(of, of.build("init"), record)


def pruned(of: Parts, training: Trainer) -> Pruned:
    """The mask that a run finds, whose trainer this is."""
    model = training.model
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return prune(
        model,
        of.pruner,
        of.allocate(model),
        of.rounds,
        ablation=of.run.ablation,
        initial=initial,
        input_shape=of.data.input_shape,
        draw=of.data.draw,
        training=training,
        loss=F.cross_entropy,
        seed=of.run.seed,
        record=ignore,
        build=lambda: of.run.model(of.data.input_shape, of.data.num_classes),
    )


def subnetwork(of: Parts, model: nn.Module, mask: Mask) -> Subnetwork:
    """What a score is given."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in mask}
    return Subnetwork(model, mask, weights, of.data.input_shape)


Noted = TypeVar("Noted")
_LONG = 1_000_000  # steps, so that a compact network is looked for


class Steps(Generic[Noted]):
    """Steps of training on one batch under a mask, a few at each call, as a long run takes them.

    Args:
        note: called before the first step and after each.
    """

    def __init__(self, of: Parts, mask: Mask, num_steps: int, note: Callable[[], Noted]) -> None:
        self.batch = next(of.data.train(of.run.training.batch_size, Generator(), Generator()))
        self.network = trainer(of).network
        self.network.apply_mask(mask)
        self._num_steps, self._note = num_steps, note

    def __call__(self) -> list[Noted]:
        """Takes the steps and returns what was noted."""
        images, labels = self.batch
        with self.network.training_for(_LONG * len(labels)) as step:
            step.net.train()
            notes = [self._note()]
            for _ in range(self._num_steps):
                step(images, labels, len(labels))
                notes.append(self._note())
        return notes


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
