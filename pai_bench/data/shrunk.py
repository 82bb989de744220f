"""A copy of a folder of images with fewer pixels. It takes less space, and decodes faster."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pai_bench.data.decode import shrink
from pai_bench.data.listing import Files, fingerprint, paired_class_folders
from pai_bench.data.locks import lock
from pai_bench.errors import DataError
from pai_bench.system.files import write_json

log = logging.getLogger(__name__)

_RECORD = "store.json"  # checksums of the originals and of the copies


def build(originals: list[Files], store: Path, side: int, num_threads: int) -> None:
    """Copies the images of each split to its folder in `store`, resized to a shorter side of `side` pixels.

    One process works; others that start at the same time wait. An interrupted build goes on with the missing images.
    The store gets its name when it is complete. Small images are copied unchanged.

    Raises:
        DataError: a file is no image, or the store holds copies of other images.
    """
    source = fingerprint(*originals)
    if _is_built(store, source, originals):  # also before the lock, because a complete store may be read-only
        return
    with lock(store.parent, store.name):
        if _is_built(store, source, originals):
            return
        building = store.with_name(f"{store.name}.building")
        if building.is_dir() and _record(building).get("source") != source:
            shutil.rmtree(building)
        building.mkdir(exist_ok=True)
        write_json(building / _RECORD, {"source": source})
        log.info("copying %d images into %s", sum(map(len, originals)), store)
        for files in originals:
            _copy(files, building / files.root.name, side, num_threads)
        _, *copies = paired_class_folders(*(building / files.root.name for files in originals))
        for files, copied in zip(originals, copies, strict=True):
            if not np.array_equal(files.names, copied.names):
                raise DataError(f"{building / files.root.name}: files were added or removed meanwhile; start again")
        write_json(building / _RECORD, {"source": source, "copies": fingerprint(*copies)})
        building.rename(store)


def _is_built(store: Path, source: str, originals: list[Files]) -> bool:
    if store.is_dir() and _record(store).get("source") != source:
        raise DataError(f"{store}: made from other images than {originals[0].root.parent} holds now; remove it")
    return store.is_dir()


def _copy(files: Files, target: Path, side: int, num_threads: int) -> None:
    """Makes the missing copies of a split."""
    bounds = np.flatnonzero(np.diff(files.labels, prepend=-1, append=-1))

    def copy_class(start: int, stop: int) -> None:
        for index in range(start, stop):
            path, _ = files[index]
            copied = target / path.relative_to(files.root)
            copied.parent.mkdir(parents=True, exist_ok=True)
            if not (copied.is_file() and copied.stat().st_size):  # a power cut leaves empty files
                shrink(path, copied, side)

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(copy_class, bounds[:-1].tolist(), bounds[1:].tolist()):
            pass


def _record(store: Path) -> dict[str, str]:
    try:
        record: dict[str, str] = json.loads((store / _RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record


def check(copies: list[Files], store: Path) -> None:
    """Checks that a store is unchanged since it was built.

    Raises:
        DataError: files are missing, were added, or have another length.
    """
    if _record(store).get("copies") != fingerprint(*copies):
        raise DataError(f"{store}: not what pai-bench data put there; copy it anew, or remove it and build it")
