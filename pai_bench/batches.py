"""Batches: whose images are made when they are asked for, and how many images are in each."""

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


def joined_single(number: int, size: int) -> list[range]:
    """Splits `number` images into batches of `size`. A single image that is left over joins the batch before it.

    The reason: batch norm in train mode cannot take a single image.
    """
    starts = list(range(0, number, size))
    if len(starts) > 1 and size > 1 and number % size == 1:
        starts.pop()
    return [range(start, end) for start, end in zip(starts, [*starts[1:], number], strict=True)]
