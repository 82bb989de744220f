"""Lists the images in class folders. Listings are cached, because a folder may hold a million files."""

import hashlib
import io
import logging
import os
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from pai_bench.errors import DataError
from pai_bench.system.files import write_atomically

log = logging.getLogger(__name__)

SUFFIXES = {"jpg", "jpeg", "png", "bmp", "webp", "ppm", "tif", "tiff"}
_SETTLED_SECONDS = 60.0  # a folder that changed more recently is not cached: clocks differ, and times are coarse


@dataclass(frozen=True)
class Files:
    """Labelled images of class folders, in order of class and name.

    These are arrays, because a million path objects would take ten times the memory in each process that decodes.
    """

    root: Path
    names: np.ndarray  # (N,) bytes, below root: <class>/<file>
    sizes: np.ndarray  # (N,) int64, in bytes
    modified: np.ndarray  # (N,) int64, when files were last written, in nanoseconds
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Path, int]:
        return self.root / os.fsdecode(self.names[index]), int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[Path, int]]:
        return (self[index] for index in range(len(self)))


def is_image(name: str) -> bool:
    """Whether a file name has the ending of an image."""
    stem, _, suffix = name.rpartition(".")
    return stem != "" and suffix.lower() in SUFFIXES


Found = tuple[str, int, int]  # name, size in bytes, time of the last change in nanoseconds


def _scanned(folder: Path, prefix: str, passed_over: list[str], times: dict[str, int]) -> list[Found]:
    """The images in a folder and below it, in the order of the file system. `prefix` is put before their names.

    Adds to `passed_over` the names of hidden entries and of files that are no images. Writes into `times` when each
    folder was last modified.

    Raises:
        DataError: an image is a link to nothing.
    """
    times[prefix] = folder.stat().st_mtime_ns  # taken before the folder is read, so that a later change is noticed
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                passed_over.append(prefix + entry.name)
            elif entry.is_dir(follow_symlinks=False):
                found += _scanned(folder / entry.name, f"{prefix}{entry.name}/", passed_over, times)
            elif is_image(entry.name):
                found.append((prefix + entry.name, *_size_and_time(entry)))
            else:
                passed_over.append(prefix + entry.name)
    return found


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Size and time of modification of an image. A link also counts as modified when it was made."""
    try:
        file, link = entry.stat(), entry.stat(follow_symlinks=False)  # without a link, one system call gives both
    except OSError as error:
        raise DataError(f"{entry.path}: not a readable image ({error.strerror}); restore or remove the file") from error
    return file.st_size, max(file.st_mtime_ns, link.st_mtime_ns)


def _place_of(cache: Path, root: Path, folders: Sequence[str] = ()) -> Path:
    """The cache file for the listing of a folder, or of some folders in it."""
    digest = hashlib.sha256(b"\0".join([os.fsencode(root.resolve()), *map(os.fsencode, folders)])).hexdigest()
    return cache / f"listing-{root.resolve().parent.name}-{root.name}-{digest[:12]}.npz"


def _cached(file: Path, root: Path) -> tuple[list[str], Files] | None:
    """The listing in a cache file, or None if the file is not whole or a folder has been modified since."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            names, sizes, modified, labels, classes, folders, times = (
                arrays[key] for key in ("names", "sizes", "modified", "labels", "classes", "folders", "times")
            )
        whole = (
            names.dtype.kind == classes.dtype.kind == folders.dtype.kind == "S"
            and sizes.dtype == modified.dtype == labels.dtype == times.dtype == np.int64
            and len(names) == len(sizes) == len(modified) == len(labels) > 0
            and len(folders) == len(times) > 0
            and 0 <= labels.min() <= labels.max() < len(classes)
        )
        if not whole or any(
            (root / os.fsdecode(folder)).stat().st_mtime_ns != time_then
            for folder, time_then in zip(folders.tolist(), times.tolist(), strict=True)
        ):
            return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return [os.fsdecode(name) for name in classes.tolist()], Files(root, names, sizes, modified, labels)


def _write_cache(file: Path, classes: list[str], files: Files, times: dict[str, int]) -> None:
    """Caches a listing for later runs, unless a folder was modified a moment ago."""
    if not len(files) or max(times.values()) > (time.time() - _SETTLED_SECONDS) * 1e9:
        return
    content = io.BytesIO()
    np.savez(
        content,
        names=files.names,
        sizes=files.sizes,
        modified=files.modified,
        labels=files.labels,
        times=np.array(list(times.values())),
        classes=np.array([os.fsencode(name) for name in classes]),
        folders=np.array([os.fsencode(name) for name in times]),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())
    except OSError as error:
        log.info("the listing of %s is made anew by every run: %s cannot be written (%s)", files.root, file, error)


def class_folders(root: Path, cache: Path | None = None) -> tuple[list[str], Files]:
    """Sorted names of the class folders in `root`, and every image file in them with the index of its class.

    Hidden folders and files, and files that are no images, are skipped; one log line counts them.

    Args:
        cache: the folder for cached listings. A cached listing is used until a folder is modified. Replacing the
            content of a file does not modify its folder.

    Raises:
        DataError: there are no class folders, or one of them holds no image, or an image cannot be read.
    """
    file = _place_of(cache, root) if cache is not None else None
    if file is not None and (cached := _cached(file, root)) is not None:
        return cached
    times = {"": root.stat().st_mtime_ns} if root.is_dir() else {}
    entries = list(os.scandir(root)) if root.is_dir() else []
    classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{root}: expected one folder of images for each class, found none")
    files = _files_of(root, classes, sorted({entry.name for entry in entries} - set(classes)), times)
    number = np.bincount(files.labels, minlength=len(classes))
    if not number.all():
        raise DataError(f"{root / classes[number.argmin()]}: the class folder holds no image")
    if file is not None:
        _write_cache(file, classes, files, times)
    return classes, files


def images_in(root: Path, folders: list[str], cache: Path) -> Files:
    """Every image file in some folders below `root`. Its label is the index of its folder in the list.

    A folder may be missing. Skips the same files as class_folders, and uses `cache` in the same way.

    Raises:
        DataError: an image cannot be read.
    """
    file = _place_of(cache, root, folders)
    if (cached := _cached(file, root)) is not None:
        return cached[1]
    times = {  # of the folders above them too, which change when a missing folder appears
        str(above): (root / above).stat().st_mtime_ns
        for folder in folders
        for above in PurePath(folder).parents
        if (root / above).is_dir()
    }
    files = _files_of(root, folders, [], times)
    _write_cache(file, folders, files, times)
    return files


def _files_of(root: Path, folders: list[str], passed_over: list[str], times: dict[str, int]) -> Files:
    """The images in folders below `root`, sorted within each folder. One log line counts what is skipped.

    Args:
        passed_over: what is skipped already.
        times: receives the time when each folder was last modified.

    Raises:
        DataError: an image cannot be read.
    """
    found: list[Found] = []
    labels: list[int] = []
    for label, name in enumerate(folders):
        if (root / name).is_dir():
            images = _scanned(root / name, f"{name}/", passed_over, times)
            found += sorted(images, key=lambda image: image[0].split("/"))
            labels += [label] * len(images)
    if passed_over:
        number, nouns = len(passed_over), "file or folder" if len(passed_over) == 1 else "files and folders"
        log.info("%s: passed over %d hidden or other %s, %s first", root, number, nouns, passed_over[0])
    names = np.array([os.fsencode(name) for name, _, _ in found], dtype=np.bytes_)
    sizes, modified = (np.array([image[i] for image in found], dtype=np.int64) for i in (1, 2))
    return Files(root, names, sizes, modified, np.array(labels, dtype=np.int64))


def paired_class_folders(train: Path, test: Path, cache: Path | None = None) -> tuple[int, Files, Files]:
    """The number of classes, and the labelled files of two folders with the same class folders.

    Args:
        cache: as in class_folders.

    Raises:
        DataError: the two folders have different classes, or one is incomplete, or there is only one class.
    """
    (classes, train_files), (test_classes, test_files) = class_folders(train, cache), class_folders(test, cache)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise DataError(f"{train.parent}: {odd[0]} is a class of only one of {train.name}/ and {test.name}/")
    if len(classes) == 1:
        raise DataError(
            f"{train}: {classes[0]} is the only class, so there is nothing to tell apart; give the folder whose train/ "
            "holds one folder of images for each class"
        )
    return len(classes), train_files, test_files


def fingerprint(*splits: Files) -> str:
    """A checksum of file names, sizes and labels. It distinguishes versions of a folder without reading the images."""
    digest = hashlib.sha256()
    for files in splits:
        for name, size, label in zip(files.names.tolist(), files.sizes.tolist(), files.labels.tolist(), strict=True):
            digest.update(b"%b %d %d\n" % (b"/".join(name.rsplit(b"/", 2)[-2:]), size, label))
    return digest.hexdigest()
