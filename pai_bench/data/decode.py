"""Decodes image files: one by one, or all into one array in a cache that many processes may share."""

import errno
import hashlib
import logging
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pai_bench.data.listing import Files
from pai_bench.data.locks import lock, remove_unfinished
from pai_bench.data.resident import Images
from pai_bench.errors import ConfigError, DataError, UserError

log = logging.getLogger(__name__)

_QUALITY = 90  # of the JPEGs that `shrink` writes: 28 kB each. A lower quality does not decode faster.

_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2  # two tags of TIFF, and a value of the second tag

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the size of a JPEG stands after one of these markers
_BARE = {*range(0xD0, 0xDB)}  # markers without a length, and the marker of the pixels


@cache
def jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchcodec's decoder of JPEGs. None, with one log line, if it is not installed; PIL then decodes them.

    Raises:
        ConfigError: torchcodec is installed, but cannot be loaded.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except ModuleNotFoundError as error:
        if error.name not in ("torchcodec", "torchcodec.decoders"):
            raise _broken_torchcodec() from error
        log.info("torchcodec is not installed: PIL decodes JPEGs; pixels can differ by rounding, a level or two of 255")
        return None
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken_torchcodec() from error
    decoder: Callable[[Tensor], Tensor] = decode_jpeg
    return decoder


def _broken_torchcodec() -> ConfigError:
    return ConfigError(
        f"torchcodec is installed but cannot be loaded beside torch {torch.__version__}: install the version that is "
        "made for it, or remove it (pip uninstall torchcodec) and PIL reads JPEGs"
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB. Of wider integers it takes the highest eight bits, like PIL for 16-bit colours.

    Raises:
        ValueError: the range of the pixels is unknown, or pixels lie outside it.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose white is not known; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    bits = _bits_of_white(image)
    values = np.asarray(image).astype(np.int64)
    if bits == 32:
        values &= 0xFFFFFFFF  # PIL stores unsigned integers as signed ones
    if values.min() < 0 or values.max() >> bits:
        raise ValueError(f"its pixels lie outside 0 to {2**bits - 1}; save it with 8 or 16 bits")
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")


def _bits_of_white(image: Image.Image) -> int:
    """The number of bits of the brightest possible pixel of an integer image."""
    tags = getattr(image, "tag_v2", None)  # only TIFF has tags; the other formats have at most 16 bits
    if tags is None:
        return 16
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    return bits - 1 if tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED else bits


def open_image(path: Path) -> Image.Image:
    """The image in a file, as RGB.

    Raises:
        DataError: the file is damaged, is no image, or has pixels of unknown range or too many.
    """
    try:
        with Image.open(path) as image:
            return _as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # for damaged files, PIL raises many kinds of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable image ({reason}); restore or remove the file") from error


def _is_modest(jpeg: bytearray) -> bool:
    """Whether a JPEG states its size, and PIL would accept that number of pixels.

    A small file can decode to gigabytes of pixels. Opening every file with PIL for this check would cost a few percent
    of the time.
    """
    at = 2
    while at + 9 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", jpeg, at + 5)
            most = Image.MAX_IMAGE_PIXELS
            return most is None or height * width <= 2 * most
        if marker == 0xFF:  # a filler byte
            at += 1
        elif marker < 0xC0 or marker in _BARE:
            return False
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return False


def decode(path: Path) -> Tensor:
    """The image in a file, as (H, W, 3) uint8 RGB. torchcodec decodes JPEGs if it is installed; PIL decodes the rest.

    PIL also gets JPEGs that torchcodec refuses or that are very large. PIL reads a file that lacks only its last
    bytes, and explains what is wrong with other files.

    Raises:
        DataError: the file is damaged, is no image, or has too many pixels.
    """
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error.strerror}); restore or remove the file") from error
    if data.startswith(b"\xff\xd8") and (decode_jpeg := jpeg_decoder()) is not None and _is_modest(data):
        # torchcodec rotates an image according to its EXIF data; PIL and the literature do not. Overwriting its first
        # bytes hides the EXIF data.
        exif = data.find(b"Exif\0\0", 0, data.find(b"\xff\xda"))
        if exif >= 0:
            data[exif + 6 : exif + 10] = bytes(4)
        with suppress(RuntimeError):
            image: Tensor = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8))
            return image.permute(1, 2, 0)
    return torch.as_tensor(np.array(open_image(path)))


def shrink(path: Path, target: Path, side: int) -> None:
    """Writes the image in a file as a JPEG whose shorter side has `side` pixels. A smaller image is copied unchanged.

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


def _cache_key(splits: dict[str, Files]) -> str:
    """A key of the files by place, size, time and label. It changes whenever pixels may have changed."""
    digest = hashlib.sha256()
    for split, files in splits.items():
        resolved = cache(lambda folder, root=files.root: os.path.realpath(root / os.fsdecode(folder)))  # links may move
        listed = (array.tolist() for array in (files.names, files.sizes, files.modified, files.labels))
        for path, size, modified, label in zip(*listed, strict=True):
            folder, _, name = path.rpartition(b"/")
            file = b"%b/%b" % (os.fsencode(resolved(folder)), name)
            digest.update(b"%b %b %d %d %d\n" % (split.encode(), file, size, modified, label))
    return digest.hexdigest()[:12]


def _square(path: Path, size: int | None) -> np.ndarray:
    """The image in a file as (H, W, 3) uint8. With a size, it is resized and cropped around its centre to that size."""
    image = open_image(path)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _reserve(file: Path) -> None:
    """Reserves the disk space of an empty file. Else writing to the mapped file on a full disk would kill the process.

    Raises:
        UserError: there is too little space.
    """
    with file.open("r+b") as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(
                    f"{file}: no space for {size / 1e9:.3g} GB of decoded images ({error.strerror}); make room, or "
                    "give another place with data_dir="
                ) from error
            # Other errors: this file system cannot reserve space, so the file is written without.


def _decode(listing: Files, size: int | None, target: Path) -> None:
    first = _square(listing[0][0], size)
    images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(len(listing), *first.shape))
    _reserve(target)

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


def decoded(name: str, splits: dict[str, Files], size: int | None, data_dir: Path) -> dict[str, Images]:
    """Images and labels of each split, memory-mapped from `data_dir/cache`. They are decoded at the first use.

    One process decodes; others that start at the same time wait. An interrupted build leaves no cache.

    Raises:
        DataError: a file is no image, or the sizes differ and `size` is None.
    """
    built = data_dir / "cache" / f"{name}-{size or 'as_is'}-{_cache_key(splits)}"
    if not built.is_dir():
        with lock(built.parent, built.name):
            if not built.is_dir():  # another process may have built it while this one waited
                log.info("decoding %d images of %s, once, into %s", sum(map(len, splits.values())), name, built)
                remove_unfinished(built.parent)
                building = built.with_name(f"{built.name}.building")
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
                for split, listing in splits.items():
                    _decode(listing, size, building / f"{split}.npy")
                building.rename(built)
    return {split: (_loaded(built / f"{split}.npy", len(files), size), files.labels) for split, files in splits.items()}


def _loaded(file: Path, number: int, size: int | None) -> np.ndarray:
    """The images of a split, from a cache file.

    Raises:
        DataError: the file is damaged, or holds images of another shape.
    """
    try:
        images: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: the cache is damaged; remove {file.parent}") from error
    sides = images.shape[1:3] if size is None else (size, size)
    if images.dtype != np.uint8 or images.shape != (number, *sides, 3):
        raise DataError(
            f"{file}: the cache holds {images.shape} and not {number} images of 3 channels"
            f"{'' if size is None else f' and {size}x{size} pixels'}; remove {file.parent}"
        )
    return images
