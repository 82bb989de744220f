"""Images per second of the loader alone, of training alone, and of both together."""

import itertools
import time
from collections.abc import Callable
from collections.abc import Generator as Source
from contextlib import closing

from torch import Tensor

from pai_bench import assembly
from pai_bench.assembly import Parts
from pai_bench.config.schema import RunConfig
from pai_bench.core import Batch
from pai_bench.errors import ConfigError
from pai_bench.system import devices, seeding
from pai_bench.system.world import world
from pai_bench.training.step import Execution, Step

_FIRST_STEPS = 2  # not measured: they compile, choose algorithms and start the processes that decode
_WARM_UP = 0.5  # share of the measured time; it uses up the images that were decoded during the first steps

Use = Callable[[Tensor, Tensor], None]  # does something with the images and labels of a batch


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
        "loader": _rate(parts, _loaded(parts), _ignored, seconds),
        "training": _rate(parts, _repeated(parts), _training(parts), seconds),
        "both": _rate(parts, _loaded(parts), _training(parts), seconds),
    }


def _loaded(parts: Parts) -> Source[Batch]:
    """The training batches of one epoch after another, without end."""
    for epoch in itertools.count(1):
        order, augment = (seeding.generator(parts.run.seed, name, epoch) for name in ("order", "augment"))
        yield from parts.data.train(parts.run.training.batch_size, order, augment)


def _repeated(parts: Parts) -> Source[Batch]:
    """The first batch again and again."""
    with closing(_loaded(parts)) as batches:
        batch = next(batches)
    yield from itertools.repeat(batch)


def _ignored(images: Tensor, labels: Tensor) -> None:
    """Does nothing with a batch."""


def _training(parts: Parts) -> Use:
    """Trains the dense network on a batch."""
    run = parts.run
    execution = Execution(parts.device, channels_last=run.channels_last, compile_model=run.compile)
    step = Step(parts.build("init"), parts.run.training, execution)
    step.net.train()
    return lambda images, labels: step(images, labels, len(labels))


def _rate(parts: Parts, batches: Source[Batch], use: Use, seconds: float) -> float:
    """How many images per second are taken from the batches and used."""
    with closing(batches):
        for images, labels in itertools.islice(batches, _FIRST_STEPS):
            use(images, labels)
        rate = 0.0
        for period in (_WARM_UP * seconds, seconds):
            devices.wait(parts.device)
            num_images, started = 0, time.perf_counter()
            while time.perf_counter() - started < period:
                images, labels = next(batches)
                use(images, labels)
                num_images += len(labels)
            devices.wait(parts.device)
            rate = num_images / (time.perf_counter() - started)
    return rate
