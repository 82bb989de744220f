"""Tiny-ImageNet in its original layout."""

import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from pai_bench.core import DataSettings, OfColours, PaddingOf64, ProperFraction, StdOfColours
from pai_bench.data.archives import PUBLISHED_MD5, unpack
from pai_bench.data.decode import decoded
from pai_bench.data.listing import Files, images_in
from pai_bench.data.locks import lock
from pai_bench.data.resident import Flip, Resident
from pai_bench.errors import DataError

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_FOLDER = "tiny-imagenet-200"
_NUM_CLASSES, _NUM_TRAIN, _NUM_TEST = 200, 100_000, 10_000


def tiny_imagenet(
    place: DataSettings,
    *,
    subset: bool,
    validation: ProperFraction,
    mean: OfColours,
    std: StdOfColours,
    padding: PaddingOf64,
    flip: Flip,
    padding_mode: Literal["reflect"] | None,
) -> Resident:
    """Tiny-ImageNet: 100,000 training images of 64x64 in 200 classes. The 10,000 images of val/ are the test split.

    The listing and the decoded images are cached in `data_dir/cache` until a folder is modified. Replacing the content
    of a file does not modify its folder: remove the cache after that.

    Args:
        subset: accept fewer images than the whole set has. Such runs cannot be compared with published numbers.

    Raises:
        DataError: the folder is missing, incomplete or damaged.

    Reference: Le and Yang 2015, Tiny ImageNet visual recognition challenge. Its own test labels are unpublished, so
        the literature tests on val/.
    """
    root = place.data_dir / _FOLDER
    if not root.is_dir() and place.download:
        _download(place.data_dir)
    splits = _listings(root, place.data_dir / "cache")
    found = (len(splits["train"]), len(splits["test"]))
    if found != (_NUM_TRAIN, _NUM_TEST) and not subset:
        raise DataError(
            f"dataset=tiny_imagenet: {root} has {found[0]:,} of {_NUM_TRAIN:,} training and {found[1]:,} of "
            f"{_NUM_TEST:,} test images; complete it, or say dataset.subset=true"
        )
    images = decoded("tiny_imagenet", splits, None, place.data_dir)
    return Resident(
        images["train"],
        images["test"],
        _NUM_CLASSES,
        place,
        validation=validation,
        mean=mean,
        std=std,
        padding=padding,
        padding_mode=padding_mode,
        flip=flip,
    )


def _download(data_dir: Path) -> None:
    from torchvision.datasets.utils import download_url

    with lock(data_dir, "tiny_imagenet"):
        if not (data_dir / _FOLDER).is_dir():
            try:
                download_url(_URL, str(data_dir), md5=PUBLISHED_MD5["tiny_imagenet"])
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"dataset=tiny_imagenet: {_URL} cannot be fetched ({error}); fetch it elsewhere and run "
                    "pai-bench data tiny_imagenet --from tiny-imagenet-200.zip"
                ) from error
            unpacked = data_dir / ".tiny-imagenet-unpacking"
            shutil.rmtree(unpacked, ignore_errors=True)
            unpack(data_dir / Path(_URL).name, unpacked)
            (unpacked / _FOLDER).rename(data_dir / _FOLDER)
            unpacked.rmdir()


def _listings(root: Path, cache: Path) -> dict[str, Files]:
    """Files and labels of both splits. Classes are numbered by the sorted names in wnids.txt."""
    wnids, annotations = root / "wnids.txt", root / "val" / "val_annotations.txt"
    for file in (wnids, annotations):
        if not file.is_file():
            raise DataError(
                f"dataset=tiny_imagenet: {file} is missing; run pai-bench data tiny_imagenet "
                f"--data-dir {root.parent}, or say where the folder {_FOLDER} is with data_dir="
            )
    classes = {wnid: label for label, wnid in enumerate(sorted(wnids.read_text().split()))}
    if len(classes) != _NUM_CLASSES:
        raise DataError(f"{wnids}: {len(classes)} classes where {_NUM_CLASSES} belong; restore the file")
    train = images_in(root / "train", [f"{wnid}/images" for wnid in classes], cache)
    test = _annotated(images_in(root / "val", ["images"], cache), annotations, classes)
    if not len(train) or not len(test):
        raise DataError(f"dataset=tiny_imagenet: {root} holds no {'test' if len(train) else 'training'} images")
    return {"train": train, "test": test}


def _annotated(files: Files, annotations: Path, classes: dict[str, int]) -> Files:
    """The annotated files, in the order of the annotations and with their labels."""
    places = {os.fsdecode(name.rpartition(b"/")[2]): i for i, name in enumerate(files.names.tolist())}
    chosen, labels = [], []
    for line in annotations.read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        if wnid not in classes:
            raise DataError(f"{annotations}: {wnid} is not in wnids.txt; restore the files")
        if name in places:
            chosen.append(places[name])
            labels.append(classes[wnid])
    kept = np.array(chosen, dtype=np.int64)
    return Files(
        files.root, files.names[kept], files.sizes[kept], files.modified[kept], np.array(labels, dtype=np.int64)
    )
