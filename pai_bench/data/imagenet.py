"""ImageNet from class folders. Worker processes decode the images while the network trains."""

import copy
import itertools
import logging
import math
from collections.abc import Generator as Source
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from pai_bench.batches import Drawn, joined_single
from pai_bench.core import (
    Batch,
    Batches,
    Change,
    Count,
    DataSettings,
    OfColours,
    ProperFraction,
    ScoringData,
    Shape,
    StdOfColours,
    num_steps,
)
from pai_bench.data.crops import central_crop, random_crop
from pai_bench.data.decode import decode, jpeg_decoder
from pai_bench.data.listing import Files, fingerprint, paired_class_folders
from pai_bench.data.resident import Normalisation, check_ranges
from pai_bench.data.shrunk import build, check
from pai_bench.data.splits import choose_examples, hold_out, require_two
from pai_bench.errors import ConfigError, DataError, LostWorkerError
from pai_bench.system import preemption
from pai_bench.system.layout import laid_out

log = logging.getLogger(__name__)

_NUM_CLASSES, _NUM_TRAIN, _NUM_TEST = 1000, 1_281_167, 50_000
_PIECE = 64  # a worker decodes this many images at a time; with whole batches, the first batch would come late


class _Crops(Dataset[tuple[Tensor, int]]):
    """Decoded, cropped images (size, size, 3) uint8. An item depends only on its own seed, not on the process."""

    def __init__(self, files: Files, indices: Tensor, seeds: Tensor | None, size: int, resize: int) -> None:
        self.files, self.indices, self.seeds, self.size, self.resize = files, indices, seeds, size, resize

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        path, label = self.files[int(self.indices[position])]
        image = decode(path)
        if self.seeds is None:
            return central_crop(image, self.resize, self.size), label
        return random_crop(image, self.size, int(self.seeds[position])), label


def _decoded(crops: _Crops, batches: list[range], num_workers: int, device: torch.device) -> Source[Batch]:
    """Pixels (B, H, W, 3) uint8 and labels, on a device, for batches of positions.

    Worker processes decode them. They end together with this generator.
    """
    pieces = [batch[start : start + _PIECE] for batch in batches for start in range(0, len(batch), _PIECE)]
    # Without a generator of its own, the loader would draw the seeds of its workers from torch's global generator.
    loader = DataLoader(
        crops,
        batch_sampler=pieces,  # type: ignore[arg-type]  # a range is as good as a list
        num_workers=min(num_workers, len(pieces)),
        pin_memory=device.type == "cuda",
        generator=Generator(),
        worker_init_fn=preemption.leave_alone,
    )
    try:
        decoded = iter(loader)
        for batch in batches:
            parts = itertools.islice(decoded, math.ceil(len(batch) / _PIECE))
            on_device = [(tensor.to(device, non_blocking=True) for tensor in part) for part in parts]
            images, labels = (torch.cat(tensors) for tensors in zip(*on_device, strict=True))
            yield images, labels
    except DataError as error:  # a worker sends its whole traceback as the message
        raise DataError(str(error).strip().rpartition("\n")[2].rpartition("DataError: ")[2]) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise LostWorkerError(
            f"num_workers={num_workers}: a process that decodes images was killed, perhaps for want of "
            "memory; the same command goes on from the last checkpoint, with fewer of them if need be"
        ) from error


class _Bytes:
    """The pixels of scoring batches, in the memory of the CPU. Each batch is decoded at its first use."""

    def __init__(self, decoded: Source[Batch], number: int) -> None:
        self._decoded, self._number = decoded, number
        self._batches: list[Tensor] = []

    def __getitem__(self, number: int) -> Tensor:
        while len(self._batches) <= number:
            self._batches.append(next(self._decoded)[0])
            if len(self._batches) == self._number:
                self._decoded.close()
        return self._batches[number]


@dataclass
class _Epoch:
    """A training epoch that a call of `train` may leave and the next call may continue. Its loader goes on working."""

    batch_size: int
    positions: Tensor
    seeds: Tensor
    step: int  # the next step
    decoded: Source[Batch]

    def goes_on(self, batch_size: int, positions: Tensor, seeds: Tensor, step: int) -> bool:
        """Whether this epoch has the same images in the same order, and `step` comes next."""
        same_step = (self.batch_size, self.step) == (batch_size, step)
        return same_step and torch.equal(self.positions, positions) and torch.equal(self.seeds, seeds)


class Streamed:
    """A core.Data whose images are decoded from files, batch by batch."""

    def __init__(
        self,
        train: Files,
        test: Files,
        num_classes: int,
        place: DataSettings,
        *,
        size: int,
        resize: int,
        validation: ProperFraction,
        mean: OfColours,
        std: StdOfColours,
    ) -> None:
        check_ranges(mean, std)
        for setting, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ConfigError(f"dataset.{setting}={values}: the images have 3 channels; give one for each")
        jpeg_decoder()  # called here, so that its message appears once and not in every worker
        self.input_shape: Shape = (3, size, size)
        self.num_classes, self.regression = num_classes, False
        self.checksum = fingerprint(train, test)
        labels = torch.from_numpy(train.labels)
        train_indices, validation_indices = hold_out(labels, validation)
        self._splits = {
            "train": (train, train_indices),
            "validation": (train, validation_indices),
            "test": (test, torch.arange(len(test))),
        }
        require_two(len(train_indices))
        self._train_labels = labels[train_indices]
        self.num_examples = {split: len(indices) for split, (_, indices) in self._splits.items()}
        self._place = place
        self._size, self._resize = size, resize
        self._normalise = Normalisation(mean, std, size, place.device)
        self._epoch: _Epoch | None = None
        self._other_sizes: dict[int, Streamed] = {}

    def in_epoch(self, number: int, image_size: int | None) -> "Streamed":
        """The data with training images of another size."""
        if image_size is None or image_size == self._size:
            return self
        if image_size not in self._other_sizes:
            data = copy.copy(self)
            data._size, data._epoch = image_size, None
            data._normalise = self._normalise.for_width(image_size)
            self._other_sizes = {image_size: data}  # the others are not needed again soon
        return self._other_sizes[image_size]

    def _decoded(
        self, split: str, positions: Tensor, seeds: Tensor | None, batches: list[range], device: torch.device
    ) -> Source[Batch]:
        files, indices = self._splits[split]
        crops = _Crops(files, indices[positions], seeds, self._size, self._resize)
        return _decoded(crops, batches, self._place.num_workers, device)

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        """One epoch of random resized crops and flips in random order. Begins with batch `start`.

        No batch depends on `start`. A last batch of one image is left out. A call that begins where the last call has
        stopped uses the same worker processes.
        """
        num_images = self.num_examples["train"]
        positions = torch.randperm(num_images, generator=order)
        seeds = torch.randint(2**62, (num_images,), generator=augment)
        steps = range(start, num_steps(num_images, batch_size))
        epoch, self._epoch = self._epoch, None
        if epoch is None or not epoch.goes_on(batch_size, positions, seeds, start):
            rank, size = self._place.share.rank, self._place.share.size
            ends = [min((step + 1) * batch_size, num_images) for step in steps]
            batches = [range(step * batch_size + rank, end, size) for step, end in zip(steps, ends, strict=True)]
            decoded = self._decoded("train", positions, seeds, batches, self._place.device)
            epoch = _Epoch(batch_size, positions, seeds, start, decoded)
        for step in steps:
            assert epoch.step == step, "a later call has gone on with this epoch"
            pixels, labels = next(epoch.decoded)
            epoch.step += 1
            self._epoch = epoch if epoch.step < steps.stop else None
            yield self._normalise(pixels.flatten(2)), labels
            self._epoch = None

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every image of a split once, resized and cropped around the centre, in a fixed order."""
        batches = _chunks(self.num_examples[split], batch_size)[self._place.share.rank :: self._place.share.size]
        everything = torch.arange(self.num_examples[split])
        for pixels, labels in self._decoded(split, everything, None, batches, self._place.device):
            yield self._normalise(pixels.flatten(2)), labels

    def draw(
        self, examples: ScoringData, generator: Generator, dtype: torch.dtype, change: Change | None = None
    ) -> Batches:
        """Training images for scoring, laid out channels first. A single left-over image joins the batch before it.

        All random numbers are drawn at once. A batch is decoded at its first use, and kept as bytes.

        Raises:
            ConfigError: a class, or the training split, has fewer images than wanted; or `change` is given.
        """
        if change is not None:
            raise ConfigError(
                "ablation.images: stored images that are read one by one are of many sizes and are not changed; use an "
                "ablation of what a score sees, such as ablation=random_pixels"
            )
        positions = choose_examples(self._train_labels, self.num_classes, examples, generator)
        seeds = torch.randint(2**62, (len(positions),), generator=generator) if examples.augment else None
        parts = joined_single(len(positions), examples.batch_size)
        pixels = _Bytes(self._decoded("train", positions, seeds, parts, torch.device("cpu")), len(parts))

        def images(number: int) -> Tensor:
            on_device = pixels[number].to(self._place.device)
            return laid_out(self._normalise(on_device.flatten(2), dtype), torch.contiguous_format)

        labels = self._train_labels[positions].to(self._place.device)
        return Drawn(images, [labels[part.start : part.stop] for part in parts])


def _chunks(number: int, size: int) -> list[range]:
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def _listed(folder: Path, subset: bool, cache: Path) -> tuple[int, Files, Files]:
    """The number of classes, the training images and the val images of a folder with train/ and val/."""
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DataError(
                f"dataset=imagenet: there is no folder {folder / part}; ImageNet cannot be downloaded without an "
                "account: give the folder that holds train/<class>/ and val/<class>/ as dataset.root="
            )
    num_classes, train, test = paired_class_folders(folder / "train", folder / "val", cache)
    if (num_classes, len(train), len(test)) != (_NUM_CLASSES, _NUM_TRAIN, _NUM_TEST) and not subset:
        raise DataError(
            f"dataset=imagenet: {folder} has {num_classes:,} classes, {len(train):,} training and {len(test):,} val "
            f"images, not {_NUM_CLASSES:,}, {_NUM_TRAIN:,} and {_NUM_TEST:,}; complete it, or say dataset.subset=true"
        )
    return num_classes, train, test


def imagenet(
    place: DataSettings,
    *,
    root: str | None,
    subset: bool,
    store: Count | None,
    size: Count,
    resize: Count,
    validation: ProperFraction,
    mean: OfColours,
    std: StdOfColours,
) -> Streamed:
    """ImageNet-1k: train/<wnid>/ and val/<wnid>/. val/ is the test split. Training uses random resized crops.

    Args:
        root: the folder that holds train/ and val/. None: `data_dir/imagenet`.
        subset: accept fewer images or classes than the whole set has. Such runs cannot be compared with published
            numbers.
        store: read a smaller copy in `data_dir`, whose images have this many pixels on the shorter side. The copy is
            made if downloads are allowed.
        size: pixels of each side of a crop.
        resize: pixels of the shorter side before the central crop for evaluation.

    Raises:
        DataError: the folders, or the store, are missing or incomplete.

    Reference: Russakovsky et al. 2015, arXiv:1409.0575.
    """
    folder = Path(root).expanduser() if root is not None else place.data_dir / "imagenet"
    if store is not None:
        originals, folder = folder, place.data_dir / f"{folder.resolve().name}-{store}"
        if place.download and originals.is_dir():
            _, *splits = _listed(originals, subset, place.data_dir / "cache")
            build(splits, folder, store, max(place.num_workers, 1))
        if not folder.is_dir():
            raise DataError(
                f"dataset.store={store}: there is no {folder}; run pai-bench data imagenet "
                f"dataset.store={store} dataset.root={originals} --data-dir {place.data_dir}"
            )
    num_classes, train, test = _listed(folder, subset, place.data_dir / "cache")
    if store is not None:
        check([train, test], folder)
    return Streamed(
        train, test, num_classes, place, size=size, resize=resize, validation=validation, mean=mean, std=std
    )
