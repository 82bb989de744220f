"""A step on a GPU as one CUDA graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pai_bench.core import OnDevice
from pai_bench.system import graphs
from pai_bench.training.step import Step


def obstacle(step: Step, num_processes: int) -> str | None:
    """Why the steps of a network cannot be captured; None if they can."""
    if step.recipe.precision == "float16":
        return "float16 looks at the gradients before it takes a step"
    if num_processes > 1:
        return "several processes train it"
    return None


class CapturedBatchStep:
    """Steps on batches that are read while the network trains: a step on a copy of the batch in fixed memory.

    The learning rate may change between steps. Weights, optimizer state and masks may if they change in place.

    Args:
        images: of any whole batch.
        labels: of the same batch.

    Raises:
        RuntimeError: the network does something that cannot be captured; its state is as it was.
    """

    def __init__(self, step: Step, images: Tensor, labels: Tensor) -> None:
        self._step, self._images, self._labels = step, images.clone(), labels.clone()
        self._addresses = _addresses(step)
        step.net.train()
        # Threads of the loader pin memory meanwhile.
        self._replay = graphs.recorded(self._take, step.device, changed=step.tensors, threads=True)

    def holds_for(self, step: Step, images: Tensor) -> bool:
        """Whether this is the step and the shape, and every tensor of the step is still at its address."""
        same = (images.shape, images.stride()) == (self._images.shape, self._images.stride())
        return same and self._step is step and self._addresses == _addresses(step)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Takes a step on a batch."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._replay()

    def _take(self) -> None:
        self._step(self._images, self._labels, len(self._labels))


class CapturedStep:
    """Whole steps of one network, one launch each. A step gathers its batch from the tables of the epoch.

    A counter on the device says which step is next. Weights, optimizer state, masks and learning rates may change
    between steps if they change in place. `still_holds` says whether they did.

    Args:
        tables: of any epoch.
        batch_size: of every captured step. A smaller last batch is not for this class.
        num_steps: steps in an epoch.

    Raises:
        RuntimeError: the network does something that cannot be captured; its state is as it was.
    """

    def __init__(self, step: Step, data: OnDevice, tables: Sequence[Tensor], batch_size: int, num_steps: int) -> None:
        self.step, self._data, self._batch_size, device = step, data, batch_size, step.device
        self._tables = [table.clone() for table in tables]
        self._rates, self._shares = (torch.zeros(num_steps, device=device) for _ in range(2))
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(batch_size, device=device)
        self._addresses = _addresses(step)
        step.net.train()
        self._replay = graphs.recorded(self._take, device, changed=step.tensors, begin=self._next.zero_)

    @property
    def still_holds(self) -> bool:
        """Whether every tensor of the step is still at its address."""
        return self._addresses == _addresses(self.step)

    def begin(self, tables: Sequence[Tensor], rates: Sequence[float], start: int, shares: Sequence[float] = ()) -> None:
        """Prepares for the steps of an epoch.

        Args:
            tables: of the epoch.
            rates: the learning rate of each of its steps.
            start: the step that comes next.
            shares: how far norms are moved in each of its steps, where the recipe moves them.
        """
        for own, table in zip(self._tables, tables, strict=True):
            own.copy_(table)
        self._rates.copy_(torch.tensor(rates))
        if shares:
            self._shares.copy_(torch.tensor(shares))
        self._next.fill_(start)

    def __call__(self) -> None:
        """Takes the next step."""
        self._replay()

    def skip(self) -> None:
        """Leaves the next step out: it was taken another way."""
        self._next += 1

    def _take(self) -> None:
        rate = self.step.optimizer.lr_tensor
        assert rate is not None
        rate.copy_(self._rates.index_select(0, self._next).squeeze(0))
        if self.step.norms is not None:
            self.step.norms.share.copy_(self._shares.index_select(0, self._next).squeeze(0))
        images, labels = self._data.gather(self._tables, self._places + self._next * self._batch_size)
        self.step(images, labels, self._batch_size)
        self._next += 1


def _addresses(step: Step) -> list[int]:
    return [tensor.data_ptr() for tensor in step.tensors]
