"""Images: batches of CIFAR's size that lie in memory, and photographs that are decoded."""

import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks import textbook
from benchmarks.measure import clocked, in_turn
from benchmarks.subjects import MEAN, STD, Setting, parts, pixels
from benchmarks.table import Row
from pai_bench import assembly
from pai_bench.core import Data
from pai_bench.data.decode import decode
from pai_bench.launch import compose


def textbook_loader(num_images: int, batch_size: int, workers: int = 0) -> "DataLoader[Any]":
    """The images of `subjects.synthetic` as the peers load them."""
    return textbook.cifar_loader(pixels(num_images, 32), np.arange(num_images) % 10, MEAN, STD, batch_size, workers)


def _walk(data: Data, batch_size: int) -> None:
    """Takes an epoch of training batches."""
    for _ in data.train(batch_size, Generator(), Generator()):
        pass


def _decode(files: list[Path]) -> None:
    for file in files:
        decode(file)


def batches(setting: Setting) -> Iterator[Row]:
    """Augmented batches of 128 from memory against a DataLoader and PIL."""
    few, many = (128, 256) if setting.quick else (1280, 12_800)
    of = parts(setting.device, num_train=many)
    loader = textbook_loader(few, 128)
    size = many * 3 * 32 * 32
    times = in_turn(
        {
            "ours": clocked(partial(_walk, of.data, 128), setting.device),
            "published": clocked(partial(deque, loader, maxlen=0), setting.device),
        },
        1 if setting.quick else 5,
    )
    took = times.seconds("ours")
    yield Row(
        "images/s of resident CIFAR batches over DataLoader and PIL",
        times.ratio("published", "ours") * many / few,
        target=15,
        goal=40,
        time=took,
        lower_bound=setting.rates.lower_bound(moved=size * (1 + 4)),
        note=f"{many / took:,.0f} images/s over {few / times.seconds('published'):,.0f}; the time is for {many:,}",
    )


def _photograph(path: Path, seed: int) -> None:
    """Writes smooth noise of a photograph's size and weight as a JPEG."""
    generator = Generator().manual_seed(seed)
    height, width = (375, 500) if seed % 4 else (500, 375)
    image = sum(
        F.interpolate(torch.randn(1, 3, side, side, generator=generator), size=(height, width), mode="bicubic") / octave
        for octave, side in enumerate((4, 16, 64, 256), start=1)
    )
    assert isinstance(image, torch.Tensor)
    scaled = (128 + 50 * image[0]).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scaled).save(path, "JPEG", quality=90)


def photographs(setting: Setting) -> Iterator[Row]:
    """Random crops of photographs on one core, as they are and from a copy of short side 256, against PIL."""
    number, size = (4, 64) if setting.quick else (64, 224)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "photographs"
            for index in range(number):
                _photograph(root / "train" / f"n{index % 2}" / f"{index}.JPEG", index)
            for index in range(2):
                _photograph(root / "val" / f"n{index}" / f"{index}.JPEG", index)
            yield from _photographs(setting, root, number, size)
    finally:
        torch.set_num_threads(threads)


def _photographs(setting: Setting, root: Path, number: int, size: int) -> Iterator[Row]:
    paths = sorted((root / "train").rglob("*.JPEG"))
    common = (
        "dataset=imagenet",
        "dataset.subset=true",
        f"dataset.root={root}",
        f"dataset.size={size}",
        "num_workers=0",
        f"data_dir={root.parent}",
        "model=resnet50",
        "training=imagenet",
    )
    stores = {"as they are": (), "from a store of short side 256": ("dataset.store=256", "download=true")}
    loaded: dict[str, Data] = {
        name: assembly.load_data(compose.compose([*common, *more]), setting.device) for name, more in stores.items()
    }
    folders = {"as they are": root, "from a store of short side 256": root.parent / f"{root.name}-256"}
    variants = {name: clocked(partial(_walk, data, 32), setting.device) for name, data in loaded.items()}
    for name, folder in folders.items():
        files = sorted((folder / "train").rglob("*.JPEG"))
        variants[f"decode {name}"] = clocked(partial(_decode, files), setting.device)
    loader = textbook.imagenet_loader(paths, size, 32)
    variants["published"] = clocked(partial(deque, loader, maxlen=0), setting.device)
    times = in_turn(variants, 1 if setting.quick else 5)
    for name, target in zip(stores, (1.3, 3.0), strict=True):
        took = times.seconds(name)
        yield Row(
            f"crops of photographs {name}, one core, over PIL",
            times.ratio("published", name),
            target=target,
            time=took / number,
            lower_bound=times.seconds(f"decode {name}") / number,
            note=f"{number / took:,.0f} images/s over {number / times.seconds('published'):,.0f}; "
            "the lower bound is the decoder alone",
        )
