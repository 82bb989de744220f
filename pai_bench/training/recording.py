"""What is measured and recorded while a network trains, and what is said when its numbers are not finite."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from pai_bench.core import Batch, Data, Mask, Record
from pai_bench.errors import UserError
from pai_bench.masks import masks
from pai_bench.system import layout
from pai_bench.training.evaluation import Evaluation, Evaluator
from pai_bench.training.network import TrainedNetwork
from pai_bench.training.progress import Progress
from pai_bench.training.recipe import Recipe, learning_rate
from pai_bench.training.step import Step

log = logging.getLogger(__name__)

_EVALUATION_BATCH = 512  # at most; evaluation keeps no graph, so four times the training batch fits where that does


@dataclass(frozen=True)
class Observers:
    """Who is told about training while it goes on."""

    record: Record  # receives loss, accuracies and learning rate of each epoch; epoch 0 is before training
    diagnose: Callable[[Mask], dict[str, float]] | None = None  # further measurements for every evaluation
    # Called after every step and every recorded epoch (then with True), when the state may be saved.
    checkpoint: Callable[[bool], None] = lambda epoch_ended: None
    group: str = "training"  # of the config that gives the learning rate
    validate_every: int | None = None  # steps between looks at the held-out images; None: none within an epoch


def num_resurrected(model: nn.Module, mask: Mask) -> int:
    """Number of pruned weights that are not zero. It should be 0."""
    parameters = dict(model.named_parameters())
    return int(sum(((parameters[name] != 0) & ~kept).sum() for name, kept in mask.items()))


class Recording:
    """Evaluates the network that is trained and records what comes out."""

    def __init__(
        self,
        network: TrainedNetwork,
        data: Data,
        recipe: Recipe,
        progress: Progress,
        observers: Observers,
        evaluator: Evaluator,
    ) -> None:
        self._network, self._data, self._recipe, self._progress = network, data, recipe, progress
        self._observers, self._evaluator = observers, evaluator
        self.keep: int | None = None  # how many weights the last mask has, where the mask moves

    def evaluate(self, metrics: dict[str, float], more: Callable[[], dict[str, float]] = dict) -> dict[str, float]:
        """Records metrics together with an evaluation of the network as it is, and returns both.

        Args:
            more: gives further numbers, and may forget what they were made of.

        Raises:
            UserError: losses or outputs are not finite.
            LostWorkerError: from the evaluation or from `more`; nothing has changed by then.
        """
        found = self._evaluations("validation", "test") | self._diagnoses()
        at = {"recipe_epoch": self._progress.epoch} if self._progress.age else {}
        metrics = metrics | more() | at | found
        if self._observers.validate_every is not None and self._progress.age:
            if self._is_small:
                self._note(metrics["validation_loss"], metrics["test_top1"])
            if self._progress.lowest_loss < math.inf:
                metrics |= {
                    "lowest_validation_loss": self._progress.lowest_loss,
                    "early_stop_epoch": self._progress.lowest_at / self._progress.steps_per_epoch,
                    "test_top1_at_early_stop": self._progress.lowest_test_top1,
                }
        self._observers.record(metrics, self._progress.age_epochs)
        self._progress.evaluated = True
        return metrics

    def is_due(self) -> bool:
        """Whether it is time for a look within an epoch."""
        every = self._observers.validate_every
        now = every is not None and self._progress.clock % every == 0 and not self._progress.at_end_of_epoch
        return now and self._is_small

    @property
    def _is_small(self) -> bool:
        """Whether the network has no more weights than in the end; one of more weights is not what was asked for."""
        return self.keep is None or masks.kept(self._network.mask) <= self.keep

    def look(self) -> None:
        """Notes whether the loss on the held-out images is the lowest so far. Leaves the network in eval mode.

        Raises:
            UserError: losses or outputs are not finite.
        """
        loss = self._evaluations("validation")["validation_loss"]
        if loss < self._progress.lowest_loss:
            self._note(loss, self._evaluations("test")["test_top1"])

    def _note(self, loss: float, test_top1: float) -> None:
        progress = self._progress
        if loss < progress.lowest_loss:
            progress.lowest_loss, progress.lowest_at, progress.lowest_test_top1 = loss, progress.clock, test_top1

    def end_epoch(self, sums: Tensor, more: Callable[[], dict[str, float]]) -> None:
        """Evaluates and records at the end of an epoch, and then begins to add up anew.

        Args:
            sums: (2,), the sum of losses and the number of correct predictions in the epoch.
            more: as in `evaluate`, which says what is raised, too.
        """
        progress, recipe = self._progress, self._recipe
        loss_sum, num_correct = sums.tolist()
        metrics = {
            "train_loss": loss_sum / progress.epoch_images,
            "train_top1": num_correct / progress.epoch_images,
            "train_images_per_second": progress.epoch_images / progress.epoch_seconds,
            "lr": learning_rate(recipe, (progress.clock - 1) / progress.steps_per_epoch),
        }
        metrics = self.evaluate(metrics, more)
        sums.zero_()
        progress.start_epoch()
        log.info(
            "epoch %3d of %d   train %.4f loss, %5.2f %%   test %.4f loss, %5.2f %%   lr %.4g   %d images/s",
            round(progress.epoch),
            recipe.epochs,
            metrics["train_loss"],
            100 * metrics["train_top1"],
            metrics["test_loss"],
            100 * metrics["test_top1"],
            metrics["lr"],
            metrics["train_images_per_second"],
        )

    def divergence(self, loss: float) -> UserError:
        """What to raise where a training loss is not finite."""
        group, precision = self._observers.group, self._recipe.precision
        wider = "" if precision == "float32" else f", or set {group}.precision=float32 in place of {precision}"
        return UserError(
            f"training diverged in epoch {math.ceil(self._progress.epoch)}: the loss is {loss}; lower "
            f"{group}.lr={self._recipe.lr:g}{wider}"
        )

    def _evaluations(self, *splits: str) -> dict[str, float]:
        """Loss and accuracies on those of the splits that have images."""
        network, recipe = self._network, self._recipe
        network.sync()
        if num_resurrected(network.model, network.mask) > 0:
            if any(weight.isnan().any() for weight in network.model.parameters()):
                raise self.divergence(math.nan)
            raise AssertionError("a pruned weight is not zero")
        step = network.step
        step.net.eval()
        metrics: dict[str, float] = {}
        size = min(_EVALUATION_BATCH, 4 * recipe.batch_size)
        for split in splits:
            if self._data.num_examples[split]:
                images = _laid_out(self._data.evaluation(split, size), step)
                result = self._evaluator(step, images, size)
                if result.num_not_finite:
                    raise self._not_finite(split, result)
                metrics |= {f"{split}_loss": result.loss, f"{split}_top1": result.top1, f"{split}_top5": result.top5}
        return metrics

    def _diagnoses(self) -> dict[str, float]:
        diagnose = self._observers.diagnose
        return diagnose(self._network.mask) if diagnose is not None else {}

    def _not_finite(self, split: str, result: Evaluation) -> UserError:
        if self._progress.age:
            return self.divergence(result.loss)
        of = f"{result.num_not_finite} of {self._data.num_examples[split]} {split} images"
        return UserError(
            f"the outputs for {of} are not finite before training; look at weights=, dataset.std and the "
            "initialization, or use training.precision=float32"
        )


def _laid_out(batches: Iterable[Batch], step: Step) -> Iterable[Batch]:
    return ((layout.laid_out(images, step.layout), labels) for images, labels in batches)
