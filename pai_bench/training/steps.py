"""Takes the steps of an epoch: each a replay of a CUDA graph where possible, otherwise kernel by kernel."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from pai_bench.core import Batch, ByEpoch, Data, OnDevice
from pai_bench.system import graphs, streams
from pai_bench.system.world import world
from pai_bench.training import captured, norms
from pai_bench.training.captured import CapturedBatchStep, CapturedStep
from pai_bench.training.moving_mask import MovingMask
from pai_bench.training.recipe import Recipe, image_size, learning_rate, length
from pai_bench.training.step import Execution, Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Epoch:
    """What is different from step to step of an epoch. Steps are counted from its start."""

    step: Step
    first: int  # steps on the recipe before the epoch
    rates: Sequence[float]
    shares: Sequence[float]  # how far the norms are moved; empty: they are not
    moving: MovingMask | None

    def prepare(self, at: int) -> None:
        """Sets what the recipe says for a step that is not captured."""
        self.step.optimizer.lr = self.rates[at]
        if self.shares:
            self.step.move_norms(self.shares[at])

    def moves(self, at: int) -> bool:
        """Whether the mask moves at a step."""
        return self.moving is not None and self.moving.is_due(self.first + at)

    def move(self, at: int, images: Tensor, labels: Tensor, num_images: int) -> None:
        """Takes a step at which the mask moves."""
        assert self.moving is not None
        self.prepare(at)
        self.moving.step(self.step, images, labels, num_images, self.first + at)


class Steps:
    """The steps of any epoch of a recipe on a dataset."""

    def __init__(self, data: Data, recipe: Recipe, execution: Execution, step: Step) -> None:
        self._data, self._recipe, self._execution = data, recipe, execution
        self._per_epoch = length(recipe, data).steps_per_epoch
        self._obstacle = "it is switched off"  # why steps are not captured
        if execution.capture:
            self._obstacle = captured.obstacle(step, world().size) or ""
        self._captured: CapturedStep | None = None
        self._on_batch: CapturedBatchStep | None = None
        self._log_obstacle()

    def taken(
        self,
        step: Step,
        clock: int,
        order: Generator,
        augment: Generator,
        moving: MovingMask | None = None,
        interpolation: Generator | None = None,
    ) -> Iterator[int]:
        """Takes the remaining steps of an epoch, one at each turn, and yields how many images each was on.

        Args:
            step: of the network to train.
            clock: steps on the recipe so far.
            order: decides the order of the epoch.
            augment: decides its augmentation.
            moving: the mask of the network, if it moves. A step at which it moves is never captured.
            interpolation: decides how far norms are moved in the epoch, where the recipe asks for that.
        """
        data, size, start = self._data, self._recipe.batch_size, clock % self._per_epoch
        if isinstance(data, ByEpoch):
            number = clock // self._per_epoch
            data = data.in_epoch(number + 1, image_size(self._recipe, number))
        num_train = data.num_examples["train"]
        first = clock - start
        rates = [learning_rate(self._recipe, (first + at) / self._per_epoch) for at in range(self._per_epoch)]
        shares = [] if interpolation is None else norms.shares(self._per_epoch, interpolation)
        epoch = _Epoch(step, first, rates, shares, moving)
        batches: Iterable[Batch]
        done = start
        if self._captures and isinstance(data, OnDevice):
            tables = data.tables(order, augment)
            if (graph := self._captured_step(step, data, tables)) is not None:
                graph.begin(tables, rates, start, shares)
                for at in range(start, num_train // size):
                    if epoch.moves(at):
                        epoch.move(at, *data.gather(tables, slice(at * size, (at + 1) * size)), size)
                        graph.skip()
                    else:
                        graph()
                    yield size
                done = max(start, num_train // size)
            batches = (data.gather(tables, slice(at * size, (at + 1) * size)) for at in range(done, self._per_epoch))
        else:
            batches = data.train(size, order, augment, start)
            if not isinstance(data, OnDevice):
                batches = streams.beside(batches, self._execution.device)
        for at, (images, labels) in enumerate(batches, done):
            num_images = min(size, num_train - at * size)
            if epoch.moves(at):
                epoch.move(at, images, labels, num_images)
            else:
                epoch.prepare(at)
                on_batch = None if isinstance(data, OnDevice) else self._captured_on_batch(step, images, labels)
                if on_batch is None:
                    step(images, labels, num_images)
                else:
                    on_batch(images, labels)
            yield num_images

    @property
    def _captures(self) -> bool:
        """Whether steps can be captured, as far as is known."""
        return graphs.supported(self._execution.device) and not self._obstacle

    def _captured_step(self, step: Step, data: OnDevice, tables: Sequence[Tensor]) -> CapturedStep | None:
        """The step as a CUDA graph. None if no batch is whole, or if it cannot be captured."""
        if self._data.num_examples["train"] < self._recipe.batch_size:
            return None
        if self._captured is None or self._captured.step is not step or not self._captured.still_holds:
            self._captured = None  # frees its memory before the next capture
            try:
                self._captured = CapturedStep(step, data, tables, self._recipe.batch_size, self._per_epoch)
            except RuntimeError as error:
                self._cannot(error)
        return self._captured

    def _captured_on_batch(self, step: Step, images: Tensor, labels: Tensor) -> CapturedBatchStep | None:
        """The step on a batch as a CUDA graph. None if the batch is not whole, or if it cannot be captured."""
        if not self._captures or len(labels) != self._recipe.batch_size:
            return None
        if self._on_batch is None or not self._on_batch.holds_for(step, images):
            self._on_batch = None  # frees its memory before the next capture
            try:
                self._on_batch = CapturedBatchStep(step, images, labels)
            except RuntimeError as error:
                self._cannot(error)
        return self._on_batch

    def _cannot(self, error: RuntimeError) -> None:
        self._obstacle = f"the network cannot be captured ({str(error).partition(chr(10))[0]})"
        self._log_obstacle()

    def _log_obstacle(self) -> None:
        if self._obstacle and graphs.supported(self._execution.device):
            log.info("the kernels of a step are launched one by one: %s", self._obstacle)
