"""MNIST through torchvision, in the layout of the original files."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from pai_bench.core import DataSettings, NonNegativeInt, OfGrey, ProperFraction, StdOfGrey
from pai_bench.data.locks import lock
from pai_bench.data.resident import Flip, Images, Resident
from pai_bench.errors import DataError

# MD5 of the unpacked files. torchvision knows only those of the packed files.
_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

_UNREADABLE = (RuntimeError, ValueError, AssertionError, OSError)


def mnist(
    place: DataSettings,
    *,
    validation: ProperFraction,
    mean: OfGrey,
    std: StdOfGrey,
    padding: NonNegativeInt,
    flip: Flip,
    verify: bool,
) -> Resident:
    """MNIST: 60,000 training and 10,000 test images of 28x28, greyscale, ten classes.

    Args:
        verify: check the published checksums. If false, other files in the same layout are accepted.

    Raises:
        DataError: the files are missing or damaged.

    Reference: LeCun et al. 1998, Gradient-based learning applied to document recognition.
    """
    train, test = _read(place, verify)
    return Resident(train, test, 10, place, validation=validation, mean=mean, std=std, padding=padding, flip=flip)


def _read(place: DataSettings, verify: bool) -> tuple[Images, Images]:
    """The training and the test images."""
    from torchvision.datasets import MNIST

    folder = place.data_dir / "MNIST" / "raw"

    def parts() -> tuple[Any, Any]:
        train, test = (MNIST(place.data_dir, train=part) for part in (True, False))
        if verify:
            _check(folder)
        return train, test

    try:
        train, test = parts()
    except _UNREADABLE as error:
        if not place.download:
            raise DataError(
                f"dataset=mnist: {folder} is missing or damaged; run "
                f"pai-bench data mnist --data-dir {place.data_dir}, or say where it is with data_dir="
            ) from error
        try:
            with lock(place.data_dir, "mnist"):
                if verify:
                    _remove_damaged(folder)
                MNIST(place.data_dir, download=True)
            train, test = parts()
        except _UNREADABLE as unfetched:
            raise DataError(
                f"dataset=mnist: it cannot be fetched ({unfetched}); fetch it elsewhere and run "
                "pai-bench data mnist --from MNIST, the folder that holds raw/ with the four files"
            ) from unfetched
    return _arrays(train), _arrays(test)


def _check(folder: Path) -> None:
    for name in _FILES:
        if not _is_published(folder / name):
            raise OSError(f"{folder / name} is not the published file")


def _is_published(path: Path) -> bool:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == _FILES[path.name]


def _remove_damaged(folder: Path) -> None:
    """Removes files that are not the published ones: torchvision fetches none if all four are there."""
    for path in (folder / name for name in _FILES):
        if path.is_file() and not _is_published(path):
            path.unlink()


def _arrays(part: Any) -> Images:
    return part.data.numpy()[..., np.newaxis], part.targets.numpy()
