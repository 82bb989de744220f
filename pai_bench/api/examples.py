"""The images that a score looks at, out of the batches that a user has."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from pai_bench.api.isolation import random_states
from pai_bench.batches import Drawn, joined_single
from pai_bench.core import Batch, Batches, ScoringData
from pai_bench.errors import ConfigError
from pai_bench.system import seeding


def _check(batch: Any) -> Batch:
    """A batch of a loader, if it is one.

    Raises:
        ConfigError: it is no pair of tensors of one length, or its images are bytes.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        parts = [type(part).__name__ for part in batch] if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ConfigError(
            f"data: a batch is {parts}; give an iterable of pairs of tensors (images, labels), as a DataLoader is; a "
            "single batch goes into a list"
        )
    images, labels = batch
    if images.ndim < 2 or labels.ndim < 1 or len(images) != len(labels):
        raise ConfigError(
            f"data: a batch has images {tuple(images.shape)} and labels {tuple(labels.shape)}; give images "
            "(B, C, H, W) and as many labels (B,)"
        )
    if images.dtype == torch.uint8:
        raise ConfigError("data: images are uint8; give floats, normalised as for training")
    return images, labels


class Examples:
    """Examples for scoring. Each round takes the next ones of the batches, in their order.

    Where too few are left, a round starts the batches over. While they are made, the global random states are seeded,
    so that a shuffling loader gives the same examples again.

    Args:
        batches: (images, labels), an iterable.
        device: where examples are put.
        seed: of the order and the augmentations of a loader.
        classes: whether labels are classes: numbers of outputs of the model.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device, seed: int, *, classes: bool) -> None:
        if not isinstance(batches, Iterable):
            raise ConfigError(
                f"data: {type(batches).__name__} is no iterable of batches (images, labels); give a DataLoader, or a "
                "list of batches"
            )
        self._source, self._device, self._are_classes = batches, device, classes
        with random_states(seeding.stream_seed(seed, "first batch")):
            self._batches = iter(batches)
            self._rest: Batch | None = self._following()
        if self._rest is None:
            raise ConfigError("data: it holds no batch; give some")
        self.first = self._rest[0][:1].to(device)
        self.has_targets = not classes and self._rest[1].is_floating_point()  # labels are numbers, and no classes
        self.num_classes: int | None = None  # known when the network has been looked at

    def _following(self) -> Batch | None:
        """The next batch of this pass, or None at its end."""
        batch = next(self._batches, None)
        return None if batch is None else _check(batch)

    def _pass(self) -> Iterator[Batch]:
        """What is left of this pass. The caller puts back what it does not use."""
        while (batch := self._rest or self._following()) is not None:
            self._rest = None
            yield batch

    def draw(self, wanted: ScoringData, generator: Generator, dtype: torch.dtype) -> Batches:
        """The examples of a round, as core.Data draws them; they are not augmented here.

        Raises:
            ConfigError: there are too few.
        """
        with random_states(generator.initial_seed() % 2**63):
            taken = self._taken(wanted)
            if taken is None and self._source is not self._batches:
                self._batches, self._rest = iter(self._source), None
                taken = self._taken(wanted)
        if taken is None:
            ends = " and cannot be walked again" if self._source is self._batches else ""
            raise ConfigError(
                f"data: it ends{ends} before a round has the examples of {_setting(wanted)}; give more data, or fewer "
                "examples in settings="
            )
        images, labels = taken
        _check_finite(images, labels)
        if self._are_classes and self.num_classes is not None and not labels.is_floating_point():
            _check_classes(labels, self.num_classes)
        parts = [slice(part.start, part.stop) for part in joined_single(len(labels), wanted.batch_size)]

        def of_batch(number: int) -> Tensor:
            part = images[parts[number]].to(self._device)
            return part.to(dtype).contiguous() if part.is_floating_point() else part

        if labels.is_floating_point():  # as the outputs: older torch mixes no types in a loss
            labels = labels.to(dtype)
        return Drawn(of_batch, [labels[part].to(self._device) for part in parts])

    def _taken(self, wanted: ScoringData) -> Batch | None:
        """The next examples of this pass; None if it ends before there are enough."""
        balanced = wanted.per_class is not None if wanted.balanced is None else wanted.balanced
        number = (wanted.total or 0) if wanted.per_class is None else wanted.per_class * self._classes(wanted)
        room: Counter[int] | None = None
        if balanced:
            classes = range(self._classes(wanted))
            room = Counter(dict.fromkeys(classes, number // len(classes)))
            number = room.total()
            if number == 0:
                raise ConfigError(f"{_setting(wanted)}: the model has {len(classes)} classes; give more in settings=")
        found: list[Batch] = []
        missing = number
        for images, labels in self._pass():
            chosen = list(range(min(missing, len(labels)))) if room is None else _fitting(labels, room)
            found.append((images[chosen], labels[chosen]))
            missing -= len(chosen)
            if missing == 0:
                used = chosen[-1] + 1
                self._rest = (images[used:], labels[used:]) if used < len(labels) else None
                return torch.cat([part for part, _ in found]), torch.cat([part for _, part in found])
        return None

    def _classes(self, wanted: ScoringData) -> int:
        if self.num_classes is None:
            raise ConfigError(
                f"{_setting(wanted)}: the classes are not known, as the model gives no outputs (B, classes); set "
                "pruner.scoring_data.per_class to None, total to a number, and balanced to False in settings="
            )
        return self.num_classes


def _check_finite(images: Tensor, labels: Tensor) -> None:
    """Refuses examples whose values are not all finite.

    Raises:
        ConfigError: an image or a label is such.
    """
    for word, values in (("images", images), ("labels", labels)):
        if values.is_floating_point() and not values.isfinite().all():
            bad = int((~values.isfinite()).reshape(len(values), -1).any(1).sum())
            raise ConfigError(f"data: {bad} of {len(values)} {word} hold values that are not finite; remove them")


def _check_classes(labels: Tensor, num_classes: int) -> None:
    """Refuses labels that are no outputs of the model.

    Raises:
        ConfigError: a label is negative or too large.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ConfigError(
            f"data: there is a label {int(wrong[0])}, and the model has {num_classes} outputs; give labels from 0 to "
            f"{num_classes - 1}"
        )


def _fitting(labels: Tensor, room: Counter[int]) -> list[int]:
    """The positions of the examples whose class has room, of which they take their part.

    Raises:
        ConfigError: the labels are no classes of the model.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ConfigError(
            f"data: labels are {labels.dtype} {tuple(labels.shape)}; give int64 (B,), as their classes are counted"
        )
    _check_classes(labels, len(room))
    chosen = []
    for position, label in enumerate(labels.tolist()):
        if room[label]:
            room[label] -= 1
            chosen.append(position)
    return chosen


def _setting(wanted: ScoringData) -> str:
    if wanted.per_class is not None:
        return f"pruner.scoring_data.per_class={wanted.per_class}"
    return f"pruner.scoring_data.total={wanted.total}"
