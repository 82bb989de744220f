"""CIFAR-10 and CIFAR-100 through torchvision, in the layout and with the checksums of the original archives."""

import pickle
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from pai_bench.core import Place
from pai_bench.data.archives import unpickle
from pai_bench.data.resident import Images, Resident, check_ranges, lock
from pai_bench.errors import DataError
from pai_bench.ranges import NonNegativeInt, OfColours, ProperFraction, StdOfColours

_UNREADABLE = (  # what pickles that are cut, damaged or of something else raise
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, ImportError,
    pickle.UnpicklingError,
)  # fmt: skip


def cifar10(
    place: Place,
    *,
    validation: ProperFraction,
    mean: OfColours,
    std: StdOfColours,
    padding: NonNegativeInt,
    padding_mode: Literal["reflect"] | None,
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
    check_ranges(mean, std, padding)
    from torchvision.datasets import CIFAR10

    train, test = _read(CIFAR10, "cifar10", place, verify)
    return Resident(
        train, test, 10, place,
        validation=validation, mean=mean, std=std, padding=padding, padding_mode=padding_mode, flip=flip,
    )  # fmt: skip


def cifar100(
    place: Place,
    *,
    validation: ProperFraction,
    mean: OfColours,
    std: StdOfColours,
    padding: NonNegativeInt,
    padding_mode: Literal["reflect"] | None,
    flip: bool,
    verify: bool,
) -> Resident:
    """CIFAR-100: as CIFAR-10, with a hundred fine classes."""
    check_ranges(mean, std, padding)
    from torchvision.datasets import CIFAR100

    train, test = _read(CIFAR100, "cifar100", place, verify)
    return Resident(
        train, test, 100, place,
        validation=validation, mean=mean, std=std, padding=padding, padding_mode=padding_mode, flip=flip,
    )  # fmt: skip


def _read(kind: type[Any], name: str, place: Place, verify: bool) -> tuple[Images, Images]:
    """The training and the test images."""
    if not verify:
        files = [[file, None] for file, _ in (*kind.train_list, *kind.test_list)]
        cut = len(kind.train_list)
        unchecked = {"train_list": files[:cut], "test_list": files[cut:], "meta": {**kind.meta, "md5": None}}
        kind = type(kind.__name__, (kind,), unchecked)
    try:
        train, test = _parts(kind, place)
    except _UNREADABLE as error:
        if not place.download:
            reason = f" ({error})" if isinstance(error, pickle.UnpicklingError) else ""
            raise DataError(
                f"dataset={name}: {kind.base_folder} is missing or damaged in {place.data_dir}{reason}; run "
                f"python scripts/prepare_data.py {name} --data-dir {place.data_dir}, or say where it is with data_dir="
            ) from error
        try:
            with lock(place.data_dir, name):
                _opened(kind, place, download=True)
            train, test = _parts(kind, place)
        except _UNREADABLE as unfetched:
            raise DataError(
                f"dataset={name}: {kind.url} cannot be fetched ({unfetched}); fetch it elsewhere and run "
                f"python scripts/prepare_data.py {name} --from {kind.filename}"
            ) from unfetched
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))


def _parts(kind: type[Any], place: Place) -> tuple[Any, Any]:
    """The training and the test part of files that lie there."""
    return _opened(kind, place, train=True), _opened(kind, place, train=False)


def _opened(kind: type[Any], place: Place, **settings: bool) -> Any:
    """torchvision's dataset, whose pickles can name nothing but data."""
    import torchvision.datasets.cifar as theirs

    own = theirs.pickle
    theirs.pickle = SimpleNamespace(load=unpickle)
    try:
        return kind(place.data_dir, **settings)
    finally:
        theirs.pickle = own
