"""Batches whose images are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, overload

from pai_bench.core import Batch, Batches

if TYPE_CHECKING:
    from torch import Tensor


class Drawn(Sequence[Batch]):
    """Batches whose images are made when a batch is asked for, so that not all lie on the device at once.

    Args:
        images: makes the images of the batch of a number, the same whenever it is asked.
        labels: of every batch.
    """

    def __init__(self, images: Callable[[int], Tensor], labels: Sequence[Tensor]) -> None:
        self._images, self.labels = images, list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        return self._images(number), self.labels[number]


def labels_of(batches: Batches) -> list[Tensor]:
    """The labels of each batch; no image is made for them."""
    return batches.labels if isinstance(batches, Drawn) else [labels for _, labels in batches]
