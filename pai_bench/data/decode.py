"""Image files -> one uint8 array, decoded once and kept in a cache that any number of processes may share."""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pai_bench.data.resident import Images, lock
from pai_bench.errors import DataError

log = logging.getLogger(__name__)

Listing = Sequence[tuple[Path, int]]  # file, label

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def open_image(path: Path) -> Image.Image:
    """The image in a file, as RGB.

    Raises:
        DataError: the file is damaged or is no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error}); restore or remove the file") from error


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and below it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def class_folders(root: Path) -> tuple[list[str], Listing]:
    """Sorted names of the class folders under `root`, and every image file with the index of its class.

    Raises:
        DataError: there are no class folders, or one of them holds no image.
    """
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    if not classes:
        raise DataError(f"{root}: expected one folder of images for each class, found none")
    listing: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        files = image_files(root / name)
        if not files:
            raise DataError(f"{root / name}: the class folder holds no image")
        listing += [(file, label) for file in files]
    return classes, listing


def paired_class_folders(train: Path, test: Path) -> tuple[int, Listing, Listing]:
    """Number of classes and the labelled files of two folders of class folders.

    Raises:
        DataError: the two have different classes, or one is incomplete.
    """
    (classes, train_files), (test_classes, test_files) = class_folders(train), class_folders(test)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise DataError(f"{train.parent}: {odd[0]} is a class of only one of {train.name}/ and {test.name}/")
    return len(classes), train_files, test_files


def fingerprint(listing: Listing) -> str:
    """A checksum of file names, sizes and labels: it tells versions of a folder apart without reading the images."""
    digest = hashlib.sha256()
    for path, label in listing:
        digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size} {label}\n".encode())
    return digest.hexdigest()


def _cache_key(splits: dict[str, Listing]) -> str:
    """Tells apart what may hold other pixels: another place, or a file written at another time."""
    digest = hashlib.sha256()
    for split, listing in splits.items():
        for path, label in listing:
            status = path.stat()
            digest.update(f"{split} {path.resolve()} {status.st_size} {status.st_mtime_ns} {label}\n".encode())
    return digest.hexdigest()[:12]


def _square(path: Path, size: int | None) -> np.ndarray:
    """The image in a file as (H, W, 3) uint8; given a size, resized and cropped around its centre to that size."""
    image = open_image(path)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _decode(listing: Listing, size: int | None, target: Path) -> None:
    first = _square(listing[0][0], size)
    images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(len(listing), *first.shape))

    def place(index: int) -> None:
        image = _square(listing[index][0], size)
        if image.shape != first.shape:
            raise DataError(
                f"{listing[index][0]}: {image.shape[1]}x{image.shape[0]} pixels where {listing[0][0].name} has "
                f"{first.shape[1]}x{first.shape[0]}; give dataset.size=<pixels> to bring all images to one size"
            )
        images[index] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(place, range(len(listing))):
            pass
    images.flush()


def decoded(name: str, splits: dict[str, Listing], size: int | None, data_dir: Path) -> dict[str, Images]:
    """Images and labels of each split, memory-mapped from `data_dir/cache`, decoded on first use.

    One process decodes while others that start at the same time wait; a build that is interrupted leaves no cache.

    Raises:
        DataError: a file is no image, or sizes differ and none was given.
    """
    cache = data_dir / "cache" / f"{name}-{size or 'as_is'}-{_cache_key(splits)}"
    if not cache.is_dir():
        with lock(cache.parent, cache.name):
            if not cache.is_dir():  # another process may have built it while this one waited
                log.info("decoding %d images of %s, once, into %s", sum(map(len, splits.values())), name, cache)
                building = cache.with_suffix(".building")
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
                for split, listing in splits.items():
                    _decode(listing, size, building / f"{split}.npy")
                building.rename(cache)
    return {
        split: (np.load(cache / f"{split}.npy", mmap_mode="r"), np.array([label for _, label in listing]))
        for split, listing in splits.items()
    }
