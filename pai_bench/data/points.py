"""Datasets of points: a few numbers for each example, as images of one pixel with a channel for each number."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from pai_bench.batches import Drawn, joined_single
from pai_bench.core import Batch, Batches, Change, DataSettings, ScoringData, Shape, num_steps
from pai_bench.data.splits import choose_examples, hold_out, require_two
from pai_bench.errors import ConfigError

# points (N, D) float32; and classes (N,) int64, or the targets of a regression (N, K) float32
Labelled = tuple[Tensor, Tensor]


def split(points: Tensor, labels: Tensor, test_fraction: float) -> tuple[Labelled, Labelled]:
    """The training split and the test split: the last points are the test.

    Raises:
        ConfigError: one of them would be empty.
    """
    num_examples = len(labels)
    num_test = round(test_fraction * num_examples)
    if num_test in (0, num_examples):
        part, remedy = ("test", "more") if num_test == 0 else ("training", "less")
        raise ConfigError(
            f"dataset.test_fraction={test_fraction}: of {num_examples} points it leaves no {part} point; give {remedy}"
        )
    first, last = slice(num_examples - num_test), slice(-num_test, None)
    return (points[first], labels[first]), (points[last], labels[last])


class Points:
    """A core.Data whose points are float tensors on the device. Nothing is normalised, and nothing is augmented.

    Args:
        num_classes: all classes are below this number. Of targets, how many each point has.
        place: only its device and its share are used here.
        validation: fraction of the training points for the validation split.

    Raises:
        ConfigError: a split would be empty, or there is only one training point.
    """

    def __init__(
        self, train: Labelled, test: Labelled, num_classes: int, place: DataSettings, *, validation: float
    ) -> None:
        self.input_shape: Shape = (train[0].shape[1], 1, 1)
        self.num_classes, self.regression = num_classes, train[1].is_floating_point()
        digest = hashlib.sha256()
        for tensor in (*train, *test):
            digest.update(tensor.contiguous().numpy().data)
        self.checksum = digest.hexdigest()
        points, labels = train
        train_indices, validation_indices = hold_out(labels, validation)
        require_two(len(train_indices))
        self._device, self._share = place.device, place.share
        self._labels = labels[train_indices]  # on the CPU, where the scoring examples are drawn
        splits = {
            "train": (points[train_indices], self._labels),
            "validation": (points[validation_indices], labels[validation_indices]),
            "test": test,
        }
        self._splits = {name: (x.to(self._device), y.to(self._device)) for name, (x, y) in splits.items()}
        self.num_examples = {name: len(labels) for name, (_, labels) in splits.items()}

    def _images(self, points: Tensor) -> Tensor:
        return points.view(-1, *self.input_shape)

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        """One epoch of training batches in random order, from batch `start`. A last batch of one point is left out."""
        tables = self.tables(order, augment)
        for step in range(start, num_steps(len(self._labels), batch_size)):
            part = slice(step * batch_size + self._share.rank, (step + 1) * batch_size, self._share.size)
            yield self.gather(tables, part)

    def tables(self, order: Generator, augment: Generator) -> list[Tensor]:
        """The labels and the points of an epoch, in random order."""
        permutation = torch.randperm(len(self._labels), generator=order).to(self._device)
        points, labels = self._splits["train"]
        return [labels[permutation], points[permutation]]

    def gather(self, tables: Sequence[Tensor], positions: slice | Tensor) -> Batch:
        """The training points at some positions of an epoch, and their labels."""
        labels, points = tables
        return self._images(points[positions]), labels[positions]

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every point of a split once, in a fixed order."""
        points, labels = self._splits[split]
        for start in range(self._share.rank * batch_size, len(labels), self._share.size * batch_size):
            part = slice(start, start + batch_size)
            yield self._images(points[part]), labels[part]

    def draw(
        self, examples: ScoringData, generator: Generator, dtype: torch.dtype, change: Change | None = None
    ) -> Batches:
        """Training points for scoring; see core.Data. A change sees them as images (B, 1, 1, D) of floats."""
        indices = choose_examples(self._labels, self.num_classes, examples, generator).to(self._device)
        points, labels = (tensor[indices] for tensor in self._splits["train"])
        if change is not None:
            changed, labels = change(points[:, None, None, :], labels)
            points = changed.flatten(1)
        parts = [slice(part.start, part.stop) for part in joined_single(len(labels), examples.batch_size)]
        return Drawn(lambda number: self._images(points[parts[number]].to(dtype)), [labels[part] for part in parts])
