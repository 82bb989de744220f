"""Images per second of the loader alone, of training alone, and of both together."""

import itertools
import time
from collections.abc import Generator as Source
from collections.abc import Iterator
from contextlib import closing
from typing import cast

import torch
from torch import Generator

from pai_bench import assembly
from pai_bench.assembly import Parts
from pai_bench.config.schema import RunConfig
from pai_bench.core import Batch, Data, num_steps
from pai_bench.errors import ConfigError
from pai_bench.system import devices, seeding
from pai_bench.system.world import world
from pai_bench.training.step import Execution, Step
from pai_bench.training.steps import Steps

_FIRST_STEPS = 2  # not measured: they compile, choose algorithms and start the processes that decode
_WARM_UP = 0.5  # share of the measured time; it uses up the images that were decoded during the first steps


def measure(run: RunConfig, seconds: float) -> dict[str, float]:
    """Images per second of the `loader` alone, of `training` alone on one batch, and of `both`.

    Args:
        run: the config of the run.
        seconds: how long each of the three is measured. Before that it warms up for half of this time.

    Raises:
        UserError: the same errors as of a run before training.
    """
    if (size := world().size) > 1:
        raise ConfigError(f"throughput is measured in one process, and these are {size}; start one")
    device = devices.pick(run.device, world())
    devices.check_precision(run.training.precision, device)
    devices.prepare(device, run.training.precision)
    parts = assembly.assembled(run, device)
    return {
        "loader": _rate(device, seconds, (len(labels) for _, labels in _loaded(parts))),
        "training": _rate(device, seconds, _trained(parts, cast(Data, _OneBatch(parts)))),
        "both": _rate(device, seconds, _trained(parts, parts.data)),
    }


def _loaded(parts: Parts) -> Source[Batch]:
    """The training batches of one epoch after another, without end."""
    for epoch in itertools.count(1):
        yield from parts.data.train(parts.run.training.batch_size, *_random(parts, epoch))


def _random(parts: Parts, epoch: int) -> tuple[Generator, Generator]:
    """What decides the order of an epoch, and its augmentation."""
    order, augment = (seeding.generator(parts.run.seed, name, epoch) for name in ("order", "augment"))
    return order, augment


class _OneBatch:
    """A dataset whose batches are the first batch of another dataset, again and again."""

    def __init__(self, parts: Parts) -> None:
        self.num_examples = parts.data.num_examples
        with closing(_loaded(parts)) as batches:
            self._batch = next(batches)

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        """As of a core.Data."""
        return itertools.repeat(self._batch, num_steps(self.num_examples["train"], batch_size) - start)


def _trained(parts: Parts, data: Data) -> Source[int]:
    """Trains the dense network as a run does. One step at each turn, and the number of its images."""
    run = parts.run
    execution = Execution(parts.device, channels_last=run.channels_last, compile_model=run.compile)
    step = Step(parts.build("init"), run.training, execution)
    steps = Steps(data, run.training, execution, step)
    per_epoch = num_steps(data.num_examples["train"], run.training.batch_size)
    for epoch in itertools.count():
        step.net.train()
        norms = seeding.generator(run.seed, "norms", epoch + 1) if run.training.norm_interpolation else None
        yield from steps.taken(step, epoch * per_epoch, *_random(parts, epoch + 1), interpolation=norms)


def _rate(device: torch.device, seconds: float, turns: Source[int]) -> float:
    """How many images per second are used.

    Args:
        turns: uses a batch at each turn, and says how many images it has.
    """
    rate = 0.0
    with closing(turns):
        for _ in itertools.islice(turns, _FIRST_STEPS):
            pass
        for period in (_WARM_UP * seconds, seconds):
            devices.wait(device)
            num_images, started = 0, time.perf_counter()
            while time.perf_counter() - started < period:
                num_images += next(turns)
            devices.wait(device)
            rate = num_images / (time.perf_counter() - started)
    return rate
