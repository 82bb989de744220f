"""CIFAR from a folder of images, such as a JPEG copy: written once in the layout of the original files."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from pai_bench.data.decode import decoded
from pai_bench.data.listing import paired_class_folders
from pai_bench.errors import DataError
from pai_bench.system import files


def is_copy(source: Path) -> bool:
    """Whether a folder holds images by split and class: train/<class>/ and test/<class>/."""
    return (source / "train").is_dir() and (source / "test").is_dir()


def write(source: Path, data_dir: Path, kind: type[Any], num_classes: int) -> None:
    """Writes the images of a folder as the pickle files of CIFAR. Classes are numbered by their alphabet, as there.

    The files are not the published ones, so runs need `dataset.verify=false`.

    Args:
        source: holds train/<class>/ and test/<class>/.
        kind: the dataset of torchvision, which knows the names of the files.

    Raises:
        DataError: a file is no image, an image has another size than 32x32, or there are other classes.
    """
    found, train, test = paired_class_folders(source / "train", source / "test")
    if found != num_classes:
        raise DataError(f"--from {source}: it has {found} classes, and {kind.__name__} has {num_classes}")
    images = decoded(source.resolve().name, {"train": train, "test": test}, None, data_dir)
    for split, parts in (("train", kind.train_list), ("test", kind.test_list)):
        pixels, labels = images[split]
        if pixels.shape[1:] != (32, 32, 3):
            shown = "x".join(map(str, pixels.shape[1:3]))
            raise DataError(f"--from {source}: its images have {shown} pixels, and those of {kind.__name__} have 32x32")
        of_parts = np.array_split(np.random.default_rng(0).permutation(len(labels)), len(parts))
        for (name, _), chosen in zip(parts, of_parts, strict=True):
            rows = np.ascontiguousarray(pixels[chosen].transpose(0, 3, 1, 2)).reshape(len(chosen), -1)
            _put(data_dir / kind.base_folder / name, {"data": rows, _labels(kind): labels[chosen].tolist()})
    names = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
    _put(data_dir / kind.base_folder / kind.meta["filename"], {kind.meta["key"]: names})


def _labels(kind: type[Any]) -> str:
    return "fine_labels" if kind.meta["key"].startswith("fine") else "labels"


def _put(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, pickle.dumps(content))
