"""CIFAR-10 and CIFAR-100 through torchvision, in the layout and with the checksums of the original archives."""

from typing import Any

import numpy as np

from pai_bench.core import Place
from pai_bench.data.resident import Images, Resident, lock
from pai_bench.errors import DataError
from pai_bench.ranges import NonNegativeInt, OfColours, ProperFraction, StdOfColours


def cifar10(
    place: Place,
    *,
    validation: ProperFraction,
    mean: OfColours,
    std: StdOfColours,
    padding: NonNegativeInt,
    flip: bool,
    verify: bool,
) -> Resident:
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32, ten classes.

    Args:
        verify: check the files against the published checksums; false accepts other files in the same layout.

    Raises:
        DataError: the files are missing or damaged.

    Reference: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    from torchvision.datasets import CIFAR10

    train, test = _read(CIFAR10, "cifar10", place, verify)
    return Resident(train, test, 10, place, validation=validation, mean=mean, std=std, padding=padding, flip=flip)


def cifar100(
    place: Place,
    *,
    validation: ProperFraction,
    mean: OfColours,
    std: StdOfColours,
    padding: NonNegativeInt,
    flip: bool,
    verify: bool,
) -> Resident:
    """CIFAR-100: as CIFAR-10, with a hundred fine classes."""
    from torchvision.datasets import CIFAR100

    train, test = _read(CIFAR100, "cifar100", place, verify)
    return Resident(train, test, 100, place, validation=validation, mean=mean, std=std, padding=padding, flip=flip)


def _read(kind: type[Any], name: str, place: Place, verify: bool) -> tuple[Images, Images]:
    """The training and the test images."""
    if not verify:
        files = [[file, None] for file, _ in (*kind.train_list, *kind.test_list)]
        cut = len(kind.train_list)
        unchecked = {"train_list": files[:cut], "test_list": files[cut:], "meta": {**kind.meta, "md5": None}}
        kind = type(kind.__name__, (kind,), unchecked)
    try:
        if place.download:
            with lock(place.data_dir, name):
                kind(place.data_dir, download=True)
        train, test = (kind(place.data_dir, train=part) for part in (True, False))
    except (RuntimeError, EOFError, OSError) as error:
        if place.download:
            raise DataError(
                f"dataset={name}: {kind.url} cannot be fetched ({error}); fetch it elsewhere and run "
                f"python scripts/prepare_data.py {name} --from {kind.filename}"
            ) from error
        raise DataError(
            f"dataset={name}: {kind.base_folder} is missing or damaged in {place.data_dir}; run "
            f"python scripts/prepare_data.py {name} --data-dir {place.data_dir}, or say where it is with data_dir="
        ) from error
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))
