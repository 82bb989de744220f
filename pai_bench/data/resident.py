"""Datasets that fit in memory: uint8 images on the training device, which crops, flips and normalises them."""

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pai_bench.batches import Drawn, joined_single
from pai_bench.core import Batch, Batches, Change, DataSettings, ScoringData, Shape, num_steps
from pai_bench.data.splits import choose_examples, hold_out, require_two
from pai_bench.errors import ConfigError, DataError
from pai_bench.system.layout import laid_out

# images (N, H, W, C) uint8 and labels (N,) int64
Images = tuple[np.ndarray, np.ndarray]
PaddingMode = Literal["reflect"] | None  # None: black
Standardize = Literal["per_image"] | None  # None: by a mean and a deviation for each channel
Flip = bool | Literal["alternating"]


def check_ranges(mean: list[float] | None, std: list[float] | None) -> None:
    """Checks values that did not come from a checked config.

    Raises:
        ConfigError: a mean or a standard deviation lies outside its range.
    """
    if mean is not None and not all(map(math.isfinite, mean)):
        raise ConfigError(f"dataset.mean={mean}: give finite numbers")
    if std is not None and not all(0 < value < math.inf for value in std):
        raise ConfigError(f"dataset.std={std}: give numbers above 0")


def _check_labels(split: str, num_images: int, labels: np.ndarray, num_classes: int) -> None:
    """Refuses labels that are not there, or that no output is for. The loss would leave some of them out in silence."""
    if len(labels) != num_images:
        raise DataError(f"dataset: {num_images} {split} images have {len(labels)} labels; fetch the dataset again")
    if num_images and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(
            f"dataset: the {split} labels are {labels.min()} to {labels.max()}, and there are {num_classes} classes; "
            "fetch the dataset again"
        )


def check_padding(padding: int, height: int, width: int) -> None:
    """Checks that every crop of a padded image contains a part of the image. Reflection needs this too.

    Raises:
        ConfigError: the padding is negative, or not smaller than the image.
    """
    most = min(height, width) - 1
    if not 0 <= padding <= most:
        raise ConfigError(f"dataset.padding={padding}: the images have {width}x{height} pixels; give 0 to {most}")


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, C), in [0, 1]."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        first = float(counts @ values / counts.sum())
        mean.append(first)
        constant = np.count_nonzero(counts) == 1  # rounding would give it a small deviation
        std.append(0.0 if constant else float(np.sqrt(counts @ (values - first) ** 2 / counts.sum())))
    return mean, std


def _mirrored(positions: Tensor, side: int) -> Tensor:
    """Positions, with those outside [0, side) mirrored at the first or last position inside."""
    return side - 1 - (side - 1 - positions.abs()).abs()


class Normalisation:
    """Normalises: uint8 pixels (B, H, W * C) -> images (B, C, H, W). It computes in the precision of the result.

    Args:
        mean, std: for each channel, of pixels in [0, 1].
        width: W.
    """

    def __init__(self, mean: list[float], std: list[float], width: int, device: torch.device) -> None:
        self._mean, self._std, self._width, self._device = mean, std, width, device
        self._constants = {torch.float32: self._constants_in(torch.float32)}

    def for_width(self, width: int) -> "Normalisation":
        """The same for images of another width."""
        return Normalisation(self._mean, self._std, width, self._device)

    def _constants_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factor and the summand of the normalisation."""
        mean, std = (torch.tensor(values, dtype=dtype, device=self._device) for values in (self._mean, self._std))
        # One value for each byte of a row of pixels. Broadcasting over three channels takes twice as long.
        return (1 / (255 * std)).repeat(self._width), (-mean / std).repeat(self._width)

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images, laid out channels last."""
        if dtype not in self._constants:
            self._constants[dtype] = self._constants_in(dtype)
        scale, shift = self._constants[dtype]
        images = torch.addcmul(shift, pixels.to(dtype), scale)
        return images.view(*pixels.shape[:2], self._width, len(self._mean)).permute(0, 3, 1, 2)


class Standardisation:
    """Standardises each image by itself: uint8 pixels (B, H, W * C) -> images (B, C, H, W), as TensorFlow does.

    The mean over all values of an image becomes 0. They are divided by their deviation, or by
    1 / sqrt(number of values) if that is more. Pixels count from 0 to 255 here.
    """

    def __init__(self, width: int, channels: int) -> None:
        self._width, self._channels = width, channels

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images, laid out channels last."""
        values = pixels.flatten(1)
        number = values.shape[1]
        # Sums of integers are exact, whatever their order.
        total = values.sum(1, dtype=torch.int64)
        squares = values.to(torch.int32).square().sum(1, dtype=torch.int64)
        deviation = (number * squares - total**2).to(torch.float64).sqrt() / number
        scale = 1 / deviation.clamp(min=1 / math.sqrt(number))
        # The distance to the mean, times the number of values, is an integer, which float32 holds exactly here.
        distance = values.to(dtype).mul_(number).sub_(total.to(dtype)[:, None])
        images = distance.mul_((scale / number).to(dtype)[:, None])
        return images.view(len(pixels), -1, self._width, self._channels).permute(0, 3, 1, 2)


def _normalisation(
    images: np.ndarray,
    mean: list[float] | None,
    std: list[float] | None,
    standardize: Standardize,
    device: torch.device,
) -> Normalisation | Standardisation:
    """What makes images of pixels; see Resident.

    Args:
        images: for training, (N, H, W, C) uint8.
    """
    _, _, width, channels = images.shape
    if standardize is not None:
        if mean is not None or std is not None:
            raise ConfigError(f"dataset.standardize={standardize}: give dataset.mean=null and dataset.std=null with it")
        return Standardisation(width, channels)
    measured = channel_statistics(images) if mean is None or std is None else ([], [])
    mean, std = measured[0] if mean is None else mean, measured[1] if std is None else std
    for setting, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ConfigError(f"dataset.{setting}={values}: the images have {channels} channels; give one for each")
    if 0 in std:
        raise ConfigError(
            f"dataset.std: channel {std.index(0)} has one value in all training images, so its measured deviation "
            "is 0; give dataset.mean and dataset.std"
        )
    return Normalisation(mean, std, width, device)


class Resident:
    """A core.Data whose images are uint8 tensors on the device.

    Args:
        num_classes: all labels are below this number. Some classes may have no image.
        place: only its device and its share are used here.
        validation: fraction of the training images for the validation split.
        mean, std: for each channel, of pixels in [0, 1]. None measures them on the training images.
        standardize: "per_image" brings every image, as it is cropped, to mean 0 and deviation 1 instead.
        padding: pixels around the image before a random crop of the image's size. 0: no crop.
        padding_mode: the values of these pixels. "reflect" mirrors the image without repeating its border. None: black.
        flip: mirror each image with probability 0.5. "alternating" draws that for the first epoch; after it, an image
            is mirrored in every epoch in which it was not mirrored in the epoch before. What is drawn is the same for
            every seed. Reference: Jordan 2024, arXiv:2404.00498.

    Raises:
        ConfigError: mean, std or padding do not fit the images; a split would be empty; there is only one training
            image; a channel has the same value everywhere; or there are two kinds of normalisation.
        DataError: labels are missing, or lie outside the classes.
    """

    def __init__(
        self,
        train: Images,
        test: Images,
        num_classes: int,
        place: DataSettings,
        *,
        validation: float,
        mean: list[float] | None,
        std: list[float] | None,
        padding: int,
        flip: Flip,
        padding_mode: PaddingMode = None,
        standardize: Standardize = None,
    ) -> None:
        check_ranges(mean, std)
        _, height, width, channels = train[0].shape
        check_padding(padding, height, width)
        if test[0].shape[1:] != train[0].shape[1:]:
            raise ConfigError(
                f"dataset: test images have {test[0].shape[2]}x{test[0].shape[1]} pixels and training images "
                f"{width}x{height}; give dataset.size=<pixels> to bring all images to one size"
            )
        for split, (pixels, classes) in (("training", train), ("test", test)):
            _check_labels(split, len(pixels), classes, num_classes)
        self.input_shape: Shape = (channels, height, width)
        self.num_classes, self.regression = num_classes, False
        digest = hashlib.sha256()
        for array in (*train, *test):
            digest.update(np.ascontiguousarray(array).data)
        self.checksum = digest.hexdigest()
        device, self._share = place.device, place.share
        self._normalise = _normalisation(train[0], mean, std, standardize, device)
        self._padding, self._padding_mode, self._flip, self._device = padding, padding_mode, bool(flip), device
        labels = torch.as_tensor(train[1], dtype=torch.int64)
        train_indices, validation_indices = hold_out(labels, validation)
        require_two(len(train_indices))
        images, held_out = (torch.from_numpy(train[0][i.numpy()]) for i in (train_indices, validation_indices))
        self._windows = self._windowed(images.to(device))
        self._labels = labels[train_indices]
        first = torch.rand(len(train_indices), generator=Generator().manual_seed(1)) < 0.5
        self._first_flips = first if flip == "alternating" else None  # of the first epoch
        self._epoch = 1
        self._evaluation = {
            "train": (self._windows[:, padding, padding], self._labels.to(device)),
            "validation": (held_out.flatten(2).to(device), labels[validation_indices].to(device)),
            "test": (torch.from_numpy(np.array(test[0])).flatten(2).to(device), torch.as_tensor(test[1]).to(device)),
        }
        self.num_examples = {split: len(labels) for split, (_, labels) in self._evaluation.items()}

    def _windowed(self, images: Tensor) -> Tensor:
        """Every crop of every image (N, H, W, C): (N, rows, columns, H, W * C), by the corner of the crop."""
        channels, height, width = self.input_shape
        padding = self._padding
        # All crops are views of the padded images. So one indexing operation makes a batch.
        if self._padding_mode == "reflect":
            around_rows, around_columns = (
                torch.arange(-padding, side + padding, device=images.device) for side in (height, width)
            )
            padded = images[:, _mirrored(around_rows, height)][:, :, _mirrored(around_columns, width)]
        else:
            padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        padded = padded.contiguous()  # both keep the layout of their input, and the strides are of this one
        rows, columns, size = height + 2 * padding, width + 2 * padding, 2 * padding + 1
        strides = (rows * columns * channels, columns * channels, channels, columns * channels, 1)
        return padded.as_strided((len(images), size, size, height, width * channels), strides)

    def _augmented(self, indices: Tensor, generator: Generator) -> list[Tensor]:
        """Index, crop offsets and flip of each image. They are drawn for all images at once, which is faster."""
        size = 2 * self._padding + 1
        rows, columns = torch.randint(0, size, (2, len(indices)), generator=generator)
        flips = torch.rand(len(indices), generator=generator) < 0.5
        return [tensor.to(self._device) for tensor in (indices, rows, columns, flips)]

    def _plain(self, indices: Tensor) -> list[Tensor]:
        """The same tensors, for images without augmentation."""
        middle = torch.full_like(indices, self._padding)
        return [tensor.to(self._device) for tensor in (indices, middle, middle, torch.zeros_like(indices).bool())]

    def _images(
        self, windows: Tensor, drawn: Sequence[Tensor], part: slice | Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        indices, rows, columns, flips = (tensor[part] for tensor in drawn)
        pixels = windows[indices, rows, columns]
        if self._flip:  # before the normalisation, while a value has one byte and not four
            channels, height, width = self.input_shape
            images = pixels.view(-1, height, width, channels)
            pixels = torch.where(flips.view(-1, 1, 1, 1), images.flip(2), images).view(pixels.shape)
        return self._normalise(pixels, dtype)

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        """One epoch of augmented training batches in random order. Begins with batch `start`.

        No batch depends on `start`. A last batch of one image is left out.
        """
        tables = self.tables(order, augment)
        for step in range(start, num_steps(len(self._labels), batch_size)):
            part = slice(step * batch_size + self._share.rank, (step + 1) * batch_size, self._share.size)
            yield self.gather(tables, part)

    def in_epoch(self, number: int, image_size: int | None = None) -> "Resident":
        """The data in an epoch, where flips may alternate. Images have one size."""
        if self._first_flips is None:
            return self
        data = copy.copy(self)
        data._epoch = number
        return data

    def tables(self, order: Generator, augment: Generator) -> list[Tensor]:
        """The tables of an epoch: label, index, crop offsets and flip of each image, in random order."""
        permutation = torch.randperm(len(self._labels), generator=order)
        drawn = self._augmented(permutation, augment)
        if self._first_flips is not None:
            drawn[-1] = self._first_flips[permutation].logical_xor(torch.tensor(self._epoch % 2 == 0)).to(self._device)
        return [self._labels[permutation].to(self._device), *drawn]

    def gather(self, tables: Sequence[Tensor], positions: slice | Tensor) -> Batch:
        """The augmented training images at some positions of an epoch, and their labels."""
        labels, *drawn = tables
        return self._images(self._windows, drawn, positions), labels[positions]

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every image of a split once, without augmentation, in a fixed order."""
        pixels, labels = self._evaluation[split]
        for start in range(self._share.rank * batch_size, len(labels), self._share.size * batch_size):
            part = slice(start, start + batch_size)
            yield self._normalise(pixels[part].contiguous()), labels[part]

    def draw(
        self, examples: ScoringData, generator: Generator, dtype: torch.dtype, change: Change | None = None
    ) -> Batches:
        """Training images for scoring; see core.Data."""
        indices = choose_examples(self._labels, self.num_classes, examples, generator)
        windows, labels = self._windows, self._labels[indices].to(self._device)
        if change is not None:
            channels, height, width = self.input_shape
            originals = windows[indices.to(self._device), self._padding, self._padding]
            changed, labels = change(originals.view(-1, height, width, channels), labels)
            windows, indices = self._windowed(changed), torch.arange(len(indices))
        drawn = self._augmented(indices, generator) if examples.augment else self._plain(indices)
        parts = [slice(part.start, part.stop) for part in joined_single(len(labels), examples.batch_size)]

        def images(number: int) -> Tensor:
            return laid_out(self._images(windows, drawn, parts[number], dtype), torch.contiguous_format)

        return Drawn(images, [labels[part] for part in parts])
