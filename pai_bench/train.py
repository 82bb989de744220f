"""The training loop: a recipe, one optimizer step at a time, with pruned weights at exactly zero."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pai_bench import devices, masks, seeding
from pai_bench.core import Batch, Data, Mask, Record, num_steps
from pai_bench.errors import UserError

log = logging.getLogger(__name__)

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
    precision: str  # float32, or autocast to bfloat16 or float16; weights stay float32


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and accuracies (fractions) over a split."""

    loss: float
    top1: float
    top5: float


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a time in epochs (a fraction within an epoch)."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * epoch / recipe.warmup_epochs
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.lr_drop_factor ** sum(epoch >= drop for drop in recipe.lr_drop_epochs)
    done = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def mask_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, mask: Mask) -> None:
    """Makes an optimizer leave pruned weights alone: their gradients are set to zero before every step.

    With the weights set to zero once (masks.apply_), momentum and weight decay keep them there exactly, and kept
    weights move as if the mask were part of the forward pass. It runs inside the step: after gradient scaling.
    """
    parameters = dict(model.named_parameters())
    sparse = {name: tensor for name, tensor in mask.items() if not tensor.all()}
    # The weight's type and memory format, or the fused multiplication falls back to one call for each tensor.
    factors = {name: torch.empty_like(parameters[name]).copy_(tensor) for name, tensor in sparse.items()}

    def before_step(*_: object) -> None:
        pairs = [(g, factors[name]) for name in sparse if (g := parameters[name].grad) is not None]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [factor for _, factor in pairs])

    optimizer.register_step_pre_hook(before_step)


def num_resurrected(model: nn.Module, mask: Mask) -> int:
    """Pruned weights that are not zero: none, if all is well."""
    parameters = dict(model.named_parameters())
    return int(sum(((parameters[name] != 0) & ~tensor).sum() for name, tensor in mask.items()))


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device, precision: str = "float32"
) -> Evaluation:
    """Loss and accuracies of logits = forward(images) over every image of the batches, each counted once."""
    sums, number = torch.zeros(3, dtype=torch.float64, device=device), 0
    for images, labels in batches:
        with autocast(device, precision):
            logits = forward(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([value.to(sums) for value in (cross_entropy, best[:, 0].sum(), best.sum())])
        number += len(labels)
    loss, top1, top5 = sums.tolist()
    return Evaluation(loss / number, top1 / number, top5 / number)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs in a precision."""
    dtype = devices.AUTOCAST[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class Trainer:
    """Trains a masked model by a recipe and evaluates it after every epoch.

    Order, augmentation and dropout of an epoch are functions of the seed and its number, not of what ran before.

    Args:
        model: on the device, its pruned weights already zero; trained in place.
        channels_last: memory format of images and weights.
        compile_model: run forward and backward through torch.compile.
        record: receives loss, accuracies and learning rate of each epoch; epoch 0 is the network before training.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        data: Data,
        recipe: Recipe,
        device: torch.device,
        *,
        seed: int,
        channels_last: bool,
        compile_model: bool,
        record: Record,
    ) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.mask, self.data, self.recipe, self.device = mask, data, recipe, device
        self.seed, self.record = seed, record
        self.forward = torch.compile(self.model) if compile_model else self.model
        decayed = masks.prunable(model)
        plain = [p for name, p in model.named_parameters() if name not in decayed]
        self.optimizer = torch.optim.SGD(
            [
                {"params": list(decayed.values()), "weight_decay": recipe.weight_decay},
                {"params": plain, "weight_decay": recipe.weight_decay if recipe.decay_norm_and_bias else 0.0},
            ],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            foreach=True,
        )
        mask_gradients(self.optimizer, model, mask)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.epoch = 0
        self.num_examples = 0
        self.seconds = 0.0  # spent on optimizer steps and their data, evaluation excluded

    def until(self, epoch: int) -> None:
        """Trains until so many epochs are done, evaluating and recording each; epoch 0 is recorded first.

        Raises:
            UserError: the loss is no longer finite.
        """
        if self.epoch == 0:
            self.record(self.evaluations(), 0.0)
        while self.epoch < epoch:
            with devices.fast():
                metrics = self._train_epoch()
            self.epoch += 1
            metrics |= self.evaluations()
            self.record(metrics, float(self.epoch))
            log.info(
                "epoch %3d of %d   train %.4f loss, %5.2f %%   test %.4f loss, %5.2f %%   lr %.4g   %d images/s",
                self.epoch, self.recipe.epochs, metrics["train/loss"], 100 * metrics["train/top1"],
                metrics["test/loss"], 100 * metrics["test/top1"], metrics["lr"], metrics["train/images_per_second"],
            )  # fmt: skip

    def evaluations(self) -> dict[str, float]:
        """Loss and accuracies on the validation split, if there is one, and the test split."""
        if num_resurrected(self.model, self.mask) > 0:
            if any(weight.isnan().any() for weight in self.model.parameters()):
                raise self._divergence(math.nan, self.epoch)
            raise AssertionError("a pruned weight is not zero")
        self.model.eval()
        metrics: dict[str, float] = {}
        size = min(_EVALUATION_BATCH, 4 * self.recipe.batch_size)
        for split in ("validation", "test"):
            if self.data.num_examples[split]:
                batches = self._formatted(self.data.evaluation(split, size))
                result = evaluate(self.forward, batches, self.device, self.recipe.precision)
                metrics |= {f"{split}/loss": result.loss, f"{split}/top1": result.top1, f"{split}/top5": result.top5}
        return metrics

    def _divergence(self, loss: float, epoch: int) -> UserError:
        return UserError(
            f"training diverged in epoch {epoch}: the loss is {loss}; lower training.lr={self.recipe.lr:g} or use a "
            f"wider type than training.precision={self.recipe.precision}"
        )

    def _formatted(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return ((images.contiguous(memory_format=self.memory_format), labels) for images, labels in batches)

    def _train_epoch(self) -> dict[str, float]:
        recipe, number = self.recipe, self.epoch + 1
        started = time.perf_counter()
        steps = num_steps(self.data.num_examples["train"], recipe.batch_size)
        # Sums stay on the device: reading them after every step would make the device wait for Python.
        loss_sum, correct, seen = torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0
        self.model.train()
        order, augment = (seeding.generator(self.seed, name, number) for name in ("order", "augment"))
        batches = self._formatted(self.data.train(recipe.batch_size, order, augment))
        with seeding.seeded(self.seed, "dropout", number):
            for step, (images, labels) in enumerate(
                tqdm(batches, f"epoch {number}", steps, leave=False, disable=None, unit="step")
            ):
                rate = learning_rate(recipe, self.epoch + step / steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                with autocast(self.device, recipe.precision):
                    logits = self.forward(images)
                    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                self.optimizer.zero_grad(set_to_none=True)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                self.scaler.step(self.optimizer)
                self.scaler.update()
                loss_sum += loss.detach() * len(labels)
                correct += (logits.detach().argmax(1) == labels).sum()
                seen += len(labels)
        mean_loss = loss_sum.item() / seen
        seconds = time.perf_counter() - started
        if not math.isfinite(mean_loss):
            raise self._divergence(mean_loss, number)
        self.num_examples += seen
        self.seconds += seconds
        return {
            "train/loss": mean_loss, "train/top1": correct.item() / seen, "lr": rate,
            "train/images_per_second": seen / seconds,
        }  # fmt: skip
