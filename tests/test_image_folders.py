"""Folders of images and Tiny-ImageNet: what is read, listed, cached and refused."""

import errno
import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from image_data import aged, all_images, all_labels, image_folder, load, save_image, tiny_files
from PIL import Image

from pai_bench.data import resident, tiny_imagenet
from pai_bench.errors import ConfigError, DataError, UserError


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


def test_tiny_imagenet_reads_the_original_layout(tmp_path: Path) -> None:
    tiny_files(tmp_path)
    data = load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=tmp_path)
    assert data.num_examples == {"train": 400, "validation": 0, "test": 3}
    assert (data.input_shape, data.num_classes) == ((3, 64, 64), 200)
    assert all_labels(data, "test") == [7, 0, 199]
    assert all_labels(data, "train") == sorted([*range(200)] * 2)


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
    with pytest.raises(DataError, match=r"val_annotations.txt is missing; run pai-bench data"):
        load("dataset=tiny_imagenet", "dataset.subset=true", data_dir=tmp_path)


def test_a_padding_of_a_whole_image_of_a_folder(tmp_path: Path) -> None:
    wrong = ["dataset=image_folder", "dataset.size=8", "dataset.padding=8", f"dataset.root={tmp_path / 'nowhere'}"]
    with pytest.raises(ConfigError, match=r"^dataset.padding=8: the images have 8x8 pixels; give 0 to 7$"):
        load(*wrong, data_dir=tmp_path)


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
        f"{root / 'val'}: passed over 1 hidden or other file or folder",
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
