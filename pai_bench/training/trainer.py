"""The loop around the step: it trains a masked network by a recipe, goes back in time, and stops and goes on."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from pai_bench.core import Data, Mask, State, Watch
from pai_bench.errors import ConfigError, LostWorkerError
from pai_bench.masks import masks
from pai_bench.masks.shared_weights import by_first_names
from pai_bench.system import distributed, seeding
from pai_bench.system.world import in_worker, world
from pai_bench.training.evaluation import Evaluator
from pai_bench.training.moving_mask import MovingMask
from pai_bench.training.network import TrainedNetwork
from pai_bench.training.progress import Progress
from pai_bench.training.recipe import Recipe, length
from pai_bench.training.recording import Observers, Recording
from pai_bench.training.step import Execution, Step
from pai_bench.training.steps import Steps

_TOGETHER = 10  # steps between two sums over processes, each of which makes them wait for each other


class Trainer:
    """Trains a masked model by a recipe and evaluates it after every epoch.

    Order, augmentation and dropout depend on the seed and the clock (see `Progress`), not on what ran before.

    Args:
        model: on the device. It is trained in place.
        keep_epochs: times on the clock to which `rewind` may return with the weights of that time.
        compact_training: train a compact network instead where that saves work (see `TrainedNetwork`).

    Raises:
        ConfigError: several processes cannot share this training.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        execution: Execution,
        observers: Observers,
        *,
        seed: int,
        compact_training: bool,
        keep_epochs: Sequence[float] = (),
    ) -> None:
        self.model, self._data, self._recipe = model, data, recipe
        self._device, self._seed, self._observers = execution.device, seed, observers
        self._world = world()
        if self._world.size > 1:
            _check_shares(recipe, data, self._world.size, execution.compile_model)
        self.progress = Progress(length(recipe, data).steps_per_epoch)
        self.network = TrainedNetwork(model, recipe, execution, data.input_shape, compact_training=compact_training)
        self._steps = Steps(data, recipe, execution, self.network.step)
        evaluator = Evaluator(data, execution)
        self._recording = Recording(self.network, data, recipe, self.progress, observers, evaluator)
        # Sums of losses and correct predictions of the epoch stay on the device: to read them is to wait for it.
        self._own_sums = self.network.step.sums  # of this process
        self._sums = self._own_sums if self._world.size == 1 else torch.zeros_like(self._own_sums)
        self._keep = {self.progress.steps(epoch) for epoch in keep_epochs}
        self._kept: dict[int, State] = {}  # states of the model by the clock
        self._mid_epoch = False  # between two steps that share one stream of random numbers
        self._random: list[Tensor] | None = None  # states of torch's generators to go on with
        self.moving: MovingMask | None = None  # the mask, once it moves
        self._moved: dict[str, Any] | None = None  # the state of a moving mask to go on with
        self._watch: Watch | None = None  # looks at the network after every epoch of the present training
        self._watched: dict[str, Any] | None = None  # the state of a watch to go on with
        self._keep_state()

    @property
    def clock(self) -> int:
        """Steps on the recipe so far."""
        return self.progress.clock

    @property
    def epoch(self) -> float:
        """The clock, in epochs."""
        return self.progress.epoch

    @property
    def num_epochs(self) -> int:
        """The length of the recipe."""
        return self._recipe.epochs

    @property
    def num_examples(self) -> int:
        """Images trained on so far."""
        return self.progress.num_examples

    @property
    def seconds(self) -> float:
        """Time spent on steps and their data so far, without evaluation; those of a training taken over count."""
        return self.progress.seconds

    @property
    def trained(self) -> nn.Module:
        """The network that is trained under the current mask, whole or compact."""
        return self.network.trained

    @property
    def compact_speedup(self) -> float | None:
        """Time of a step of the whole network over that of the compact one, where it was measured."""
        return self.network.compact_speedup

    @property
    def diagnose(self) -> Callable[[Mask], dict[str, float]] | None:
        """Further measurements that are recorded with every evaluation."""
        return self._observers.diagnose

    @property
    def age_epochs(self) -> float:
        """All training so far, in epochs."""
        return self.progress.age_epochs

    def has_begun(self, mask: Mask) -> bool:
        """Whether something has been done already since the last mask was found, which is this one."""
        progress = self.progress
        return self.network.is_under(mask) and (progress.evaluated or progress.clock != progress.mask_since)

    def until(self, mask: Mask, epoch: float, watch: Watch | None = None) -> None:
        """Trains the masked network until the clock stands at `epoch`, and records an evaluation after every epoch.

        The first call records the untrained network as epoch 0. A moving mask takes the place of the given one.

        Args:
            watch: looks at the network after every epoch, and may end the training there.

        Raises:
            UserError: the loss is no longer finite.
        """
        if self.moving is None:
            self._apply_mask(mask)
        if watch is not None and self._watched is not None:
            watch.state = self._watched
        self._watch = watch
        progress, target = self.progress, self.progress.steps(epoch)
        with self.network.training_for(self._images_under_the_mask(target)) as step:
            if progress.age == 0 and not progress.evaluated:
                self._evaluate()
            if progress.epoch_images and progress.at_end_of_epoch:
                self._end_epoch()  # resumed between the last step of an epoch and its evaluation
            if progress.look_missing:
                self._look(step)  # resumed between a step and the look after it
            while progress.clock < target and not (watch is not None and watch.state["ended"]):
                kept_next = (clock for clock in self._keep if clock > progress.clock)
                self._train(step, min([target, progress.end_of_epoch(), *kept_next]))
                self._keep_state()
                self._observers.checkpoint(False)
                if progress.at_end_of_epoch:
                    self._end_epoch()
                    self._observers.checkpoint(True)
        self._watch = self._watched = None

    def move_mask(self, moving: MovingMask) -> None:
        """Lets the mask move from now on, or goes on with that where an earlier attempt has ended."""
        if self._moved is None:
            self._apply_mask(moving.mask)
        moving.begin(self.network.step, self._moved)
        self.network.move_mask(moving.mask)
        self.moving, self._recording.keep = moving, moving.keep

    def finish(self, mask: Mask, epoch: float) -> None:
        """Like `until`. Also records an evaluation of the final network where that is still missing."""
        self.until(mask, epoch)
        if not self.progress.evaluated:
            self._evaluate()

    def rewind(self, mask: Mask, epoch: float, weights: bool) -> None:
        """Puts the clock back to `epoch` and resets the optimizer.

        Args:
            mask: what the weights of that time are masked by.
            epoch: where the clock has been. One of `keep_epochs` if the weights return.
            weights: whether the state of the model returns, too.
        """
        self.progress.clock = self.progress.steps(epoch)
        if weights:
            self.model.load_state_dict(self._kept[self.progress.clock])
            masks.apply_(self.model, mask)
        self._reset_optimizer()
        self._random = None
        self._sums.zero_()
        self.progress.start_epoch()

    def restart(self, mask: Mask, state: State) -> None:
        """Puts the clock back to the start, with another state of the model, masked."""
        self._kept[0] = by_first_names(self.model, state)
        self.rewind(mask, 0.0, True)

    def unmasked(self) -> State | None:
        """The state of the model, before a mask, to which training has been put back; None if it has not been."""
        return self._kept.get(self.clock)

    def replace(self, mask: Mask, state: State) -> None:
        """Goes on from here with another state of the model, masked, and resets the optimizer."""
        self.model.load_state_dict(by_first_names(self.model, state))
        masks.apply_(self.model, mask)
        self._reset_optimizer()

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from. Tensors are those in use, not copies."""
        optimizer = self.network.optimizer_state()  # first: it brings the model up to date
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "scaler": self.network.step.scaler.state_dict(),
            "mask": self.network.mask,
            "compact_speedup": self.network.compact_speedup,
            "moving": self.moving and self.moving.state(self.network.step),
            "watch": self._watch and self._watch.state,
            "progress": self.progress.state(),
            "kept": self._kept,
            "sums": self._sums,
            "random": seeding.states(self._device) if self._mid_epoch else None,
        }

    def load_state(self, state: dict[str, Any], mask: Mask) -> None:
        """Goes on from what `state` returned.

        Args:
            mask: what holds now. It may be newer than the one of the state, unless that one moves.
        """
        self.model.load_state_dict(state["model"])
        self.network.load_optimizer_state(state["optimizer"])
        self.network.step.scaler.load_state_dict(state["scaler"])
        self._moved, self._watched = state["moving"], state["watch"]
        if self._moved is not None:
            mask = {name: kept.to(self._device) for name, kept in state["mask"].items()}
        self._apply_mask(mask)  # after the optimizer: a newer mask must reach its state
        earlier = {name: kept.to(self._device) for name, kept in state["mask"].items()}
        same = earlier.keys() == mask.keys() and all(torch.equal(earlier[name], mask[name]) for name in mask)
        self._kept = {
            clock: {name: value.to(self._device) for name, value in kept.items()}
            for clock, kept in state["kept"].items()
        }
        self._sums.copy_(state["sums"])
        self.progress.load_state(state["progress"])
        if same:
            self.network.compact_speedup = state["compact_speedup"]
        else:
            self.progress.start_mask()
        # Those of the first process. The others start a new stream.
        self._random = state["random"] if self._world.rank == 0 else None

    def _evaluate(self) -> None:
        with self._saved_if_lost():
            self._recording.evaluate({})

    def _end_epoch(self) -> None:
        with self._saved_if_lost():
            self._recording.end_epoch(self._sums, self._of_epoch)

    def _of_epoch(self) -> dict[str, float]:
        """What those who watch an epoch say at its end."""
        more = {}
        if self._watch is not None:
            self.network.sync()
            more = self._watch()
        return more | (self.moving.metrics() if self.moving is not None else {})

    @contextmanager
    def _saved_if_lost(self) -> Iterator[None]:
        """Offers a checkpoint where the block, which has changed nothing yet, loses the workers that decode images."""
        try:
            yield
        except LostWorkerError:  # SIGTERM took them: the moment to save
            self._observers.checkpoint(False)
            raise

    def _apply_mask(self, mask: Mask) -> None:
        if not self.network.is_under(mask):
            self.network.apply_mask(mask)
            self.progress.start_mask()

    def _images_under_the_mask(self, target: int) -> int:
        """Images from the clock where the mask was applied to a target; 0 if that is less than an epoch.

        Counted from the mask and not from now, so that a resumed run decides about a compact network as before.
        """
        num_steps = target - self.progress.mask_since
        return num_steps * self._recipe.batch_size if num_steps >= self.progress.steps_per_epoch else 0

    def _reset_optimizer(self) -> None:
        self.network.load_optimizer_state({})
        self.progress.evaluated, self.progress.lowest_loss = False, math.inf

    def _keep_state(self) -> None:
        clock = self.progress.clock
        if clock in self._keep and clock not in self._kept:
            self.network.sync()
            self._kept[clock] = {name: value.clone() for name, value in self.model.state_dict().items()}

    def _train(self, step: Step, stop: int) -> None:
        """Takes the steps from the clock to `stop`, which lies in the same epoch."""
        rank, start = self._world.rank, self.progress.clock
        number, first = start // self.progress.steps_per_epoch + 1, start % self.progress.steps_per_epoch
        stream: tuple[str | int, ...] = ("dropout", number, first, *([rank] if rank else []))
        started = time.perf_counter()
        step.net.train()
        order, augment = (seeding.generator(self._seed, name, number) for name in ("order", "augment"))
        interpolation = seeding.generator(self._seed, "norms", number) if self._recipe.norm_interpolation else None
        with seeding.seeded(self._seed, *stream), distributed.synchronised_norms(step.net):
            if self._random is not None:
                seeding.set_states(self._random, self._device)
                self._random = None
            try:
                ended = self._take_steps(step, stop, order, augment, interpolation, started)
            except LostWorkerError:  # SIGTERM took the workers: the moment to save
                self._save_mid_epoch()
                raise
        loss_sum = float(self._sums[0])
        self.progress.count_seconds(time.perf_counter() - ended)  # the device runs behind, and was waited for
        if not math.isfinite(loss_sum):
            raise self._recording.divergence(loss_sum / self.progress.epoch_images)

    def _take_steps(
        self,
        step: Step,
        stop: int,
        order: Generator,
        augment: Generator,
        interpolation: Generator | None,
        started: float,
    ) -> float:
        """Takes steps, counts them and offers checkpoints in between. Returns when it ended."""
        progress = self.progress
        # Several processes sum up every few steps, and only then a checkpoint is offered.
        every = 1 if self._world.size == 1 else _TOGETHER
        num_images = 0  # since the last sum
        shown = tqdm(
            range(progress.clock, stop),
            f"epoch {int(progress.epoch) + 1}",
            leave=False,
            disable=True if in_worker() or self._world.rank > 0 else None,  # None: in a terminal only
            unit="step",
        )
        steps = self._steps.taken(step, progress.clock, order, augment, self.moving, interpolation)
        for _, taken in zip(shown, steps, strict=False):
            if self.moving is not None:
                self.network.mask = self.moving.mask
            now = time.perf_counter()
            progress.count_step(taken, now - started)
            started = now
            num_images += taken
            look = self._recording.is_due()
            if progress.clock % every and progress.clock < stop and not look:
                continue
            self._gather_sums()
            progress.epoch_images += num_images
            num_images = 0
            if look:
                started = self._look(step)
            if progress.clock < stop:
                self._save_mid_epoch()
        return started

    def _look(self, step: Step) -> float:
        """Looks at the held-out images between two steps, which go on as if it had not. Returns when it ended."""
        started = time.perf_counter()
        self._sums.tolist()  # the device runs behind
        self.progress.count_seconds(time.perf_counter() - started)
        numbers = seeding.states(self._device)
        self.progress.look_missing = True
        try:
            self._recording.look()
        finally:
            seeding.set_states(numbers, self._device)
        self.progress.look_missing = False
        step.net.train()
        return time.perf_counter()

    def _save_mid_epoch(self) -> None:
        self._mid_epoch = True
        self._observers.checkpoint(False)
        self._mid_epoch = False

    def _gather_sums(self) -> None:
        if self._world.size > 1:
            self._sums += distributed.total(self._own_sums)
            self._own_sums.zero_()


def _check_shares(recipe: Recipe, data: Data, size: int, compile_model: bool) -> None:
    """Refuses what several processes cannot do.

    Raises:
        ConfigError: a batch has fewer images than there are processes, or the model is to be compiled.
    """
    if compile_model:
        raise ConfigError(f"compile=true: not with {size} processes; use compile=false")
    last = data.num_examples["train"] % recipe.batch_size
    if min(recipe.batch_size, last if last > 1 else recipe.batch_size) < size:
        raise ConfigError(
            f"training.batch_size={recipe.batch_size}: the last batch of an epoch has {last} images for {size} "
            "processes; give another, or start fewer processes"
        )
