"""Loss and accuracies of a network over a split."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pai_bench.core import Batch, Data, OnDevice
from pai_bench.system import devices, distributed, graphs
from pai_bench.system.world import world
from pai_bench.training import objectives
from pai_bench.training.step import Execution, Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracies (fractions) over a split; see objectives."""

    loss: float
    top1: float
    top5: float
    num_not_finite: int  # images some of whose logits are nan or infinite; they count as wrong


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
    sums, number = _no_sums(device), 0
    for images, labels in batches:
        _add(sums, forward, images, labels, precision, temperature)
        number += len(labels)
    return _result(sums, number)


class Evaluator:
    """Evaluates the network of a step. A pass over a whole batch is one CUDA graph where possible.

    Args:
        data: to evaluate on.
        execution: says whether passes may be captured.
    """

    def __init__(self, data: Data, execution: Execution) -> None:
        self._obstacle = None if execution.capture else "it is switched off"  # why passes are not captured
        if world().size > 1:
            self._obstacle = "several processes evaluate"
        self._threads = not isinstance(data, OnDevice)  # threads that read images use the device meanwhile
        self._recorded: _RecordedPass | None = None
        self._logged = False

    def __call__(self, step: Step, batches: Iterable[Batch], batch_size: int) -> Evaluation:
        """Like `evaluate`. The network must be in eval mode.

        Args:
            batches: of images with the layout of the step. The last may be smaller than the others.
            batch_size: of the others.
        """
        recipe = step.recipe
        sums, number = _no_sums(step.device), 0
        for images, labels in batches:
            whole = len(labels) == batch_size
            replay = self._pass(step, images, labels) if whole else None
            if replay is None:
                _add(sums, partial(step.infer, whole=whole), images, labels, recipe.precision, recipe.temperature)
            else:
                replay(images, labels)
                sums += replay.sums
            number += len(labels)
        return _result(sums, number)

    def _pass(self, step: Step, images: Tensor, labels: Tensor) -> "_RecordedPass | None":
        """The recorded pass over a batch of this shape. None if there are no graphs here, or it cannot be recorded."""
        if not graphs.supported(step.device):
            return None
        if self._obstacle is None and (self._recorded is None or not self._recorded.holds_for(step, images)):
            self._recorded = None  # frees its memory before the next is recorded
            try:
                self._recorded = _RecordedPass(step, images, labels, self._threads)
            except RuntimeError as error:
                self._obstacle = f"the network cannot be captured ({str(error).partition(chr(10))[0]})"
        if self._obstacle is not None and not self._logged:
            self._logged = True
            log.info("the kernels of an evaluation are launched one by one: %s", self._obstacle)
        return self._recorded


class _RecordedPass:
    """A forward pass over a batch, and its sums, as one CUDA graph."""

    def __init__(self, step: Step, images: Tensor, labels: Tensor, threads: bool) -> None:
        self.sums = _no_sums(step.device)  # of one batch
        self._step, self._shape, self._strides = step, images.shape, images.stride()
        self._images, self._labels = images.clone(), labels.clone()
        self._addresses = self._addresses_now()
        self._replay = graphs.recorded(self._take, step.device, changed=list(step.net.buffers()), threads=threads)

    def holds_for(self, step: Step, images: Tensor) -> bool:
        """Whether this is the network and the shape, and every tensor of the network is still at its address."""
        same = self._step is step and (self._shape, self._strides) == (images.shape, images.stride())
        return same and self._addresses == self._addresses_now()

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Makes `sums` those of a batch."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._replay()

    def _take(self) -> None:
        recipe = self._step.recipe
        self.sums.zero_()
        forward = partial(self._step.infer, whole=True)
        _add(self.sums, forward, self._images, self._labels, recipe.precision, recipe.temperature)

    def _addresses_now(self) -> list[int]:
        net = self._step.net
        return [tensor.data_ptr() for tensors in (net.parameters(), net.buffers()) for tensor in tensors]


def _no_sums(device: torch.device) -> Tensor:
    """Loss, correct predictions, those among the best five, and images whose outputs are not finite: (4,) zeros."""
    return torch.zeros(4, dtype=torch.float64, device=device)


@torch.no_grad()
def _add(
    sums: Tensor,
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    precision: str,
    temperature: float,
) -> None:
    """Adds the sums of a batch. Nothing is read from the device."""
    with devices.autocast(sums.device, precision):
        logits = forward(images)
    logits = logits.float()
    finite = logits.isfinite().all(1)
    best = objectives.among_best(logits, labels) & finite[:, None]
    loss = objectives.loss(logits / temperature, labels, reduction="sum")
    sums += torch.stack([value.to(sums) for value in (loss, best[:, 0].sum(), best.sum(), (~finite).sum())])


def _result(sums: Tensor, number: int) -> Evaluation:
    totals = distributed.total(torch.cat([sums, sums.new_tensor([number])]))
    loss, top1, top5, bad, number = totals.tolist()
    return Evaluation(loss / number, top1 / number, top5 / number, round(bad))
