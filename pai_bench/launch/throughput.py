"""Images per second: of the loader alone, of training alone, and of both together."""

import itertools
import time
from collections.abc import Generator as Source
from contextlib import closing, suppress
from dataclasses import replace

import torch
from torch import Generator

from pai_bench import assembly
from pai_bench.config.schema import RunConfig
from pai_bench.core import Batch, Batches, Change, Data, ScoringData
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.system import devices, seeding
from pai_bench.system.world import world

_FIRST_STEPS = 2  # compile, choose algorithms, start the processes that decode
_WARM_UP = 0.5  # of the time that counts: what was decoded during the first steps has to be used up
_MOST_STEPS = 1_000_000  # more than there is time for, so that no epoch ends


class _TimeIsUpError(Exception):
    """Ends the use of a `_Stopwatch`."""


class _Stopwatch:
    """A core.Data of other batches, without evaluation, that counts how many images are taken from it a second."""

    def __init__(self, data: Data, source: Source[Batch], batch_size: int, device: torch.device, seconds: float):
        self.input_shape, self.num_classes, self.checksum = data.input_shape, data.num_classes, data.checksum
        self.num_examples = {"train": _MOST_STEPS * batch_size, "validation": 0, "test": 0}
        self._data, self._source, self._device, self._seconds = data, source, device, seconds
        self.images_per_second = 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Source[Batch]:
        """The batches of the source.

        Raises:
            _TimeIsUpError: the time is up.
        """
        yield from itertools.islice(self._source, _FIRST_STEPS)
        for seconds in (_WARM_UP * self._seconds, self._seconds):
            num_images, began = 0, self._now()
            while time.perf_counter() - began < seconds:
                images, labels = next(self._source)
                yield images, labels
                num_images += len(labels)
            self.images_per_second = num_images / (self._now() - began)
        raise _TimeIsUpError

    def evaluation(self, split: str, batch_size: int) -> Source[Batch]:
        """No split but the one to train on has images."""
        yield from ()

    def draw(
        self, examples: ScoringData, generator: Generator, dtype: torch.dtype, change: Change | None = None
    ) -> Batches:
        """Training images for scoring, as the dataset draws them."""
        return self._data.draw(examples, generator, dtype, change)


def measure(cfg: RunConfig, seconds: float) -> dict[str, float]:
    """Images per second of a completed config's `loader` alone, of `training` alone on one batch, and of `both`.

    Each is measured for a time, after half of that time to warm up.

    Raises:
        UserError: what a run of this config would raise before it trains.
    """
    if (size := world().size) > 1:
        raise ConfigError(f"throughput is measured in one process, and these are {size}; start one")
    device = devices.pick(cfg.device, world())
    devices.check_precision(cfg.training.precision, device)
    devices.prepare(device, cfg.training.precision)
    parts = assembly.assembled(cfg, device)
    data, batch_size = parts.data, cfg.training.batch_size

    def loaded() -> Source[Batch]:
        for epoch in itertools.count(1):
            order, augment = (seeding.generator(cfg.seed, name, epoch) for name in ("order", "augment"))
            yield from data.train(batch_size, order, augment)

    def resident() -> Source[Batch]:
        with closing(loaded()) as batches:
            batch = next(batches)
        while True:
            yield batch

    def rate(source: Source[Batch], training: bool) -> float:
        with closing(source), suppress(_TimeIsUpError):
            watched = _Stopwatch(data, source, batch_size, device, seconds)
            if training:
                model = parts.build("init")
                trainer = assembly.trainer_for(replace(parts, data=watched), model, lambda *_: None)
                trainer.until(masks.full(model), 1)
            else:
                for _ in watched.train(batch_size, Generator(), Generator()):
                    pass
        return watched.images_per_second

    return {"loader": rate(loaded(), False), "training": rate(resident(), True), "both": rate(loaded(), True)}
