"""The loop around the step: a recipe, epochs, evaluations, and the state that training goes on from."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from pai_bench.core import Batch, Data, Mask, OnDevice, Record, State
from pai_bench.errors import ConfigError, LostWorkerError, UserError
from pai_bench.masks import masks
from pai_bench.system import distributed, layout, seeding
from pai_bench.system.world import world
from pai_bench.training import captured, compact
from pai_bench.training.captured import CapturedStep
from pai_bench.training.compact import CompactNetwork, original
from pai_bench.training.evaluation import Evaluation, evaluate
from pai_bench.training.recipe import Recipe, learning_rate, length
from pai_bench.training.step import Step

log = logging.getLogger(__name__)

# Of a Trainer's state.
_COUNTS = (
    "clock", "age", "num_examples", "seconds", "compact_speedup", "_since", "_seen", "_epoch_seconds", "_evaluated",
)  # fmt: skip
_TOGETHER = 10  # steps between two sums over processes, each of which makes them wait for each other
_EVALUATION_BATCH = 512  # at most; evaluation keeps no graph, so four times the training batch fits where that does


def num_resurrected(model: nn.Module, mask: Mask) -> int:
    """Pruned weights that are not zero: none, if all is well."""
    parameters = dict(model.named_parameters())
    return int(sum(((parameters[name] != 0) & ~tensor).sum() for name, tensor in mask.items()))


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


class Trainer:
    """Trains a masked model by a recipe and evaluates it after every epoch.

    It keeps two times. The clock is the number of optimizer steps on the recipe: it decides the learning rate and the
    data, and can be put back. The age is the number of steps ever taken: what is recorded is ordered by it.
    Order, augmentation and dropout are functions of the seed and the clock, not of what ran before.

    Args:
        model: on the device; trained in place.
        keep_epochs: the times on the clock to which `rewind` will be asked to return with the weights of that time.
        channels_last: lay images and weights out so, where that is safe.
        compile_model: run forward and backward through torch.compile.
        compact_training: train a network without the channels that the mask leaves idle instead, where that saves work;
            not if what is pruned may return after training, since running statistics of idle channels stand still.
        capture: on a GPU, take steps as one CUDA graph where that can be done.
        record: receives loss, accuracies and learning rate of each epoch; epoch 0 is the network before training.
        diagnose: further measurements, given the mask, to record with every evaluation.
        checkpoint: called after every step and every recorded epoch (then with True), when `state` may be taken.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        device: torch.device,
        *,
        seed: int,
        channels_last: bool,
        compile_model: bool,
        record: Record,
        compact_training: bool,
        capture: bool = True,
        keep_epochs: Sequence[float] = (),
        diagnose: Callable[[Mask], dict[str, float]] | None = None,
        checkpoint: Callable[[bool], None] = lambda epoch_ended: None,
    ) -> None:
        self.channels_last = channels_last
        self.model = model
        self.data, self.recipe, self.device = data, recipe, device
        self.seed, self.record, self.diagnose, self.checkpoint = seed, record, diagnose, checkpoint
        self.world = world()
        if self.world.size > 1:
            _check_shares(recipe, data, self.world.size, compile_model)
        self.compile_model, self._compact_training = compile_model, compact_training
        self.length = length(recipe, data)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        # Sums of losses and hits of the epoch stay on the device: reading them would make it wait for Python.
        self._sums = torch.zeros(2, device=device)
        self._own_sums = self._sums if self.world.size == 1 else torch.zeros(2, device=device)  # of this process
        self._whole = self._step_of(model, dict(model.named_parameters()))
        self.step = self._whole
        self._compact: CompactNetwork | None = None
        self._small: Step | None = None
        self._examined: Mask | None = None  # the mask under which a smaller network was looked for last
        self.compact_speedup: float | None = None  # seconds of a step of the full network over one of the smaller
        self._obstacle = captured.obstacle(self._whole, data, self.world.size) if capture else "it is switched off"
        self._captured: CapturedStep | None = None
        self._tell_obstacle()
        self.mask: Mask = {}
        self._keep = {self._steps(epoch) for epoch in keep_epochs}
        self._kept: dict[int, State] = {}
        self._evaluated = False  # the network as it is now
        self.clock = 0
        self._since = 0  # the clock when training began under the mask that holds
        self.age = 0
        self.num_examples = 0
        self.seconds = 0.0  # spent on optimizer steps and their data, evaluation excluded
        self._stepping = False  # between two steps of which the second goes on with the random numbers of the first
        self._random: list[Tensor] | None = None  # the states of torch's generators to go on with
        self._start_epoch()
        self._keep_state()

    @property
    def epoch(self) -> float:
        """The clock, in epochs."""
        return self.clock / self.length.steps_per_epoch

    @property
    def age_epochs(self) -> float:
        """The age, in epochs."""
        return self.age / self.length.steps_per_epoch

    @property
    def trained(self) -> nn.Module:
        """The network that steps were taken on under the mask that holds."""
        return self.model if self._compact is None else self._compact.model

    def until(self, mask: Mask, epoch: float) -> None:
        """Trains the masked network until the clock stands at `epoch`, recording an evaluation after every epoch.

        The first call records the untrained network as epoch 0.

        Raises:
            UserError: the loss is no longer finite.
        """
        self._set_mask(mask)
        target = self._steps(epoch)
        with self._on_the_compact_network(target):
            if self.age == 0 and not self._evaluated:
                self._record({})
            if self._seen and self.clock % self.length.steps_per_epoch == 0:
                self._finish_epoch()  # taken up again between the last step of an epoch and its evaluation
            while self.clock < target:
                stop = min([target, self._end_of_epoch(), *(step for step in self._keep if step > self.clock)])
                self._train(stop)
                self._keep_state()
                self.checkpoint(False)
                if self.clock % self.length.steps_per_epoch == 0:
                    self._finish_epoch()
                    self.checkpoint(True)

    def state(self) -> dict[str, Any]:
        """Everything that the training goes on from, the mask excepted. Tensors are those in use, not copies."""
        self._sync()
        return {
            "model": self.model.state_dict(),
            "optimizer": self._whole.optimizer.state,
            "scaler": self.scaler.state_dict(),
            "mask": self.mask,
            "kept": self._kept,
            "random": seeding.states(self.device) if self._stepping else None,
            "sums": self._sums,
        } | {name: getattr(self, name) for name in _COUNTS}

    def load_state(self, state: dict[str, Any], mask: Mask) -> None:
        """Goes on from what `state` returned, under the mask that held then."""
        self.model.load_state_dict(state["model"])
        self._whole.optimizer.load_state(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._set_mask(mask)  # after the optimizer: a mask that is newer has to reach it
        earlier = {name: tensor.to(self.device) for name, tensor in state["mask"].items()}
        same = earlier.keys() == mask.keys() and all(torch.equal(earlier[name], mask[name]) for name in mask)
        self._kept = {
            step: {name: value.to(self.device) for name, value in kept.items()} for step, kept in state["kept"].items()
        }
        self._sums.copy_(state["sums"])
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._evaluated &= same
        if not same:
            self._since, self.compact_speedup = self.clock, None
        # Of the first process; the others start a new stream.
        self._random = state["random"] if self.world.rank == 0 else None

    def finish(self, mask: Mask, epoch: float) -> None:
        """As `until`, and records an evaluation of the network as it is in the end where that is still missing."""
        self.until(mask, epoch)
        if not self._evaluated:
            self._record({})

    def rewind(self, mask: Mask, epoch: float, weights: bool) -> None:
        """Puts the clock back to `epoch`, and the state of the model to what it was then, masked; forgets the momentum.

        Args:
            epoch: one of `keep_epochs`, where the clock has been, if the weights are to return.
        """
        self.clock = self._steps(epoch)
        self._evaluated = False
        if weights:
            self.model.load_state_dict(self._kept[self.clock])
            masks.apply_(self.model, mask)
        self._whole.optimizer.load_state({})
        self._random = None
        self._start_epoch()

    def restart(self, mask: Mask, state: State) -> None:
        """Puts the clock back to the start, with another state of the model, masked."""
        self._kept[0] = state
        self.rewind(mask, 0.0, True)

    def replace(self, mask: Mask, state: State) -> None:
        """Goes on from here with another state of the model, masked, and without momentum."""
        self.model.load_state_dict(state)
        masks.apply_(self.model, mask)
        self._whole.optimizer.load_state({})
        self._evaluated = False

    def evaluations(self) -> dict[str, float]:
        """Loss and accuracies on the validation split, if there is one, and the test split."""
        self._sync()
        if num_resurrected(self.model, self.mask) > 0:
            if any(weight.isnan().any() for weight in self.model.parameters()):
                raise self._divergence(math.nan)
            raise AssertionError("a pruned weight is not zero")
        self.step.net.eval()
        metrics: dict[str, float] = {}
        size = min(_EVALUATION_BATCH, 4 * self.recipe.batch_size)
        for split in ("validation", "test"):
            if self.data.num_examples[split]:
                images = self._laid_out(self.data.evaluation(split, size))
                result = evaluate(self.step.infer, images, self.device, self.recipe.precision, self.recipe.temperature)
                if result.num_not_finite:
                    raise self._not_finite(split, result)
                metrics |= {f"{split}/loss": result.loss, f"{split}/top1": result.top1, f"{split}/top5": result.top5}
        return metrics | (self.diagnose(self.mask) if self.diagnose is not None else {})

    def _steps(self, epoch: float) -> int:
        return round(epoch * self.length.steps_per_epoch)

    def _end_of_epoch(self) -> int:
        return (self.clock // self.length.steps_per_epoch + 1) * self.length.steps_per_epoch

    def _set_mask(self, mask: Mask) -> None:
        """Makes the mask hold from now on: for the weights, and for the momentum that they have gathered."""
        if mask.keys() == self.mask.keys() and all(self.mask[name] is tensor for name, tensor in mask.items()):
            return
        self.mask = mask
        self._evaluated = False
        self._compact, self.compact_speedup = None, None
        self._since = self.clock
        self._whole.optimizer.apply_mask(mask)

    def _step_of(
        self, net: nn.Module, parameters: dict[str, nn.Parameter], prepare: Callable[[], None] = lambda: None
    ) -> Step:
        prunable = masks.prunable(self.model)
        return Step(
            net, parameters, {name for name in parameters if original(name) in prunable}, self.recipe, self.device,
            self._own_sums, self.scaler,
            channels_last=self.channels_last, compile_model=self.compile_model, prepare=prepare,
        )  # fmt: skip

    @contextmanager
    def _on_the_compact_network(self, target: int) -> Iterator[None]:
        """Inside the block steps are taken on a smaller network if there is one and they are an epoch or more."""
        # Counted from where the mask began to hold, so that a run that is taken up again decides as before.
        if self._compact_training and target - self._since >= self.length.steps_per_epoch:
            self._find_compact((target - self._since) * self.recipe.batch_size)
        if self._compact is None or self._small is None:
            yield
            return
        self._small.optimizer.load_state(self._compact.load_from(self.model, self._whole.optimizer.state))
        self.step = self._small
        try:
            yield
        finally:
            self._sync()
            self.step = self._whole

    def _find_compact(self, num_images: int) -> None:
        """Looks for a smaller network under the mask that holds, once, to train on so many images."""
        if self._compact is not None or self._examined is self.mask:
            return
        if not compact.is_long(self.model, self.data.input_shape, num_images, self.device):
            return
        self._examined = self.mask
        found = compact.find(self.model, self.mask, self.data.input_shape)
        if found is None:
            return
        small = self._step_of(found.model, found.parameters(), found.zero_removed_grads)
        if self.world.size == 1 and self.compact_speedup is None:  # a run that is taken up again decides as before
            shape = (self.recipe.batch_size, *self.data.input_shape)
            whole, of_small = compact.pass_seconds([self.model, found.model], shape, self.device, self.recipe.precision)
            self.compact_speedup = whole / of_small
        if self.device.type == "cuda" and (self.compact_speedup or compact.FASTER) < compact.FASTER:
            log.info(
                "training.compact=auto: the whole network is trained: it takes %.2f times as long as without the "
                "channels that the mask leaves idle",
                self.compact_speedup,
            )
            return
        log.info("training without the channels that the mask leaves idle")
        self._compact, self._small = found, small
        small.optimizer.apply_mask(found.mask(self.mask))

    def _sync(self) -> None:
        """Brings the full network up to date with the smaller one."""
        if self.step is not self._whole:
            assert self._compact is not None
            state = self._compact.store_to(self.model, self.step.optimizer.state)
            self._whole.optimizer.load_state(state)

    def _keep_state(self) -> None:
        if self.clock in self._keep and self.clock not in self._kept:
            self._sync()
            self._kept[self.clock] = {name: value.clone() for name, value in self.model.state_dict().items()}

    def _divergence(self, loss: float) -> UserError:
        return UserError(
            f"training diverged in epoch {math.ceil(self.epoch)}: the loss is {loss}; lower "
            f"training.lr={self.recipe.lr:g} or use a wider type than training.precision={self.recipe.precision}"
        )

    def _not_finite(self, split: str, result: Evaluation) -> UserError:
        if self.age:
            return self._divergence(result.loss)
        return UserError(
            f"the outputs for {result.num_not_finite} of {self.data.num_examples[split]} {split} images are not finite "
            f"before training; look at weights=, dataset.std and the initialization, or use training.precision=float32"
        )

    def _laid_out(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return ((layout.laid_out(images, self.step.layout), labels) for images, labels in batches)

    def _fetched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an epoch; when there are no more because SIGTERM took the workers, the moment to save."""
        try:
            yield from batches
        except LostWorkerError:
            self._stepping = True
            self.checkpoint(False)
            raise

    def _start_epoch(self) -> None:
        self._sums.zero_()
        self._seen, self._epoch_seconds = 0, 0.0

    def _train(self, stop: int) -> None:
        """Takes the steps from the clock to `stop`, which lies in the same epoch."""
        per_epoch = self.length.steps_per_epoch
        number, start = self.clock // per_epoch + 1, self.clock % per_epoch
        stream: tuple[str | int, ...] = ("dropout", number, start, *([self.world.rank] if self.world.rank else []))
        started = time.perf_counter()
        self.step.net.train()
        order, augment = (seeding.generator(self.seed, name, number) for name in ("order", "augment"))
        # Sums of several processes are brought together every few steps, and only then is a checkpoint offered.
        every = 1 if self.world.size == 1 else _TOGETHER
        seen = 0
        shown = tqdm(range(self.clock, stop), f"epoch {number}", leave=False, disable=None, unit="step")
        with seeding.seeded(self.seed, *stream), distributed.synchronised_norms(self.step.net):
            if self._random is not None:
                seeding.set_states(self._random, self.device)
                self._random = None
            for step, num_images in zip(shown, self._steps_taken(order, augment, start), strict=False):
                self.num_examples += num_images
                self._evaluated = False
                self.age += 1
                self.clock = step + 1
                now = time.perf_counter()
                self._epoch_seconds += now - started
                self.seconds += now - started
                started = now
                seen += num_images
                if self.clock % every and self.clock < stop:
                    continue
                self._gather_sums()
                self._seen, seen = self._seen + seen, 0
                if self.clock < stop:
                    self._stepping = True
                    self.checkpoint(False)
                    self._stepping = False
        loss_sum = float(self._sums[0])
        waited = time.perf_counter() - started  # for the device, which runs behind
        self._epoch_seconds += waited
        self.seconds += waited
        if not math.isfinite(loss_sum):
            raise self._divergence(loss_sum / self._seen)

    def _steps_taken(self, order: Generator, augment: Generator, start: int) -> Iterator[int]:
        """Takes the steps of an epoch from `start` on, one at each turn, and says how many images each was on."""
        recipe, per_epoch, num_train = self.recipe, self.length.steps_per_epoch, self.data.num_examples["train"]
        first, size = self.clock - start, recipe.batch_size
        rates = [learning_rate(recipe, (first + at) / per_epoch) for at in range(per_epoch)]
        batches: Iterable[Batch]
        done = start
        if self.device.type == "cuda" and self._obstacle is None and isinstance(self.data, OnDevice):
            data, tables = self.data, self.data.tables(order, augment)
            if (graph := self._captured_step(data, tables)) is not None:
                graph.begin(tables, rates, start)
                for _ in range(start, num_train // size):
                    graph()
                    yield size
                done = max(start, num_train // size)
            batches = (data.gather(tables, slice(at * size, (at + 1) * size)) for at in range(done, per_epoch))
        else:
            batches = self._fetched(self.data.train(size, order, augment, start))
        for at, (images, labels) in enumerate(batches, done):
            num_images = min(size, num_train - at * size)
            self.step.optimizer.lr = rates[at]
            self.step(images, labels, num_images)
            yield num_images

    def _captured_step(self, data: OnDevice, tables: Sequence[Tensor]) -> CapturedStep | None:
        """The captured step of the network that is trained now; None where there is no whole batch or no way."""
        if data.num_examples["train"] < self.recipe.batch_size:
            return None
        if self._captured is None or self._captured.step is not self.step or not self._captured.still_holds:
            self._captured = None  # gives its memory back first
            try:
                self._captured = CapturedStep(
                    self.step, data, tables, self.recipe.batch_size, self.length.steps_per_epoch
                )
            except RuntimeError as error:
                self._obstacle = f"the network cannot be captured ({str(error).partition(chr(10))[0]})"
                self._tell_obstacle()
        return self._captured

    def _tell_obstacle(self) -> None:
        if self._obstacle is not None and self.device.type == "cuda":
            log.info("the kernels of a step are launched one by one: %s", self._obstacle)

    def _gather_sums(self) -> None:
        if self.world.size > 1:
            self._sums += distributed.total(self._own_sums)
            self._own_sums.zero_()

    def _record(self, metrics: dict[str, float]) -> dict[str, float]:
        """Records metrics together with an evaluation of the network as it is."""
        at = {"recipe_epoch": self.epoch} if self.age else {}
        metrics = metrics | at | self.evaluations()
        self.record(metrics, self.age_epochs)
        self._evaluated = True
        return metrics

    def _finish_epoch(self) -> None:
        """Evaluates and records at the end of an epoch."""
        loss_sum, hits = self._sums.tolist()
        metrics = {
            "train/loss": loss_sum / self._seen,
            "train/top1": hits / self._seen,
            "train/images_per_second": self._seen / self._epoch_seconds,
            "lr": learning_rate(self.recipe, (self.clock - 1) / self.length.steps_per_epoch),
        }
        self._start_epoch()
        metrics = self._record(metrics)
        log.info(
            "epoch %3d of %d   train %.4f loss, %5.2f %%   test %.4f loss, %5.2f %%   lr %.4g   %d images/s",
            round(self.epoch), self.recipe.epochs, metrics["train/loss"], 100 * metrics["train/top1"],
            metrics["test/loss"], 100 * metrics["test/top1"], metrics["lr"], metrics["train/images_per_second"],
        )  # fmt: skip
