"""CIFAR-10 and CIFAR-100 in the layout of the original archives. Names and checksums come from torchvision."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from pai_bench.core import DataSettings, OfColours, PaddingOf32, ProperFraction, StdOfColours
from pai_bench.data.archives import md5, unpack, unpickle
from pai_bench.data.locks import lock
from pai_bench.data.resident import Flip, Images, Resident, Standardize
from pai_bench.errors import DataError

_UNREADABLE = (  # the errors of pickles that are cut, damaged, or hold something else
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, ImportError,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One of the two datasets."""

    name: str  # of the class of torchvision that knows its files
    num_classes: int

    def files(self) -> type[Any]:
        """The class of torchvision."""
        from torchvision import datasets

        return cast("type[Any]", getattr(datasets, self.name))


KINDS = {"cifar10": Kind("CIFAR10", 10), "cifar100": Kind("CIFAR100", 100)}


def cifar10(
    place: DataSettings,
    *,
    validation: ProperFraction,
    mean: OfColours | None,
    std: StdOfColours | None,
    standardize: Standardize,
    padding: PaddingOf32,
    padding_mode: Literal["reflect"] | None,
    flip: Flip,
    verify: bool,
) -> Resident:
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32, ten classes.

    Args:
        verify: check the published checksums. If false, other files in the same layout are accepted.

    Raises:
        DataError: the files are missing or damaged.

    Reference: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    train, test = _read("cifar10", place, verify)
    return Resident(
        train,
        test,
        KINDS["cifar10"].num_classes,
        place,
        validation=validation,
        mean=mean,
        std=std,
        standardize=standardize,
        padding=padding,
        padding_mode=padding_mode,
        flip=flip,
    )


def cifar100(
    place: DataSettings,
    *,
    validation: ProperFraction,
    mean: OfColours | None,
    std: StdOfColours | None,
    standardize: Standardize,
    padding: PaddingOf32,
    padding_mode: Literal["reflect"] | None,
    flip: Flip,
    verify: bool,
) -> Resident:
    """CIFAR-100: like CIFAR-10, with 100 fine classes."""
    train, test = _read("cifar100", place, verify)
    return Resident(
        train,
        test,
        KINDS["cifar100"].num_classes,
        place,
        validation=validation,
        mean=mean,
        std=std,
        standardize=standardize,
        padding=padding,
        padding_mode=padding_mode,
        flip=flip,
    )


def _read(name: str, place: DataSettings, verify: bool) -> tuple[Images, Images]:
    """The training and the test images."""
    kind = KINDS[name].files()
    try:
        return _parts(kind, place.data_dir, verify)
    except _UNREADABLE as error:
        if not place.download:
            reason = f" ({error})" if isinstance(error, pickle.UnpicklingError) else ""
            raise DataError(
                f"dataset={name}: {kind.base_folder} is missing or damaged in {place.data_dir}{reason}; run "
                f"pai-bench data {name} --data-dir {place.data_dir}, or say where it is with data_dir="
            ) from error
        try:
            with lock(place.data_dir, name):
                _fetch(kind, place.data_dir, verify)
            return _parts(kind, place.data_dir, verify)
        except _UNREADABLE as unfetched:
            raise DataError(
                f"dataset={name}: {kind.url} cannot be fetched ({unfetched}); fetch it elsewhere and run "
                f"pai-bench data {name} --from {kind.filename}"
            ) from unfetched


def _check(kind: type[Any], data_dir: Path, verify: bool) -> None:
    """Checks that the files exist and, with `verify`, that they are the published files.

    Raises:
        OSError: a file is missing or different.
    """
    for name, published in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        file = data_dir / kind.base_folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        if verify and md5(file) != published:
            raise OSError(f"{file} is not the published file")


def _fetch(kind: type[Any], data_dir: Path, verify: bool) -> None:
    """Downloads and unpacks the archive, unless its files exist by now."""
    from torchvision.datasets.utils import download_url

    try:
        _check(kind, data_dir, verify)
    except OSError:
        download_url(kind.url, str(data_dir), kind.filename, kind.tgz_md5)
        unpack(data_dir / kind.filename, data_dir)


def _parts(kind: type[Any], data_dir: Path, verify: bool) -> tuple[Images, Images]:
    """The training and the test images from existing files."""
    _check(kind, data_dir, verify)
    folder = data_dir / kind.base_folder
    train, test = (_part([folder / name for name, _ in files]) for files in (kind.train_list, kind.test_list))
    return train, test


def _part(files: list[Path]) -> Images:
    """The images and labels in some pickle files. They are read without running code."""
    data, labels = [], []
    for file in files:
        with file.open("rb") as opened:
            entry = unpickle(opened, encoding="latin1")
        data.append(entry["data"])
        labels += entry["labels"] if "labels" in entry else entry["fine_labels"]
    images = np.vstack(data).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(f"{files[0]}: {len(images)} images of {images.dtype} and {len(labels)} labels")
    return images, np.array(labels)
