"""The store of smaller images that is made of ImageNet."""

import errno
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, composed
from image_data import all_images, load, photograph, photographs
from PIL import Image
from torch import Generator

from pai_bench.data import shrunk
from pai_bench.data.decode import shrink
from pai_bench.data.imagenet import Streamed
from pai_bench.errors import DataError

__all__ = ["photographs"]  # a fixture


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    """A folder photos/ with large images, a small one and a PNG."""
    for part, number in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(("n01", "n02")):
            (tmp_path / "photos" / part / wnid).mkdir(parents=True)
            for i in range(number):
                height, width = (300 + 10 * i, 400) if i else (50, 70)
                image = photograph(height, width, 10 * label + i)
                image.save(tmp_path / "photos" / part / wnid / f"{i}.JPEG", "PNG" if i == 1 else "JPEG")
    return tmp_path / "photos"


SMALL = ("dataset.store=64", "dataset.resize=60", "dataset.size=56")


def stored(originals: Path, *overrides: str) -> Streamed:
    settings = ["dataset=imagenet", "dataset.subset=true", f"dataset.root={originals}", *SMALL, *overrides]
    return load(*settings, data_dir=originals.parent / "data")


def test_a_store_holds_the_same_images_with_a_short_side(originals: Path) -> None:
    data = stored(originals, "download=true")
    store = originals.parent / "data" / "photos-64"
    names = sorted(file.relative_to(originals) for file in originals.rglob("*.JPEG"))
    assert names == sorted(file.relative_to(store) for file in store.rglob("*.JPEG"))
    for name in names:
        image, small = Image.open(originals / name), Image.open(store / name)
        if min(image.size) <= 64:
            assert (store / name).read_bytes() == (originals / name).read_bytes()
            continue
        assert min(small.size) == 64 and small.format == "JPEG"
        assert max(small.size) == 64 * max(image.size) // min(image.size)
        expected = np.array(image.convert("RGB").resize(small.size, Image.Resampling.BILINEAR), dtype=int)
        assert np.abs(np.array(small, dtype=int) - expected).mean() < 4
    plain = stored(originals, "dataset.store=null")
    assert data.num_examples == plain.num_examples and data.checksum != plain.checksum
    assert (all_images(data, "test") - all_images(plain, "test")).abs().mean() < 0.05
    assert stored(originals).checksum == data.checksum


def test_a_store_is_another_run() -> None:
    names = [composed("dataset=imagenet", store).id for store in ("dataset.store=null", "dataset.store=256")]
    assert names[0] == composed("dataset=imagenet").id != names[1]


def test_a_store_that_is_not_there_says_what_to_run(originals: Path) -> None:
    command = f"data imagenet dataset.store=64 dataset.root={originals} --data-dir {originals.parent}"
    with pytest.raises(DataError, match=f"dataset.store=64: there is no .*photos-64; run pai-bench {command}"):
        stored(originals)
    with pytest.raises(DataError, match="has 2 classes, 8 training and 4 val images, not 1,000"):
        stored(originals, "dataset.subset=false", "download=true")
    assert not (originals.parent / "data").exists()


def test_an_interrupted_store_goes_on(originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def work(path: Path, target: Path, side: int) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        shrink(path, target, side)
        done.append(path.relative_to(originals).as_posix())

    monkeypatch.setattr(shrunk, "shrink", work)
    with pytest.raises(KeyboardInterrupt):
        stored(originals, "download=true")
    with pytest.raises(DataError, match=r"there is no .*photos-64; run"):
        stored(originals)
    half = originals.parent / "data" / "photos-64.building" / done[0]
    half.write_bytes(b"")  # as a power cut leaves it
    again: list[str] = []
    monkeypatch.setattr(shrunk, "shrink", lambda path, *rest: (again.append(path.name), shrink(path, *rest)))
    data = stored(originals, "download=true")
    assert len(again) == 12 - 5 + 1 and all_images(data, "test").shape == (4, 3, 56, 56)


def test_a_build_of_other_images_starts_anew(originals: Path) -> None:
    building = originals.parent / "data" / "photos-64.building"
    building.mkdir(parents=True)
    (building / "store.json").write_text(json.dumps({"source": "others"}))
    (building / "train" / "n03").mkdir(parents=True)
    photograph(64, 64).save(building / "train" / "n03" / "0.JPEG")
    assert stored(originals, "download=true").num_classes == 2


def test_a_store_that_is_complete_is_used_as_it_is_where_downloads_are_allowed(
    originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = stored(originals, "download=true")

    def written(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(shrunk, "lock", written)
    assert stored(originals, "download=true").checksum == built.checksum


def test_a_store_that_has_lost_a_file_is_refused(originals: Path) -> None:
    stored(originals, "download=true")
    (originals.parent / "data" / "photos-64" / "train" / "n01" / "2.JPEG").write_bytes(b"short")
    with pytest.raises(DataError, match=r"photos-64: not what pai-bench data put there"):
        stored(originals)


def test_a_store_of_images_that_have_changed_is_not_taken_for_theirs(originals: Path) -> None:
    stored(originals, "download=true")
    photograph(80, 80).save(originals / "train" / "n01" / "new.JPEG")
    with pytest.raises(DataError, match=r"made from other images than .*photos holds now; remove it"):
        stored(originals, "download=true")


def test_a_damaged_original_is_named_as_the_store_is_built(originals: Path) -> None:
    (originals / "train" / "n02" / "3.JPEG").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"n02/3.JPEG: not a readable image"):
        stored(originals, "download=true")


def test_processes_that_build_a_store_at_once_build_it_once(originals: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        results = [pool.apply_async(_checksum, (originals,)) for _ in range(2)]
        first, second = (result.get(timeout=60) for result in results)
    assert first == second and not list((originals.parent / "data").glob("*.building"))


def _checksum(originals: Path) -> str:
    return stored(originals, "download=true").checksum


def test_prepare_data_builds_a_store(originals: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "data.py"),
        "imagenet",
        "dataset.subset=true",
        *SMALL,
        f"dataset.root={originals}",
        "--data-dir",
        str(originals.parent / "data"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "copying 12 images into" in done.stdout
    assert "imagenet is ready: 8 train, 4 test images of 3x56x56 in 2 classes" in done.stdout
    assert stored(originals).checksum in done.stdout


def test_batches_are_whole_however_few_images_are_decoded_at_a_time(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        data = load("dataset=imagenet", "dataset.subset=true", f"num_workers={workers}", data_dir=photographs)
        return [*data.train(5, Generator(), Generator()), *data.evaluation("train", 3)]

    whole = batches(0)
    assert [len(labels) for _, labels in whole] == [5, 3, 3, 3, 2]
    monkeypatch.setattr("pai_bench.data.imagenet._PIECE", 2)
    for images, labels in (zip(*batches(workers), strict=True) for workers in (0, 2)):
        assert all(map(torch.equal, images, [images for images, _ in whole]))
        assert all(map(torch.equal, labels, [labels for _, labels in whole]))
