"""Datasets read from the files of others: digits, CIFAR, MNIST, archives, downloads."""

import errno
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from conftest import composed
from image_data import CPU, all_images, all_labels, cifar_files, load, mnist_files
from PIL import Image

from pai_bench.commands import data as data_command
from pai_bench.core import DataSettings
from pai_bench.data import archives, cifar, mnist
from pai_bench.data.digits import digits
from pai_bench.errors import ConfigError, DataError


@pytest.mark.parametrize(("option", "size"), [("digits", 16), ("digits_32", 32)])
def test_digits_are_the_1797_images_of_scikit_learn(option: str, size: int, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = load(f"dataset={option}", data_dir=tmp_path)
    assert data.num_examples == {"train": 1438, "validation": 0, "test": 359}
    assert (data.input_shape, data.num_classes) == ((1, size, size), 10)
    theirs = load_digits()
    labels = all_labels(data, "train") + all_labels(data, "test")
    assert np.bincount(labels).tolist() == np.bincount(theirs.target).tolist()
    std = composed(f"dataset={option}").dataset.settings["std"][0]
    images = torch.cat([all_images(data, "train"), all_images(data, "test")]) * std + 0.3059
    assert images.mean().item() == pytest.approx(theirs.images.mean() / 16, abs=0.002)
    train = all_images(data, "train")
    assert abs(train.mean()) < 0.001 and abs(train.std() - 1) < 0.001


@pytest.mark.parametrize(("name", "num_train"), [("cifar10", 100), ("cifar100", 20)])
def test_cifar_reads_the_original_layout(name: str, num_train: int, tmp_path: Path) -> None:
    pixels = cifar_files(tmp_path, name)
    data = load(f"dataset={name}", "dataset.verify=false", data_dir=tmp_path)
    assert data.num_examples == {"train": num_train, "validation": 0, "test": 20}
    mean, std = (
        torch.tensor(composed(f"dataset={name}").dataset.settings[key]).view(3, 1, 1) for key in ("mean", "std")
    )
    last = pixels["test_batch" if name == "cifar10" else "test"].reshape(20, 3, 32, 32)
    torch.testing.assert_close(all_images(data, "test"), (torch.as_tensor(last) / 255 - mean) / std)


def test_cifar_checks_the_published_checksums(tmp_path: Path) -> None:
    cifar_files(tmp_path, "cifar10")
    with pytest.raises(DataError, match=r"missing or damaged.*pai-bench data cifar10 --data-dir"):
        load("dataset=cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_images_of_cifar_are_standardised_on_request(name: str, tmp_path: Path) -> None:
    cifar_files(tmp_path, name)
    words = ["dataset.standardize=per_image", "dataset.mean=null", "dataset.std=null", "dataset.verify=false"]
    images = all_images(load(f"dataset={name}", *words, data_dir=tmp_path), "test").flatten(1)
    assert images.mean(1).abs().max() < 1e-5 and (images.std(1, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_what_to_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"dataset={name}: .*pai-bench data {name}"):
        load(f"dataset={name}", data_dir=tmp_path)


def test_mnist_reads_the_original_layout(tmp_path: Path) -> None:
    pixels = mnist_files(tmp_path)
    data = load("dataset=mnist", "dataset.verify=false", data_dir=tmp_path)
    assert data.num_examples == {"train": 30, "validation": 0, "test": 20}
    assert (data.input_shape, data.num_classes) == ((1, 28, 28), 10)
    torch.testing.assert_close(all_images(data, "test"), (torch.as_tensor(pixels)[:, None] / 255 - 0.1307) / 0.3081)
    assert [int(y) for _, labels in data.evaluation("test", 5) for y in labels] == [*range(10), *range(10)]


def test_mnist_that_is_missing_damaged_or_another_is_refused(tmp_path: Path) -> None:
    remedy = "dataset=mnist: .*missing or damaged.*pai-bench data mnist --data-dir"
    with pytest.raises(DataError, match=remedy):
        load("dataset=mnist", data_dir=tmp_path)
    mnist_files(tmp_path)
    with pytest.raises(DataError, match=remedy):
        load("dataset=mnist", data_dir=tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(DataError, match=remedy):
        load("dataset=mnist", "dataset.verify=false", data_dir=tmp_path)


@pytest.mark.parametrize("verify", ["true", "false"])
def test_damaged_files_of_mnist_are_fetched_again_where_they_are_checked(
    verify: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data_dir = tmp_path / "source" / "MNIST" / "raw", tmp_path / "data"
    raw = data_dir / "MNIST" / "raw"
    mnist_files(tmp_path / "source")
    mnist_files(data_dir)
    monkeypatch.setattr(mnist, "_FILES", {path.name: archives.md5(path) for path in source.iterdir()})
    damaged = raw / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    fetched = []

    def fetch(url: str, download_root: str, filename: str, **_: Any) -> None:
        name = filename.removesuffix(".gz")
        fetched.append((name, (raw / name).exists()))
        shutil.copy(source / name, Path(download_root) / name)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    words = ("dataset=mnist", f"dataset.verify={verify}")
    with pytest.raises(DataError, match="missing or damaged"):
        load(*words, data_dir=data_dir)
    assert damaged.exists()  # a run removes nothing
    if verify == "false":  # files that nobody published are not ours to remove
        with pytest.raises(DataError, match="it cannot be fetched"):
            load(*words, "download=true", data_dir=data_dir)
        assert damaged.exists() and not fetched
        return
    assert load(*words, "download=true", data_dir=data_dir).num_examples["train"] == 30
    assert dict(fetched) == {path.name: path != damaged for path in raw.iterdir()}
    assert archives.md5(damaged) == archives.md5(source / damaged.name)


def test_digits_say_that_they_need_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = {"size": 16, "validation": 0.0, "mean": [0.3], "std": [0.3], "padding": 0, "flip": False}
    with pytest.raises(ConfigError, match=r"^dataset=digits needs scikit-learn; pip install scikit-learn$"):
        digits(DataSettings(tmp_path, False, CPU, 0), **cfg)  # type: ignore[arg-type]


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
    arguments = ["data.py", "cifar10", "--data-dir", f"{tmp_path}/data", "--from", f"{opened.name}"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("pai_bench.launch.terminal.start_process", lambda: None)
    with pytest.raises(SystemExit) as ended:
        data_command.main()
    assert ended.value.code == DataError.exit_code and not (tmp_path / "data").exists()
    with pytest.raises(DataError, match=r"its MD5 is .* and not the published c58f30108f718f92721af3b95e74349a"):
        data_command.take(Path(str(opened.name)), tmp_path / "data", archives.PUBLISHED_MD5["cifar10"])


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


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_a_copy_of_cifar_as_images_becomes_its_files(
    name: str, num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2 * num_classes, 32, 32, 3), np.uint8)
    for number, image in enumerate(pixels):
        split, label = ("train", "test")[number % 2], number // 2
        folder = tmp_path / "copy" / split / f"class{label:02}"
        folder.mkdir(parents=True)
        Image.fromarray(image).save(folder / "image.png")
    words = ["data", name, "dataset.verify=false", "--data-dir", str(tmp_path), "--from", str(tmp_path / "copy")]
    monkeypatch.setattr(sys, "argv", words)
    data_command.main()
    data = load(
        f"dataset={name}", "dataset.verify=false", "dataset.mean=[0,0,0]", "dataset.std=[1,1,1]", data_dir=tmp_path
    )
    assert (data.num_classes, data.num_examples["train"]) == (num_classes, num_classes)
    images, labels = all_images(data, "test"), all_labels(data, "test")
    assert sorted(labels) == list(range(num_classes))
    for image, label in zip(images, labels, strict=True):
        np.testing.assert_allclose(255 * image.permute(1, 2, 0).numpy(), pixels[2 * label + 1], atol=1e-3)


def test_a_copy_is_not_taken_for_the_published_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give dataset\.verify=false too"):
        data_command.take_images(tmp_path, tmp_path, cifar.KINDS["cifar10"], verify=True)
