"""Helpers of the tests of data: datasets of a few images, written as their publishers do."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from PIL import Image

from pai_bench import assembly
from pai_bench.core import Data, DataSettings, Shard
from pai_bench.data.imagenet import Streamed
from pai_bench.data.resident import Resident

CPU = torch.device("cpu")


def load(*overrides: str, data_dir: Path) -> Any:
    return assembly.load_data(composed("num_workers=0", *overrides, f"data_dir={data_dir}"), CPU)


def save_image(path: Path, seed: int, size: tuple[int, int] = (16, 12), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def image_folder(root: Path, test: str = "test", size: tuple[int, int] = (16, 16)) -> Path:
    for part, number in (("train", 5), (test, 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(number):
                save_image(root / part / name / f"{i}.png", 100 * label + i + (50 if part == test else 0), size)
    return root


def all_images(data: Data, split: str) -> torch.Tensor:
    return torch.cat([images for images, _ in data.evaluation(split, 4)])


def all_labels(data: Data, split: str) -> list[int]:
    return torch.cat([labels for _, labels in data.evaluation(split, 4)]).tolist()


ALL = Shard()


def numbered(num_train: int, share: Shard = ALL, **settings: Any) -> Resident:
    """Images whose every pixel names the image and the place: (image, row, column) in the three channels."""

    def images(number: int) -> np.ndarray:
        out = np.zeros((number, 6, 5, 3), np.uint8)
        out[..., 0] = np.arange(1, number + 1)[:, None, None]
        out[..., 1] = np.arange(1, 7)[:, None]
        out[..., 2] = np.arange(1, 6)
        return out

    defaults = {"validation": 0.0, "mean": [0.0] * 3, "std": [1 / 255] * 3, "padding": 2, "flip": True}
    labels = np.arange(num_train) % 3
    place = DataSettings(Path(), False, CPU, 0, share)
    test = images(4), np.array([0, 1, 2, 0])
    return Resident((images(num_train), labels), test, 3, place, **(defaults | settings))


def cifar_files(root: Path, name: str) -> dict[str, np.ndarray]:
    """The pickles of the original archives, each with twenty images."""
    generator = np.random.default_rng(0)
    folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    ten = name == "cifar10"
    key, classes = ("labels", 10) if ten else ("fine_labels", 100)
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    pixels = {}
    for file in files:
        pixels[file] = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = [int(label) for label in (np.arange(20) * 5 if not ten else np.arange(20)) % classes]
        (folder / file).write_bytes(pickle.dumps({"data": pixels[file], key: labels}))
    names = {"label_names" if ten else "fine_label_names": [str(i) for i in range(classes)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(names))
    return pixels


def mnist_files(root: Path) -> np.ndarray:
    """The four unpacked files, with thirty training and twenty test images; returns the latter."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, number in (("train", 30), ("t10k", 20)):
        pixels = generator.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", (np.arange(number) % 10).astype(np.uint8))):
            header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return pixels


def tiny_files(data_dir: Path) -> Path:
    """The original layout: 200 classes, two training images each, three annotated validation images."""
    root = data_dir / "tiny-imagenet-200"
    wnids = [f"n{i:08d}" for i in range(200)]
    for i, wnid in enumerate(wnids):
        for j in range(2):
            save_image(root / "train" / wnid / "images" / f"{wnid}_{j}.JPEG", 2 * i + j, (64, 64))
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)))
    lines = []
    for i, label in enumerate((7, 0, 199)):
        save_image(root / "val" / "images" / f"val_{i}.JPEG", 1000 + i, (64, 64), "L" if i == 1 else "RGB")
        lines.append(f"val_{i}.JPEG\t{wnids[label]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def aged(root: Path) -> None:
    """Folders that were last modified an hour ago."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, (time.time() - 3600,) * 2)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for part, number in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(("n01", "n02")):
            for i in range(number):
                mode = "L" if i == 0 else "RGB"
                save_image(tmp_path / "imagenet" / part / wnid / f"{i}.JPEG", 10 * label + i, (300, 400 - 30 * i), mode)
    return tmp_path


def imagenet(data_dir: Path, *overrides: str) -> Streamed:
    return load("dataset=imagenet", "dataset.subset=true", *overrides, data_dir=data_dir)


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours, as photographs have and noise has not."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
