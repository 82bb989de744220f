"""The training loop: a recipe, one optimizer step at a time, with pruned weights at exactly zero."""

import copy
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pai_bench import devices, distributed, layout, masks, measures, seeding
from pai_bench.core import Batch, Data, Length, Mask, Record, State, num_steps
from pai_bench.errors import ConfigError, LostWorkerError, UserError
from pai_bench.sgd import SGD
from pai_bench.stand_in import StandIn, original
from pai_bench.world import world

log = logging.getLogger(__name__)

# Of a Trainer's state.
_COUNTS = (
    "clock", "age", "num_examples", "seconds", "compact_speedup", "_since", "_seen", "_epoch_seconds", "_evaluated",
)  # fmt: skip

# A smaller network is trained instead where at most this part of the multiply-adds is left,
_WORTH = 0.8
# and where training the whole takes at least so many floating-point operations, a minute of two cores or of a GPU: to
# look for it, and to measure the gain on a few steps, takes seconds.
_LONG = {"cpu": 1e13, "cuda": 1e15}
# On a GPU fewer operations need not take less time, so there the steps that were measured decide.
_FASTER = 1.1

_TOGETHER = 10  # steps between two sums over processes, each of which makes them wait for each other
_EVALUATION_BATCH = 512  # at most; evaluation keeps no graph, so four times the training batch fits where that does


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Durations are in epochs, a pass over the training split."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm_and_bias: bool  # False: weight decay on the weights of convolutions and linear layers alone
    lr_schedule: str  # "step": times lr_drop_factor at each of lr_drop_epochs; "cosine": to zero at the end
    lr_drop_epochs: list[int]
    lr_drop_factor: float
    warmup_epochs: int  # the learning rate rises linearly from 0, step by step
    label_smoothing: float
    temperature: float  # divides the logits in the loss
    precision: str  # float32, tfloat32 (see devices.prepare), or autocast to bfloat16 or float16


def length(recipe: Recipe, data: Data) -> Length:
    """How long a recipe trains on a dataset."""
    return Length(recipe.epochs, num_steps(data.num_examples["train"], recipe.batch_size))


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and accuracies (fractions) over a split."""

    loss: float
    top1: float
    top5: float
    num_not_finite: int  # images some of whose logits are nan or infinite; they count as wrong


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a time in epochs (a fraction within an epoch)."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * epoch / recipe.warmup_epochs
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.lr_drop_factor ** sum(epoch >= drop for drop in recipe.lr_drop_epochs)
    done = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def num_resurrected(model: nn.Module, mask: Mask) -> int:
    """Pruned weights that are not zero: none, if all is well."""
    parameters = dict(model.named_parameters())
    return int(sum(((parameters[name] != 0) & ~tensor).sum() for name, tensor in mask.items()))


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    precision: str = "float32",
    temperature: float = 1.0,
) -> Evaluation:
    """Loss and accuracies of logits = forward(images) over every image of the batches, each counted once.

    Of several processes each brings its own batches.

    Args:
        temperature: divides the logits in the loss.
    """
    sums, number = torch.zeros(4, dtype=torch.float64, device=device), 0
    for images, labels in batches:
        with autocast(device, precision):
            logits = forward(images)
        logits = logits.float()
        finite = logits.isfinite().all(1)
        best = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]) & finite[:, None]
        cross_entropy = F.cross_entropy(logits / temperature, labels, reduction="sum")
        sums += torch.stack(
            [value.to(sums) for value in (cross_entropy, best[:, 0].sum(), best.sum(), (~finite).sum())]
        )
        number += len(labels)
    loss, top1, top5, bad, number = distributed.total(torch.cat([sums, sums.new_tensor([number])])).tolist()
    return Evaluation(loss / number, top1 / number, top5 / number, round(bad))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs in a precision."""
    dtype = devices.AUTOCAST[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class _Gear:
    """What steps are taken with."""

    net: nn.Module
    infer: nn.Module  # the same, perhaps compiled
    forward: nn.Module  # that, perhaps with gradients that are averaged over processes
    optimizer: SGD
    layout: torch.memory_format  # of images and weights


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
        compact: train a network without the channels that the mask leaves idle instead, where that saves work; not if
            what is pruned may return after training, since running statistics of idle channels stand still meanwhile.
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
        compact: bool,
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
        self.compile_model, self.compact = compile_model, compact
        self.length = length(recipe, data)
        self._whole = self._gear(model, dict(model.named_parameters()))
        self.gear = self._whole
        self._stand_in: StandIn | None = None
        self._small: _Gear | None = None
        self._examined: Mask | None = None  # the mask under which a smaller network was looked for last
        self.compact_speedup: float | None = None  # seconds of a step of the full network over one of the smaller
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.mask: Mask = {}
        self._keep = {self._step(epoch) for epoch in keep_epochs}
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
        return self.model if self._stand_in is None else self._stand_in.model

    def until(self, mask: Mask, epoch: float) -> None:
        """Trains the masked network until the clock stands at `epoch`, recording an evaluation after every epoch.

        The first call records the untrained network as epoch 0.

        Raises:
            UserError: the loss is no longer finite.
        """
        self._set_mask(mask)
        target = self._step(epoch)
        with self._geared(target):
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
            "optimizer": self._whole.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "mask": self.mask,
            "kept": self._kept,
            "random": seeding.states(self.device) if self._stepping else None,
            "loss_sum": self._loss_sum,
            "correct": self._correct,
        } | {name: getattr(self, name) for name in _COUNTS}

    def load_state(self, state: dict[str, Any], mask: Mask) -> None:
        """Goes on from what `state` returned, under the mask that held then."""
        self.model.load_state_dict(state["model"])
        self._whole.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._set_mask(mask)  # after the momentum: a mask that is newer has to reach it
        earlier = {name: tensor.to(self.device) for name, tensor in state["mask"].items()}
        same = earlier.keys() == mask.keys() and all(torch.equal(earlier[name], mask[name]) for name in mask)
        self._kept = {
            step: {name: value.to(self.device) for name, value in kept.items()} for step, kept in state["kept"].items()
        }
        self._loss_sum, self._correct = state["loss_sum"].to(self.device), state["correct"].to(self.device)
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
        self.clock = self._step(epoch)
        self._evaluated = False
        if weights:
            self.model.load_state_dict(self._kept[self.clock])
            masks.apply_(self.model, mask)
        self._whole.optimizer.buffers.clear()
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
        self._whole.optimizer.buffers.clear()
        self._evaluated = False

    def evaluations(self) -> dict[str, float]:
        """Loss and accuracies on the validation split, if there is one, and the test split."""
        self._sync()
        if num_resurrected(self.model, self.mask) > 0:
            if any(weight.isnan().any() for weight in self.model.parameters()):
                raise self._divergence(math.nan)
            raise AssertionError("a pruned weight is not zero")
        self.gear.net.eval()
        metrics: dict[str, float] = {}
        size = min(_EVALUATION_BATCH, 4 * self.recipe.batch_size)
        for split in ("validation", "test"):
            if self.data.num_examples[split]:
                batches = self._formatted(self.data.evaluation(split, size))
                result = evaluate(self.gear.infer, batches, self.device, self.recipe.precision, self.recipe.temperature)
                if result.num_not_finite:
                    raise self._not_finite(split, result)
                metrics |= {f"{split}/loss": result.loss, f"{split}/top1": result.top1, f"{split}/top5": result.top5}
        return metrics | (self.diagnose(self.mask) if self.diagnose is not None else {})

    def _step(self, epoch: float) -> int:
        return round(epoch * self.length.steps_per_epoch)

    def _end_of_epoch(self) -> int:
        return (self.clock // self.length.steps_per_epoch + 1) * self.length.steps_per_epoch

    def _set_mask(self, mask: Mask) -> None:
        """Makes the mask hold from now on: for the weights, and for the momentum that they have gathered."""
        if mask.keys() == self.mask.keys() and all(self.mask[name] is tensor for name, tensor in mask.items()):
            return
        self.mask = mask
        self._evaluated = False
        self._stand_in, self.compact_speedup = None, None
        self._since = self.clock
        self._whole.optimizer.hold(mask)

    def _gear(self, net: nn.Module, parameters: dict[str, nn.Parameter]) -> _Gear:
        recipe = self.recipe
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # the former captures CUDA graphs
        infer: nn.Module = torch.compile(net, mode=mode) if self.compile_model else net  # type: ignore[assignment]
        decayed = masks.prunable(self.model)
        groups: list[dict[str, nn.Parameter]] = [{}, {}]
        for name, parameter in parameters.items():
            groups[original(name) not in decayed][name] = parameter
        optimizer = SGD(
            list(zip(groups, (recipe.weight_decay, recipe.weight_decay * recipe.decay_norm_and_bias), strict=True)),
            lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov,
        )  # fmt: skip
        form = layout.suitable(net, self.device, self.channels_last)
        layout.lay_out_(net, form)
        return _Gear(net, infer, distributed.wrapped(infer, self.device), optimizer, form)

    @contextmanager
    def _geared(self, target: int) -> Iterator[None]:
        """Inside the block steps are taken on a smaller network if there is one and they are an epoch or more."""
        # Counted from where the mask began to hold, so that a run that is taken up again decides as before.
        if self.compact and target - self._since >= self.length.steps_per_epoch:
            self._find_stand_in((target - self._since) * self.recipe.batch_size)
        if self._stand_in is None or self._small is None:
            yield
            return
        self._small.optimizer.buffers = self._stand_in.take(self.model, self._whole.optimizer.buffers)
        self._small.optimizer.lr = self._whole.optimizer.lr
        self.gear = self._small
        try:
            yield
        finally:
            self._sync()
            self.gear = self._whole

    def _find_stand_in(self, num_images: int) -> None:
        """Looks for a smaller network under the mask that holds, once, to train on so many images."""
        if self._stand_in is not None or self._examined is self.mask:
            return
        shape = self.data.input_shape
        full = sum(measures.multiply_adds(self.model, shape).values())
        if 6 * full * num_images < _LONG.get(self.device.type, 0):  # forward and backward: three times two for each
            return
        self._examined = self.mask
        if not masks.has_empty_slices(self.mask):
            return
        try:
            found = StandIn(self.model, self.mask, shape)
        except ConfigError as error:
            log.warning("training.compact=auto: the whole network is trained: %s", error)
            return
        left = sum(measures.multiply_adds(found.model, shape).values())
        if left > _WORTH * full:
            return
        gear = self._gear(found.model, found.parameters())
        if self.world.size == 1 and self.compact_speedup is None:  # a run that is taken up again decides as before
            whole, small = self._step_seconds([self.model, found.model])
            self.compact_speedup = whole / small
        if self.device.type == "cuda" and (self.compact_speedup or _FASTER) < _FASTER:
            log.info(
                "training.compact=auto: the whole network is trained: it takes %.2f times as long as without the "
                "channels that the mask leaves idle",
                self.compact_speedup,
            )
            return
        log.info("training without the channels that the mask leaves idle: %.3g of the multiply-adds", left / full)
        self._stand_in, self._small = found, gear
        gear.optimizer.hold(found.mask(self.mask))

    def _step_seconds(self, nets: list[nn.Module]) -> list[float]:
        """Seconds of a forward and backward pass of each network, the median of a few taken in turn."""
        shape, generator = (self.recipe.batch_size, *self.data.input_shape), torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=generator).to(next(self.model.parameters()))
        labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        layouts = [layout.layout_of(net) for net in nets]
        nets = [copy.deepcopy(net).train() for net in nets]  # the running statistics of the others stay as they are
        seconds: list[list[float]] = [[] for _ in nets]
        for repeat in range(4):
            for net, form, taken in zip(nets, layouts, seconds, strict=True):
                batch = layout.laid_out(images, form)
                devices.wait(self.device)
                started = time.perf_counter()
                with autocast(self.device, self.recipe.precision):
                    loss = F.cross_entropy(net(batch), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                devices.wait(self.device)
                if repeat:  # the first call chooses algorithms
                    taken.append(time.perf_counter() - started)
        return [statistics.median(taken) for taken in seconds]

    def _sync(self) -> None:
        """Brings the full network up to date with what stands in for it."""
        if self.gear is not self._whole:
            assert self._stand_in is not None
            self._whole.optimizer.buffers = self._stand_in.give(self.model, self.gear.optimizer.buffers)
            self._whole.optimizer.lr = self.gear.optimizer.lr

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

    def _formatted(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return ((layout.laid_out(images, self.gear.layout), labels) for images, labels in batches)

    def _fetched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an epoch; when there are no more because SIGTERM took the workers, the moment to save."""
        try:
            yield from batches
        except LostWorkerError:
            self._stepping = True
            self.checkpoint(False)
            raise

    def _start_epoch(self) -> None:
        # Sums stay on the device: reading them after every step would make the device wait for Python.
        self._loss_sum, self._correct = (torch.zeros((), device=self.device) for _ in range(2))
        self._seen, self._epoch_seconds = 0, 0.0

    def _train(self, stop: int) -> None:
        """Takes the steps from the clock to `stop`, which lies in the same epoch."""
        recipe, per_epoch = self.recipe, self.length.steps_per_epoch
        number, start = divmod(self.clock, per_epoch)
        first, num_train = number * per_epoch, self.data.num_examples["train"]
        number += 1
        stream: tuple[str | int, ...] = ("dropout", number, start, *([self.world.rank] if self.world.rank else []))
        started = time.perf_counter()
        self.gear.net.train()
        order, augment = (seeding.generator(self.seed, name, number) for name in ("order", "augment"))
        batches = self._formatted(self._fetched(self.data.train(recipe.batch_size, order, augment, start)))
        steps = range(self.clock, stop)
        # Sums of several processes are brought together every few steps, and only then is a checkpoint offered.
        every = 1 if self.world.size == 1 else _TOGETHER
        own: Tensor | None = None
        seen = 0
        shown = tqdm(steps, f"epoch {number}", leave=False, disable=None, unit="step")
        with seeding.seeded(self.seed, *stream), distributed.synchronised_norms(self.gear.net):
            if self._random is not None:
                seeding.set_states(self._random, self.device)
                self._random = None
            for step, (images, labels) in zip(shown, batches, strict=False):
                self.gear.optimizer.lr = learning_rate(recipe, step / per_epoch)
                with autocast(self.device, recipe.precision):
                    logits = self.gear.forward(images)
                    loss = F.cross_entropy(logits / recipe.temperature, labels, label_smoothing=recipe.label_smoothing)
                sums = torch.stack([loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()])
                own = sums if own is None else own + sums
                num_images = len(labels)
                if self.world.size > 1:
                    num_images = min(recipe.batch_size, num_train - (step - first) * recipe.batch_size)
                    # So that the average of the gradients over processes is that of the mean over all images.
                    loss = loss * (len(labels) * self.world.size / num_images)
                self.gear.optimizer.zero_grad()
                if self.gear is self._small and self._stand_in is not None:
                    self._stand_in.rest()
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                self.scaler.step(self.gear.optimizer)  # type: ignore[arg-type]
                self.scaler.update()
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
                totals, own = distributed.total(own), None
                self._loss_sum += totals[0]
                self._correct += totals[1]
                self._seen, seen = self._seen + seen, 0
                if self.clock < stop:
                    self._stepping = True
                    self.checkpoint(False)
                    self._stepping = False
        loss_sum = self._loss_sum.item()
        waited = time.perf_counter() - started  # for the device, which runs behind
        self._epoch_seconds += waited
        self.seconds += waited
        if not math.isfinite(loss_sum):
            raise self._divergence(loss_sum / self._seen)

    def _record(self, metrics: dict[str, float]) -> dict[str, float]:
        """Records metrics together with an evaluation of the network as it is."""
        at = {"recipe_epoch": self.epoch} if self.age else {}
        metrics = metrics | at | self.evaluations()
        self.record(metrics, self.age_epochs)
        self._evaluated = True
        return metrics

    def _finish_epoch(self) -> None:
        """Evaluates and records at the end of an epoch."""
        metrics = {
            "train/loss": self._loss_sum.item() / self._seen,
            "train/top1": self._correct.item() / self._seen,
            "train/images_per_second": self._seen / self._epoch_seconds,
            "lr": self.gear.optimizer.lr,
        }
        self._start_epoch()
        metrics = self._record(metrics)
        log.info(
            "epoch %3d of %d   train %.4f loss, %5.2f %%   test %.4f loss, %5.2f %%   lr %.4g   %d images/s",
            round(self.epoch), self.recipe.epochs, metrics["train/loss"], 100 * metrics["train/top1"],
            metrics["test/loss"], 100 * metrics["test/top1"], metrics["lr"], metrics["train/images_per_second"],
        )  # fmt: skip
