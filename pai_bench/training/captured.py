"""A step on a GPU as one CUDA graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pai_bench.core import OnDevice
from pai_bench.system import graphs
from pai_bench.training.step import Step


def obstacle(step: Step, data: object, num_processes: int) -> str | None:
    """Why the steps of a network cannot be captured; None if they can."""
    if step.recipe.precision == "float16":
        return "float16 looks at the gradients before it takes a step"
    if num_processes > 1:
        return "several processes train it"
    if not isinstance(data, OnDevice):
        return "its images are read while it trains"
    return None


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
        self._rates = torch.zeros(num_steps, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(batch_size, device=device)
        self._addresses = self._addresses_now()
        step.net.train()
        self._replay = graphs.recorded(self._take, device, changed=step.tensors, begin=self._next.zero_)

    @property
    def still_holds(self) -> bool:
        """Whether every tensor of the step is still at its address."""
        return self._addresses == self._addresses_now()

    def begin(self, tables: Sequence[Tensor], rates: Sequence[float], start: int) -> None:
        """Prepares for the steps of an epoch.

        Args:
            tables: of the epoch.
            rates: the learning rate of each of its steps.
            start: the step that comes next.
        """
        for own, table in zip(self._tables, tables, strict=True):
            own.copy_(table)
        self._rates.copy_(torch.tensor(rates))
        self._next.fill_(start)

    def __call__(self) -> None:
        """Takes the next step."""
        self._replay()

    def _take(self) -> None:
        rate = self.step.optimizer.lr_tensor
        assert rate is not None
        rate.copy_(self._rates.index_select(0, self._next).squeeze(0))
        images, labels = self._data.gather(self._tables, self._places + self._next * self._batch_size)
        self.step(images, labels, self._batch_size)
        self._next += 1

    def _addresses_now(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.step.tensors]
