"""Image files -> pixels: one by one, or all in one array, kept in a cache that any number of processes may share."""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchcodec.decoders import decode_jpeg

from pai_bench.data.resident import Images, lock, remove_unfinished
from pai_bench.errors import DataError

log = logging.getLogger(__name__)

Listing = Sequence[tuple[Path, int]]  # file, label

_QUALITY = 90  # of the JPEGs that `shrink` writes: 28 kB each, and no faster to decode below it


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


def decode(path: Path) -> Tensor:
    """The image in a file, as (H, W, 3) uint8 RGB: of a JPEG by torchcodec, of any other by PIL.

    A JPEG that torchcodec does not take is PIL's too: it reads what lacks only its last bytes, or says what is wrong.

    Raises:
        DataError: the file is damaged or is no image.
    """
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error.strerror}); restore or remove the file") from error
    if data.startswith(b"\xff\xd8"):
        # torchcodec turns an image as its EXIF says; PIL and the literature leave it as it is. Without the bytes that
        # it begins with it is no EXIF.
        exif = data.find(b"Exif\0\0", 0, data.find(b"\xff\xda"))
        if exif >= 0:
            data[exif + 6 : exif + 10] = bytes(4)
        with suppress(RuntimeError):
            image: Tensor = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8))
            return image.permute(1, 2, 0)
    return torch.as_tensor(np.array(open_image(path)))


def shrink(path: Path, target: Path, side: int) -> None:
    """Writes the image in a file as a JPEG whose shorter side has `side` pixels, or a copy where it has no more.

    Raises:
        DataError: the file is damaged or is no image.
    """
    image = open_image(path)
    temporary = target.with_name(f".{target.name}.tmp")
    if (short := min(image.size)) <= side:
        shutil.copyfile(path, temporary)
    else:
        width, height = (side * length // short for length in image.size)
        image.resize((width, height), Image.Resampling.BILINEAR).save(temporary, "JPEG", quality=_QUALITY)
    temporary.replace(target)


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
                remove_unfinished(cache.parent)
                building = cache.with_name(f"{cache.name}.building")
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
                for split, listing in splits.items():
                    _decode(listing, size, building / f"{split}.npy")
                building.rename(cache)
    return {
        split: (np.load(cache / f"{split}.npy", mmap_mode="r"), np.array([label for _, label in listing]))
        for split, listing in splits.items()
    }
