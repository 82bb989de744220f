"""Every way of holding data, on small files made here in the real formats."""

import builtins
import errno
import hashlib
import multiprocessing
import os
import pickle
import runpy
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from conftest import ROOT, composed
from PIL import Image
from torch import Generator
from torch.utils.data import DataLoader

from pai_bench import assembly
from pai_bench.core import Data, DataSettings, Drawn, ScoringData, Shard, labels_of, num_steps
from pai_bench.data import archives, decode, resident, tiny_imagenet
from pai_bench.data.digits import digits
from pai_bench.data.imagenet import Streamed
from pai_bench.data.resident import Resident
from pai_bench.errors import ConfigError, DataError, UserError
from pai_bench.pruning import ablations
from pai_bench.system import layout

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


# Held on the device ---------------------------------------------------------------------------------------------------


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


def test_evaluation_gives_every_image_once_in_order_and_unchanged() -> None:
    data = numbered(7)
    images = all_images(data, "test").round()
    assert images.shape == (4, 3, 6, 5)
    assert torch.equal(images[:, 0], torch.arange(1.0, 5.0).view(4, 1, 1).expand(4, 6, 5))
    assert torch.equal(images[:, 1], torch.arange(1.0, 7.0).view(1, 6, 1).expand(4, 6, 5))
    assert torch.equal(images[:, 2], torch.arange(1.0, 6.0).view(1, 1, 5).expand(4, 6, 5))
    assert all_labels(data, "test") == [0, 1, 2, 0]


def test_augmentation_is_a_crop_of_the_zero_padded_image_and_a_flip() -> None:
    data = numbered(40)
    seen = set()
    for epoch in range(40):
        for images, labels in data.train(16, Generator().manual_seed(epoch), Generator().manual_seed(epoch)):
            for image, label in zip(images.round(), labels, strict=True):
                number = int(image[0].max())
                assert int(label) == (number - 1) % 3
                flipped = image.flip(2) if _falls(image[2]) else image
                row, column = _offset(flipped[1].max(1).values, 6), _offset(flipped[2].max(0).values, 5)
                seen.add((row, column, _falls(image[2])))
                assert torch.equal(flipped, _crop(number, row, column))
    assert seen == {(row, column, flip) for row in range(5) for column in range(5) for flip in (False, True)}


def _falls(columns: torch.Tensor) -> bool:
    visible = columns.max(0).values
    visible = visible[visible > 0]
    return bool(visible[0] > visible[-1])


def _offset(visible: torch.Tensor, size: int) -> int:
    """Where a crop starts in the padded image, from the names of the rows (or columns) that it shows."""
    first = int((visible > 0).nonzero()[0])
    return int(visible[first]) - 1 + 2 - first


def _crop(number: int, row: int, column: int) -> torch.Tensor:
    padded = torch.zeros(3, 10, 9)
    padded[0, 2:8, 2:7] = number
    padded[1, 2:8, 2:7] = torch.arange(1.0, 7.0)[:, None]
    padded[2, 2:8, 2:7] = torch.arange(1.0, 6.0)
    return padded[:, row : row + 6, column : column + 5]


def test_an_epoch_shows_every_image_once_and_is_decided_by_its_generators() -> None:
    data = numbered(23, padding=0, flip=False)

    def epoch(order: int, augment: int) -> list[int]:
        batches = data.train(5, Generator().manual_seed(order), Generator().manual_seed(augment))
        return torch.cat([images[:, 0, 0, 0] for images, _ in batches]).round().int().tolist()

    assert sorted(epoch(0, 0)) == list(range(1, 24))
    assert epoch(0, 0) == epoch(0, 1) != epoch(1, 0)


@pytest.mark.parametrize(("num_examples", "steps"), [(20, 4), (21, 4), (22, 5), (24, 5), (25, 5)])
def test_a_trailing_batch_of_one_image_is_left_out(num_examples: int, steps: int) -> None:
    batches = list(numbered(num_examples).train(5, Generator(), Generator()))
    assert len(batches) == steps == num_steps(num_examples, 5)
    assert all(len(labels) > 1 for _, labels in batches)


def test_validation_comes_from_the_training_images_in_equal_shares_and_never_changes() -> None:
    whole, data, again = numbered(60), numbered(60, validation=0.2), numbered(60, validation=0.2)
    assert whole.num_examples == {"train": 60, "validation": 0, "test": 4}
    assert data.num_examples == {"train": 48, "validation": 12, "test": 4}
    train, validation = (set(all_images(data, split)[:, 0, 0, 0].round().tolist()) for split in ("train", "validation"))
    assert len(train) == 48 and len(validation) == 12 and not train & validation
    assert sorted(all_labels(data, "validation")) == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(all_images(data, "validation"), all_images(again, "validation"))


def test_mean_and_deviation_are_measured_on_the_training_images_when_not_given() -> None:
    data = numbered(9, mean=None, std=None)
    images = all_images(data, "train")
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_what_is_given_of_mean_and_deviation_is_used() -> None:
    data = numbered(9, mean=[0.1, 0.2, 0.3], std=None)
    measured = numbered(9, mean=None, std=None)
    shift = all_images(data, "test") - all_images(measured, "test")
    assert (shift.flatten(2).std(2) < 1e-3).all() and shift.abs().min() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": [0.5]}, r"dataset.mean=\[0.5\]: the images have 3 channels"),
        ({"validation": 0.001}, "dataset.validation=0.001: of 9 images it leaves no validation image"),
        ({"validation": 0.99}, "dataset.validation=0.99: of 9 images it leaves no training image"),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbered(9, **settings)


def test_scoring_examples_are_balanced_and_plain_on_request() -> None:
    data = numbered(60)
    batches = data.draw(
        ScoringData(per_class=4, total=None, batch_size=5, augment=False), Generator().manual_seed(0), torch.float32
    )
    labels = torch.cat([labels for _, labels in batches])
    images = torch.cat([images for images, _ in batches])
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    assert labels.tolist() != sorted(labels.tolist())
    plain = all_images(data, "train")
    assert all(any(torch.equal(image, other) for other in plain) for image in images)
    augmented = data.draw(ScoringData(4, None, 5, augment=True), Generator().manual_seed(0), torch.float32)
    assert not all(any(torch.equal(image, other) for other in plain) for image in augmented[0][0])
    other = data.draw(ScoringData(4, None, 5, augment=False), Generator().manual_seed(1), torch.float32)
    assert not torch.equal(other[0][0], batches[0][0])


def test_scoring_examples_in_all_are_drawn_whatever_their_class() -> None:
    data = numbered(60)
    batches = data.draw(ScoringData(None, 60, 60, False), Generator().manual_seed(0), torch.float32)
    assert len({int(image[0].max().round()) for image in batches[0][0]}) == 60


def test_a_total_can_be_balanced_and_a_number_per_class_need_not_be() -> None:
    data = numbered(60)
    ((_, labels),) = data.draw(
        ScoringData(None, 14, 60, False, balanced=True), Generator().manual_seed(0), torch.float32
    )
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    unbalanced = data.draw(ScoringData(4, None, 60, False, balanced=False), Generator().manual_seed(0), torch.float32)
    in_all = data.draw(ScoringData(None, 12, 60, False), Generator().manual_seed(0), torch.float32)
    assert torch.equal(unbalanced[0][0], in_all[0][0])
    assert torch.bincount(unbalanced[0][1]).tolist() != [4, 4, 4]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (ScoringData(None, 2, 5, False, balanced=True), "pruner.scoring_data.total=2: there are 3 classes; give more"),
        (
            ScoringData(21, None, 5, False, balanced=False),
            "pruner.scoring_data.per_class=21: there are 60 training images",
        ),
        (ScoringData(21, None, 5, False), "pruner.scoring_data.per_class=21: class 0 has 20 training images"),
        (ScoringData(None, 61, 5, False), "pruner.scoring_data.total=61: there are 60 training images"),
    ],
)
def test_too_few_images_to_score_are_refused(examples: ScoringData, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbered(60).draw(examples, Generator(), torch.float32)


@pytest.mark.parametrize("augment", [False, True])
def test_scoring_images_are_normalised_in_the_precision_asked_for(augment: bool) -> None:
    data = numbered(60, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])
    raw = numbered(60)  # whose pixels are whole numbers
    examples = ScoringData(None, 9, 4, augment)
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        batches = data.draw(examples, Generator().manual_seed(0), dtype)
        stored = raw.draw(examples, Generator().manual_seed(0), torch.float32)
        for (images, labels), (pixels, same) in zip(batches, stored, strict=True):
            bytes_ = pixels.round().numpy().astype(np.float64)
            expected = (bytes_ / 255 - np.reshape([0.4914, 0.4822, 0.4465], (3, 1, 1))) / np.reshape(
                [0.2023, 0.1994, 0.2010], (3, 1, 1)
            )
            assert images.dtype == dtype and torch.equal(labels, same)
            assert images.stride() == layout.strides(images.shape, torch.contiguous_format)
            np.testing.assert_allclose(images.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_scoring_images_are_made_when_they_are_asked_for_and_are_the_same_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    normalise = resident.Normalisation.__call__
    monkeypatch.setattr(
        resident.Normalisation, "__call__", lambda self, pixels, *rest: (
            made.append(len(pixels)), normalise(self, pixels, *rest))[1],
    )  # fmt: skip

    def invert(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (images + torch.randint(9, images.shape, generator=noise)).byte(), labels

    for change in ((), (invert,)):
        noise = Generator().manual_seed(5)
        batches = numbered(60).draw(ScoringData(None, 12, 5, True), Generator().manual_seed(0), torch.float64, *change)
        drawn = noise.get_state()
        assert [len(labels) for labels in labels_of(batches)] == [5, 5, 2] and len(batches) == 3 and not made
        first, again = list(batches), list(batches)
        assert made == [5, 5, 2, 5, 5, 2]
        assert torch.equal(noise.get_state(), drawn)  # the change is done once, when the images are drawn
        picked = [batches[0], batches[-2], *batches[2:]]
        for one, two, three in zip(first, again, picked, strict=True):
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))
        with pytest.raises(IndexError):
            batches[3]
        made.clear()


@pytest.mark.parametrize(
    ("number", "size", "sizes"),
    [(11, 5, [5, 6]), (12, 5, [5, 5, 2]), (10, 5, [5, 5]), (1, 5, [1]), (6, 5, [6]), (3, 1, [1, 1, 1]), (3, 9, [3])],
)
def test_a_single_left_over_image_joins_the_scoring_batch_before_it(number: int, size: int, sizes: list[int]) -> None:
    batches = numbered(60).draw(ScoringData(None, number, size, False), Generator().manual_seed(0), torch.float32)
    assert [len(images) for images, _ in batches] == [len(labels) for labels in labels_of(batches)] == sizes
    whole = numbered(60).draw(ScoringData(None, number, 60, False), Generator().manual_seed(0), torch.float32)
    assert torch.equal(torch.cat([images for images, _ in batches]), whole[0][0])


def test_random_labels_make_no_image() -> None:
    batches = numbered(60).draw(ScoringData(None, 12, 5, False), Generator().manual_seed(0), torch.float32)
    relabelled = ablations.random_labels(batches, Generator().manual_seed(1))
    assert all(torch.equal(one, two) for (one, _), (two, _) in zip(batches, relabelled, strict=True))
    assert [len(labels) for labels in labels_of(relabelled)] == [5, 5, 2]
    assert not all(map(torch.equal, labels_of(batches), labels_of(relabelled)))
    blind = Drawn(lambda number: pytest.fail("an image was made"), labels_of(batches))
    assert all(map(torch.equal, labels_of(ablations.random_labels(blind, Generator().manual_seed(1))),
                   labels_of(relabelled)))  # fmt: skip


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits_are_the_1797_images_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = load(data_dir=tmp_path)
    assert data.num_examples == {"train": 1438, "validation": 0, "test": 359}
    assert (data.input_shape, data.num_classes) == ((1, 32, 32), 10)
    theirs = load_digits()
    labels = all_labels(data, "train") + all_labels(data, "test")
    assert np.bincount(labels).tolist() == np.bincount(theirs.target).tolist()
    images = torch.cat([all_images(data, "train"), all_images(data, "test")]) * 0.3241 + 0.3059
    assert images.mean().item() == pytest.approx(theirs.images.mean() / 16, abs=0.002)
    train = all_images(data, "train")
    assert abs(train.mean()) < 0.001 and abs(train.std() - 1) < 0.001


# CIFAR ----------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("name", "num_train"), [("cifar10", 100), ("cifar100", 20)])
def test_cifar_reads_the_original_layout(name: str, num_train: int, tmp_path: Path) -> None:
    pixels = cifar_files(tmp_path, name)
    data = load(f"dataset={name}", "dataset.verify=false", data_dir=tmp_path)
    assert data.num_examples == {"train": num_train, "validation": 0, "test": 20}
    mean, std = (torch.tensor(composed(f"dataset={name}").dataset[key]).view(3, 1, 1) for key in ("mean", "std"))
    last = pixels["test_batch" if name == "cifar10" else "test"].reshape(20, 3, 32, 32)
    torch.testing.assert_close(all_images(data, "test"), (torch.as_tensor(last) / 255 - mean) / std)


def test_cifar_checks_the_published_checksums(tmp_path: Path) -> None:
    cifar_files(tmp_path, "cifar10")
    with pytest.raises(DataError, match=r"missing or damaged.*prepare_data.py cifar10 --data-dir"):
        load("dataset=cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_what_to_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"dataset={name}: .*prepare_data.py {name}"):
        load(f"dataset={name}", data_dir=tmp_path)


# MNIST ----------------------------------------------------------------------------------------------------------------


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


def test_mnist_reads_the_original_layout(tmp_path: Path) -> None:
    pixels = mnist_files(tmp_path)
    data = load("dataset=mnist", "dataset.verify=false", data_dir=tmp_path)
    assert data.num_examples == {"train": 30, "validation": 0, "test": 20}
    assert (data.input_shape, data.num_classes) == ((1, 28, 28), 10)
    torch.testing.assert_close(all_images(data, "test"), (torch.as_tensor(pixels)[:, None] / 255 - 0.1307) / 0.3081)
    assert [int(y) for _, labels in data.evaluation("test", 5) for y in labels] == [*range(10), *range(10)]


def test_mnist_that_is_missing_damaged_or_another_is_refused(tmp_path: Path) -> None:
    remedy = "dataset=mnist: .*missing or damaged.*prepare_data.py mnist --data-dir"
    with pytest.raises(DataError, match=remedy):
        load("dataset=mnist", data_dir=tmp_path)
    mnist_files(tmp_path)
    with pytest.raises(DataError, match=remedy):
        load("dataset=mnist", data_dir=tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(DataError, match=remedy):
        load("dataset=mnist", "dataset.verify=false", data_dir=tmp_path)


# Folders of images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder_reads_class_folders(test: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "insects", test)
    data = load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)
    assert data.num_examples == {"train": 15, "validation": 0, "test": 6}
    assert (data.input_shape, data.num_classes) == ((3, 16, 16), 3)
    assert all_labels(data, "test") == [0, 0, 1, 1, 2, 2]
    expected = torch.as_tensor(np.array(Image.open(root / test / "bee" / "1.png")))
    statistics = resident.channel_statistics(np.load(next((tmp_path / "cache").glob("*/train.npy"))))
    pixels = all_images(data, "test")[3].permute(1, 2, 0) * torch.tensor(statistics[1]) + torch.tensor(statistics[0])
    assert torch.equal((pixels * 255).round().byte(), expected)


def test_image_folder_is_named_after_the_folder(tmp_path: Path) -> None:
    cfg = composed("dataset=image_folder", f"dataset.root={tmp_path / 'insects'}")
    assert cfg.dataset.name == "insects"


def test_image_folder_takes_any_size_and_mode(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "insects")
    save_image(root / "train" / "ant" / "wide.jpg", 7, (30, 90))
    save_image(root / "test" / "ant" / "grey.png", 8, (40, 20), "L")
    save_image(root / "test" / "ant" / "palette.png", 9, (8, 8), "P")
    with pytest.raises(DataError, match=r"wide.jpg: 90x30 pixels where 0.png has 16x16; give dataset.size"):
        load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)
    data = load("dataset=image_folder", f"dataset.root={root}", "dataset.size=24", data_dir=tmp_path)
    assert data.input_shape == (3, 24, 24)


def test_a_cache_follows_the_files(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "insects")
    first = load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)
    again = load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)
    assert first.checksum == again.checksum and len(list((tmp_path / "cache").glob("insects-*"))) == 1
    save_image(root / "train" / "ant" / "new.png", 99, (16, 16))
    assert load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path).num_examples["train"] == 16


def test_folders_of_one_name_do_not_share_a_cache(tmp_path: Path) -> None:
    """Bitmaps of one size have equal names and lengths whatever their pixels."""
    for place, seed in (("a", 0), ("b", 1000)):
        for part in ("train", "test"):
            for label, name in enumerate(("ant", "bee")):
                save_image(tmp_path / place / "insects" / part / name / "0.bmp", seed + label, (8, 8))
    roots = [f"dataset.root={tmp_path / place / 'insects'}" for place in ("a", "b")]
    first, second = (load("dataset=image_folder", root, data_dir=tmp_path) for root in roots)
    assert first.checksum != second.checksum
    save_image(tmp_path / "a" / "insects" / "train" / "ant" / "0.bmp", 77, (8, 8))
    assert load("dataset=image_folder", roots[0], data_dir=tmp_path).checksum != first.checksum


@pytest.mark.parametrize("link", ["train", "train/ant", "train/ant/0.bmp"])
def test_a_cache_follows_links(link: str, tmp_path: Path) -> None:
    """Although what they lead to has the same names, lengths and times."""
    for place, seed in (("a", 0), ("b", 1000)):
        for part in ("train", "test"):
            for label, name in enumerate(("ant", "bee")):
                save_image(file := tmp_path / place / part / name / "0.bmp", seed + label, (8, 8))
                os.utime(file, (0, 0))
    shutil.copytree(tmp_path / "a", root := tmp_path / "insects")
    checksums = []
    for place in ("a", "b"):
        if (root / link).is_symlink() or (root / link).is_file():
            (root / link).unlink()
        else:
            shutil.rmtree(root / link)
        (root / link).symlink_to(tmp_path / place / link)
        checksums.append(load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path).checksum)
    assert checksums[0] != checksums[1]


def test_a_damaged_image_is_named_and_leaves_no_cache(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "insects")
    (root / "train" / "bee" / "3.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match=r"bee.3.png: not a readable image.*restore or remove"):
            load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.suffix != ".building"]


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda root: (root / "test").rename(root / "exam"), "there is no folder .*val"),
        (lambda root: (root / "test" / "cat").rename(root / "test" / "dog"), "cat is a class of only one of train/"),
        (lambda root: [file.unlink() for file in (root / "train" / "bee").iterdir()], "bee: the class folder holds no"),
    ],
    ids=["no test", "other classes", "empty class"],
)
def test_an_incomplete_folder_is_refused(breaks: Any, message: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "insects")
    breaks(root)
    with pytest.raises(DataError, match=message):
        load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)


def _load_in_a_process(root: Path, data_dir: Path, results: Any) -> None:
    try:
        results.put(load("dataset=image_folder", f"dataset.root={root}", data_dir=data_dir).checksum)
    except BaseException as error:
        results.put(repr(error))


def test_processes_that_start_together_build_one_cache(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "insects")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_load_in_a_process, args=(root, tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    checksums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert len(checksums) == 1 and len(checksums.pop()) == len(hashlib.sha256().hexdigest())
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


# Tiny-ImageNet --------------------------------------------------------------------------------------------------------


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


def test_tiny_imagenet_reads_the_original_layout(tmp_path: Path) -> None:
    tiny_files(tmp_path)
    data = load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=tmp_path)
    assert data.num_examples == {"train": 400, "validation": 0, "test": 3}
    assert (data.input_shape, data.num_classes) == ((3, 64, 64), 200)
    assert all_labels(data, "test") == [7, 0, 199]
    assert all_labels(data, "train") == sorted([*range(200)] * 2)


def aged(root: Path) -> None:
    """Folders that were last modified an hour ago."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, (time.time() - 3600,) * 2)


def test_tiny_imagenet_keeps_its_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aged(tiny_files(tmp_path))
    first = load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=tmp_path)
    monkeypatch.setattr("pai_bench.data.listing._scanned", lambda *_: pytest.fail("the folders were read again"))
    monkeypatch.setattr("pai_bench.data.decode._decode", lambda *_: pytest.fail("the images were decoded again"))
    again = load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=tmp_path)
    assert again.checksum == first.checksum and again.num_examples == {"train": 400, "validation": 0, "test": 3}


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "train/n00000000/images/n00000000_0.JPEG").unlink(),
        lambda root: save_image(root / "train/n00000000/images/new.JPEG", 1, (64, 64)),
        lambda root: save_image(root / "train/n00000000/images/more/new.JPEG", 1, (64, 64)),
        lambda root: shutil.rmtree(root / "train/n00000000/images"),
        lambda root: shutil.rmtree(root / "train/n00000000"),
        lambda root: save_image(root / "train/n00000198/images/new.JPEG", 1, (64, 64)),
        lambda root: save_image(root / "train/n00000199/images/new.JPEG", 1, (64, 64)),
        lambda root: (root / "wnids.txt").write_text((root / "wnids.txt").read_text().replace("n00000198", "a")),
        lambda root: (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn00000000\n"),
        lambda root: (root / "val/images/val_0.JPEG").unlink(),
    ],
    ids=[
        "removed", "added", "added below", "images removed", "class removed", "images appear", "class appears",
        "other classes", "other annotations", "test image removed",
    ],
)  # fmt: skip
def test_a_kept_listing_of_tiny_imagenet_that_is_stale_is_made_anew(change: Any, tmp_path: Path) -> None:
    root = tiny_files(tmp_path)
    shutil.rmtree(root / "train" / "n00000198" / "images")
    shutil.rmtree(root / "train" / "n00000199")
    (tmp_path / "cache").mkdir()
    aged(root)
    tiny_imagenet._listings(root, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("listing-*.npz"))) == 2
    change(root)
    found = tiny_imagenet._listings(root, tmp_path / "cache")
    fresh = tiny_imagenet._listings(root, tmp_path / "other")
    for split in ("train", "test"):
        assert list(found[split]) == list(fresh[split]) and all(path.is_file() for path, _ in found[split])


def test_labels_go_up_to_the_last_class_even_without_its_images(tmp_path: Path) -> None:
    root = tiny_files(tmp_path)
    for file in (root / "train" / "n00000199" / "images").iterdir():
        file.unlink()
    data = load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=tmp_path)
    assert data.num_classes == 200 and max(all_labels(data, "test")) == 199


def test_an_incomplete_tiny_imagenet_is_refused_unless_asked_for(tmp_path: Path) -> None:
    root = tiny_files(tmp_path)
    with pytest.raises(DataError, match=r"has 400 of 100,000 training and 3 of 10,000 test images.*subset=true"):
        load("dataset=tiny_imagenet", data_dir=tmp_path)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"val_annotations.txt is missing; run python scripts/prepare_data.py"):
        load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=tmp_path)


# ImageNet -------------------------------------------------------------------------------------------------------------


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


def test_imagenet_gives_crops_of_224_pixels(photographs: Path) -> None:
    data = imagenet(photographs)
    assert data.num_examples == {"train": 8, "validation": 0, "test": 4}
    ((images, labels),) = data.evaluation("test", 10)
    assert images.shape == (4, 3, 224, 224) and labels.tolist() == [0, 0, 1, 1]
    from torchvision import transforms

    usual = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    image = usual(Image.open(photographs / "imagenet" / "val" / "n02" / "1.JPEG").convert("RGB"))
    # resizing a tensor and resizing a PIL image round differently, by a level or two of 255
    assert (images[3] - image).abs().max() < 2.5 / 255 / 0.224


def test_imagenet_augmentation_does_not_depend_on_the_number_of_workers(photographs: Path) -> None:
    def epoch(workers: int, augment: int) -> torch.Tensor:
        cfg = composed("dataset=imagenet", "dataset.subset=true", f"data_dir={photographs}", f"num_workers={workers}")
        data = assembly.load_data(cfg, CPU)
        batches = data.train(3, Generator().manual_seed(0), Generator().manual_seed(augment))
        return torch.cat([images for images, _ in batches])

    random = torch.get_rng_state()
    alone, shared, other = epoch(0, 0), epoch(2, 0), epoch(0, 1)
    assert alone.shape == (8, 3, 224, 224)
    assert torch.equal(alone, shared) and not torch.equal(alone, other)
    assert torch.equal(torch.get_rng_state(), random)


def test_imagenet_scoring_examples_are_plain_and_balanced(photographs: Path) -> None:
    data = imagenet(photographs)
    ((images, labels),) = data.draw(ScoringData(3, None, 10, False), Generator().manual_seed(0), torch.float32)
    assert images.shape == (6, 3, 224, 224) and torch.bincount(labels).tolist() == [3, 3]
    plain = torch.cat([images for images, _ in data.evaluation("train", 10)])
    assert all(any(torch.equal(image, other) for other in plain) for image in images)


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_scoring_batches_are_decoded_once_each_when_they_are_asked_for(
    workers: int, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    plain = decode.decode
    monkeypatch.setattr("pai_bench.data.imagenet.decode", lambda path: (decoded.append(path), plain(path))[1])
    data = imagenet(photographs, f"num_workers={workers}")
    batches = data.draw(ScoringData(None, 7, 3, True), Generator().manual_seed(0), torch.float64)
    assert [len(labels) for labels in labels_of(batches)] == [3, 4] and not decoded
    assert not multiprocessing.active_children()
    images, _ = batches[0]
    assert images.dtype == torch.float64 and images.stride() == layout.strides(images.shape, torch.contiguous_format)
    assert len(decoded) == (0 if workers else 3)  # workers have lists of their own
    walks = [list(batches), list(batches)]
    assert len(decoded) == (0 if workers else 7)
    assert not multiprocessing.active_children()
    assert all(torch.equal(a, b) for a, b in zip(*([x for x, _ in walk] for walk in walks), strict=True))
    at_once = data.draw(ScoringData(None, 7, 7, True), Generator().manual_seed(0), torch.float64)
    assert torch.equal(at_once[0][0], torch.cat([images for images, _ in walks[0]]))
    assert torch.equal(at_once[0][1], torch.cat(labels_of(batches)))
    single = data.draw(ScoringData(None, 7, 7, True), Generator().manual_seed(0), torch.float32)
    torch.testing.assert_close(single[0][0].double(), at_once[0][0], rtol=1e-6, atol=1e-6)


def test_imagenet_goes_on_with_the_loader_where_training_stopped(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[DataLoader[Any]] = []
    monkeypatch.setattr(
        "pai_bench.data.imagenet.DataLoader",
        lambda *args, **rest: loaders.append(DataLoader(*args, **rest)) or loaders[-1],
    )

    def epoch(start: int, stop: int, augment: int = 0) -> list[Any]:
        batches = data.train(2, Generator().manual_seed(0), Generator().manual_seed(augment), start)
        return [batch for _, batch in zip(range(start, stop), batches, strict=False)]

    data = imagenet(photographs, "num_workers=2")
    whole, other = epoch(0, 4), epoch(0, 4, augment=1)
    assert len(loaders) == 2 and len(whole) == 4
    assert not multiprocessing.active_children()  # at the end of an epoch

    def check(batches: list[Any], expected: list[Any]) -> None:
        assert len(batches) == len(expected)
        assert all(
            torch.equal(a, b) for one, two in zip(batches, expected, strict=True) for a, b in zip(one, two, strict=True)
        )

    loaders.clear()
    check([*epoch(0, 1), *epoch(1, 3), *epoch(3, 4)], whole)
    assert len(loaders) == 1 and not multiprocessing.active_children()
    loaders.clear()
    check(epoch(0, 2), whole[:2])
    assert len(multiprocessing.active_children()) == 2
    check(epoch(2, 3, augment=1), other[2:3])  # the step fits, the images are others
    check(epoch(1, 2, augment=1), other[1:2])  # the images fit, the clock was put back
    check(epoch(2, 4, augment=1), other[2:])
    assert len(loaders) == 3 and not multiprocessing.active_children()
    epoch(0, 1)
    assert len(multiprocessing.active_children()) == 2
    data = imagenet(photographs)
    assert not multiprocessing.active_children()  # processes end with the dataset


def test_a_loader_that_failed_is_not_gone_on_with(photographs: Path) -> None:
    data = imagenet(photographs)
    file = photographs / "imagenet" / "train" / "n01" / "1.JPEG"
    whole = file.read_bytes()
    list(zip(range(1), data.train(1, Generator().manual_seed(0), Generator()), strict=False))
    file.write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        list(data.train(1, Generator().manual_seed(0), Generator(), 1))
    file.write_bytes(whole)
    assert len(list(data.train(1, Generator().manual_seed(0), Generator(), 1))) == 7


def test_an_incomplete_imagenet_is_refused_unless_asked_for(photographs: Path) -> None:
    with pytest.raises(DataError, match=r"has 2 classes, 8 training and 4 val images, not 1,000"):
        load("dataset=imagenet", data_dir=photographs)
    with pytest.raises(DataError, match=r"there is no folder .*elsewhere.train.*dataset.root="):
        load("dataset=imagenet", f"dataset.root={photographs / 'elsewhere'}", data_dir=photographs)


def test_a_place_says_nothing_of_the_data() -> None:
    """Where images lie and how they are decoded is no part of a run's identity: DataSettings hold nothing else."""
    assert set(DataSettings.__dataclass_fields__) == {"data_dir", "download", "device", "num_workers", "share"}


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": [0.2, 0.0, 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"std": [0.2, -1.0, 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"std": [0.2, float("nan"), 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"std": [0.2, float("inf"), 0.2]}, "dataset.std=.*give numbers above 0"),
        ({"mean": [0.2, float("nan"), 0.2]}, "dataset.mean=.*give finite numbers"),
        ({"padding": 5}, "dataset.padding=5: the images have 5x6 pixels; give 0 to 4"),
        ({"padding": 6, "padding_mode": "reflect"}, "dataset.padding=6: the images have 5x6 pixels; give 0 to 4"),
        ({"padding": -1}, "dataset.padding=-1: the images have 5x6 pixels; give 0 to 4"),
    ],
)
def test_values_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbered(9, **settings)


def test_a_wrong_deviation_is_found_before_the_data_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.std=\[0\.?0?\]"):
        load("dataset=mnist", "dataset.std=[0.0]", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("dataset", "size"), [("digits", 32), ("cifar10", 32), ("cifar100", 32), ("tiny_imagenet", 64)]
)
def test_a_padding_of_a_whole_image_is_found_before_the_data_is_looked_for(dataset: str, size: int) -> None:
    composed(f"dataset={dataset}", f"dataset.padding={size - 1}")
    with pytest.raises(ConfigError, match=rf"^dataset.padding={size}: give one in \[0, {size - 1}\]$"):
        composed(f"dataset={dataset}", f"dataset.padding={size}")


def test_a_padding_of_a_whole_image_of_a_folder(tmp_path: Path) -> None:
    wrong = ["dataset=image_folder", "dataset.size=8", "dataset.padding=8", f"dataset.root={tmp_path / 'nowhere'}"]
    with pytest.raises(ConfigError, match=r"^dataset.padding=8: the images have 8x8 pixels; give 0 to 7$"):
        load(*wrong, data_dir=tmp_path)


@pytest.mark.parametrize("value", range(0, 256, 5))  # rounding must not give any of them a deviation
def test_a_channel_of_one_value_is_named(value: int) -> None:
    images = np.zeros((4, 6, 5, 3), np.uint8)
    images[..., 0] = images[..., 2] = np.arange(5)
    images[..., 1] = value
    place, labels = DataSettings(Path(), False, CPU, 0), np.array([0, 1, 0, 1])
    settings: dict[str, Any] = {"validation": 0.0, "mean": None, "std": None, "padding": 0, "flip": False}
    with pytest.raises(ConfigError, match=r"dataset.std: channel 1 has one value"):
        Resident((images, labels), (images, labels), 2, place, **settings)


def test_one_training_image_is_too_few() -> None:
    with pytest.raises(ConfigError, match="1 training image is too few"):
        numbered(1)


def test_a_reflected_border_is_that_of_torchvision() -> None:
    from torchvision.transforms.functional import pad

    data = numbered(3, padding=3, padding_mode="reflect", flip=False)
    image = all_images(numbered(3), "train")[1].round()
    padded = pad(image, [3, 3, 3, 3], padding_mode="reflect")
    for row in range(7):
        for column in range(7):
            crop = data._windows[1, row, column].view(6, 5, 3).permute(2, 0, 1)
            assert torch.equal(crop.float(), padded[:, row : row + 6, column : column + 5])


def test_black_borders_rename_no_run() -> None:
    plain = composed("dataset=cifar10", "training=cifar")
    without = {**plain, "dataset": {k: v for k, v in plain["dataset"].items() if k != "padding_mode"}}
    reflected = composed("dataset=cifar10", "training=cifar", "dataset.padding_mode=reflect")
    assert plain.id == without.id != reflected.id


# What image files hold ------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, bits: int, rows: bytes, text: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + text + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 100, "png", (100, 100, 100)),
        ("LA", (100, 50), "png", (100, 100, 100)),
        ("P", 0, "png", (10, 20, 30)),
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 5), "png", (10, 20, 30)),
        ("CMYK", (0, 100, 0, 20), "tiff", (235, 143, 235)),
        ("I;16", 25700, "png", (100, 100, 100)),
        ("I;16", 65535, "tiff", (255, 255, 255)),
        ("I;16", 0, "tiff", (0, 0, 0)),
        ("I", 2**31 - 1, "tiff", (255, 255, 255)),
        ("I", 100 << 23, "tiff", (100, 100, 100)),
        ("I", -1, "tiff", "its pixels lie outside 0 to 2147483647"),
        ("F", 0.5, "tiff", "its pixels are floats, whose white is not known"),
    ],
)
def test_the_pixel_of_each_mode(mode: str, value: Any, suffix: str, expected: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (2, 2), value)
    if mode == "P":
        image.putpalette([10, 20, 30] + [0] * 765)
    image.save(file := tmp_path / f"image.{suffix}")
    if isinstance(expected, str):
        with pytest.raises(
            DataError, match=rf"image.tiff: not a readable image \({expected}; save it with 8 or 16 bits"
        ):
            decode.open_image(file)
        return
    assert decode.open_image(file).getpixel((0, 0)) == expected
    assert tuple(decode.decode(file)[0, 0].tolist()) == expected


def test_colours_of_16_bits_give_their_higher_eight(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(png(1, 16, b"\0" + struct.pack(">3H", 25700, 0, 65535)))
    assert decode.open_image(tmp_path / "deep.png").getpixel((0, 0)) == (100, 0, 255)


def tiff(bits: int, sample_format: int, order: str, pixel: bytes) -> bytes:
    """One grey pixel; PIL writes neither unsigned integers of 32 bits nor another order of bytes."""
    tags = {256: 1, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(pixel), 339: sample_format}
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 3, 1) + struct.pack(f"{order}HH", value, 0) for tag, value in tags.items()
    )
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(pixel))
    return start + pixel + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "sample_format", "pixel", "expected"),
    [(32, 1, "<I", 200 << 24), (32, 2, "<i", 200 << 23), (16, 1, ">H", 200 << 8), (16, 2, "<h", 200 << 7)],
    ids=["unsigned 32", "signed 32", "unsigned 16, big end first", "signed 16"],
)
def test_integers_of_a_tiff_are_scaled_by_the_range_of_their_type(
    bits: int, sample_format: int, pixel: str, expected: int, tmp_path: Path
) -> None:
    (file := tmp_path / "image.tif").write_bytes(tiff(bits, sample_format, pixel[0], struct.pack(pixel, expected)))
    assert decode.open_image(file).getpixel((0, 0)) == (200, 200, 200)


def test_files_that_pil_refuses_are_named(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20)))
    (tmp_path / "text.png").write_bytes(png(1, 8, b"\0\1\2\3", text))
    (tmp_path / "bomb.png").write_bytes(png(2**31 - 1, 8, b""))
    for name in ("text.png", "bomb.png"):
        with pytest.raises(DataError, match=rf"{name}: not a readable image \(.*\); restore or remove the file"):
            decode.open_image(tmp_path / name)


def test_hidden_folders_are_passed_over_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = image_folder(tmp_path / "insects")
    save_image(root / "train" / ".ipynb_checkpoints" / "0.png", 1)
    save_image(root / "train" / "ant" / ".ipynb_checkpoints" / "0.png", 1)
    (root / "train" / "notes.txt").write_text("")
    with caplog.at_level("INFO"):
        data = load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)
    assert (data.num_classes, data.num_examples["train"]) == (3, 15)
    (line,) = (record.getMessage() for record in caplog.records if "passed over" in record.getMessage())
    assert "passed over 3 hidden or other files and folders" in line


def test_hidden_folders_of_tiny_imagenet_are_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny_files(tmp_path / ".home")  # what lies above the folder does not matter
    images = root / "train" / "n00000003" / "images"
    (images.parent / "n00000003_boxes.txt").write_text("")  # the set has them
    save_image(images / "more" / "1.png", 0, (64, 64))
    for file in (images / ".ipynb_checkpoints" / "0.png", images / "._0.png", root / "val" / "images" / ".0.png"):
        save_image(file, 0, (64, 64))
    with caplog.at_level("INFO"):
        data = load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=root.parent)
    assert data.num_examples == {"train": 401, "validation": 0, "test": 3}
    said = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert [line.split(", ")[0] for line in said] == [
        f"{root / 'train'}: passed over 2 hidden or other files and folders",
        f"{root / 'val'}: passed over 1 hidden or other files and folders",
    ]


def test_a_link_to_nothing_among_the_images_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "insects")
    (root / "train" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"ant/gone.png: not a readable image \(No such file"):
        load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)


def test_a_folder_one_level_too_high_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save_image(tmp_path / "up" / part / "insects" / "ant" / "0.png", 0)
    with pytest.raises(DataError, match=r"insects is the only class"):
        load("dataset=image_folder", f"dataset.root={tmp_path / 'up'}", data_dir=tmp_path)


def test_a_root_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder(tmp_path / "insects")
    data = load("dataset=image_folder", "dataset.root='~/insects'", data_dir=tmp_path / "data")
    assert data.num_classes == 3
    assert composed("dataset=image_folder", "dataset.root='~'").dataset.name == tmp_path.name


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    root = image_folder(tmp_path / "insects")
    with pytest.raises(UserError, match=r"no space for .* GB of decoded images .*data_dir="):
        load("dataset=image_folder", f"dataset.root={root}", data_dir=tmp_path)


def test_a_cache_of_another_length_or_size_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "cifar10.1")
    load("dataset=image_folder", f"dataset.root={root}", "dataset.size=8", data_dir=tmp_path)
    (file,) = (tmp_path / "cache").glob("cifar10.1-8-*/train.npy")
    for damage in (np.zeros((14, 8, 8, 3), np.uint8), np.zeros((15, 9, 9, 3), np.uint8)):
        np.save(file, damage)
        with pytest.raises(DataError, match=r"train.npy: the cache holds .*remove"):
            load("dataset=image_folder", f"dataset.root={root}", "dataset.size=8", data_dir=tmp_path)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"train.npy: the cache is damaged; remove"):
        load("dataset=image_folder", f"dataset.root={root}", "dataset.size=8", data_dir=tmp_path)


# Optional libraries ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_decoder() -> Iterator[None]:
    decode.jpeg_decoder.cache_clear()
    yield
    decode.jpeg_decoder.cache_clear()


def test_without_torchcodec_pil_reads_jpegs(
    fresh_decoder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(name: str, *rest: Any, **settings: Any) -> Any:
        if name.startswith("torchcodec"):
            raise ModuleNotFoundError("No module named 'torchcodec'", name="torchcodec")
        return imported(name, *rest, **settings)

    imported = builtins.__import__
    save_image(tmp_path / "image.jpg", 0)
    monkeypatch.setattr(builtins, "__import__", absent)
    with caplog.at_level("INFO"):
        images = [decode.decode(tmp_path / "image.jpg") for _ in range(2)]
    assert torch.equal(images[1], torch.as_tensor(np.array(Image.open(tmp_path / "image.jpg"))))
    assert len([r for r in caplog.records if "torchcodec is not installed" in r.getMessage()]) == 1


def test_a_broken_torchcodec_is_one_line(fresh_decoder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *rest: Any, **settings: Any) -> Any:
        if name.startswith("torchcodec"):
            raise RuntimeError("Could not load libtorchcodec.\nFFmpeg")
        return imported(name, *rest, **settings)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ConfigError, match=r"torchcodec is installed but cannot be loaded") as raised:
        decode.jpeg_decoder()
    assert "FFmpeg" not in str(raised.value) and "\n" not in str(raised.value)


def test_digits_say_that_they_need_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = {"validation": 0.0, "mean": [0.3], "std": [0.3], "padding": 0, "flip": False}
    with pytest.raises(ConfigError, match=r"^dataset=digits needs scikit-learn; pip install scikit-learn$"):
        digits(DataSettings(tmp_path, False, CPU, 0), **cfg)  # type: ignore[arg-type]


# Files of others ------------------------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("payload",)


@pytest.mark.parametrize("download", ["false", "true"])
def test_unchecked_pickles_run_no_code(download: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cifar_files(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match=r"it names posix.mkdir, which is no data"):
        load("dataset=cifar10", "dataset.verify=false", f"download={download}", data_dir=tmp_path)
    assert not (tmp_path / "payload").exists()


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_the_library_of_others_is_as_it_was_while_pickles_are_read(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import cifar as theirs

    def watched(file: BinaryIO, **settings: Any) -> Any:
        assert theirs.pickle is pickle
        read.append(Path(file.name).name)
        return archives.unpickle(file, **settings)

    read: list[str] = []
    cifar_files(tmp_path, name)
    monkeypatch.setattr("pai_bench.data.cifar.unpickle", watched)
    load(f"dataset={name}", "dataset.verify=false", data_dir=tmp_path)
    assert len(read) == len(set(read)) == (6 if name == "cifar10" else 2)
    for entry in ({"data": np.zeros((20, 3072)), key: [0] * 20}, {"data": np.zeros((20, 3072), np.uint8), key: [0]}):
        (tmp_path / theirs.__dict__[name.upper()].base_folder / read[-1]).write_bytes(pickle.dumps(entry))
        with pytest.raises(DataError, match=f"dataset={name}: .* is missing or damaged"):
            load(f"dataset={name}", "dataset.verify=false", data_dir=tmp_path)


@pytest.mark.parametrize("damage", [None, "missing", "another"])
def test_files_of_cifar_that_are_not_the_published_ones_are_fetched(
    damage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR100

    fetched = []

    def archived(url: str, root: str, name: str, published: str) -> None:
        fetched.append((url, name, published))
        shutil.copy(tmp_path / "archive.tar.gz", Path(root) / name)

    source, data_dir = tmp_path / "source", tmp_path / "data"
    cifar_files(source, "cifar100")
    sums = {file.name: archives.md5(file) for file in (source / "cifar-100-python").iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    monkeypatch.setattr("torchvision.datasets.utils.download_url", archived)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(source / "cifar-100-python", "cifar-100-python")
    shutil.copytree(source, data_dir)
    file = data_dir / "cifar-100-python" / "meta"
    if damage == "missing":
        file.unlink()
    elif damage == "another":
        file.write_bytes(b"")
    assert load("dataset=cifar100", "download=true", data_dir=data_dir).num_examples["train"] == 20
    assert fetched == ([] if damage is None else [(CIFAR100.url, CIFAR100.filename, CIFAR100.tgz_md5)])
    assert archives.md5(file) == sums["meta"]


def test_a_complete_dataset_is_used_as_it_is_where_downloads_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    cifar_files(tmp_path, "cifar10")
    mnist_files(tmp_path)
    monkeypatch.setattr("pai_bench.data.cifar.lock", written)
    monkeypatch.setattr("pai_bench.data.mnist.lock", written)
    for name in ("cifar10", "mnist"):
        data = load(f"dataset={name}", "dataset.verify=false", "download=true", data_dir=tmp_path)
        assert data.num_examples["test"] == 20


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_a_link_of_an_archive_leads_nowhere_outside(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        opened.addfile(member("door", kind, "../victim"))
        opened.addfile(member("door/file"))
    with pytest.raises(ValueError, match="door"):
        archives.unpack(tmp_path / "a.tar", tmp_path / "into")
    assert not list((tmp_path / "victim").iterdir())


def test_an_absolute_name_in_an_archive_lands_inside(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        opened.addfile(member(f"{tmp_path}/absolute"))
    archives.unpack(tmp_path / "a.tar", tmp_path / "into")
    assert not (tmp_path / "absolute").exists()
    assert [file.name for file in (tmp_path / "into").rglob("*") if file.is_file()] == ["absolute"]


def test_an_archive_of_another_checksum_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as opened:
        opened.addfile(member("cifar-10-batches-py/data_batch_1"))
    arguments = ["prepare_data.py", "cifar10", "--data-dir", f"{tmp_path}/data", "--from", f"{opened.name}"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("pai_bench.launch.terminal.start_process", lambda: None)
    script = runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"))
    with pytest.raises(SystemExit) as ended:
        script["main"]()
    assert ended.value.code == DataError.exit_code and not (tmp_path / "data").exists()
    with pytest.raises(DataError, match=r"its MD5 is .* and not the published c58f30108f718f92721af3b95e74349a"):
        script["take"](Path(str(opened.name)), tmp_path / "data", archives.PUBLISHED_MD5["cifar10"])


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_writes_nothing_outside_its_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    archive = tmp_path / f"a.{kind}"
    if kind == "tar":
        with tarfile.open(archive, "w") as opened:
            opened.add(tmp_path / "x", "../outside")
    else:
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.write(tmp_path / "x", "../outside")
    with pytest.raises(ValueError, match="outside"):
        archives.unpack(archive, tmp_path / "into")
    assert not (tmp_path / "outside").exists()


def test_a_data_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mnist_files(tmp_path / "x")
    assert load("dataset=mnist", "dataset.verify=false", data_dir=Path("'~/x'")).num_examples["train"] == 30
