"""ImageNet at its scale: decoding, cropping, listing, and the copy of a short side of a few pixels."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, composed
from image_data import aged, all_images, load, photographs
from PIL import Image
from torch import Generator
from torchvision import transforms
from torchvision.transforms import v2

from pai_bench.data import shrunk
from pai_bench.data.crops import central_crop, random_box, random_crop
from pai_bench.data.decode import decode, shrink
from pai_bench.data.imagenet import Streamed
from pai_bench.data.listing import class_folders, fingerprint
from pai_bench.errors import DataError
from pai_bench.system import devices

__all__ = ["photographs"]  # a fixture

CPU = torch.device("cpu")
CLOSE = 2  # levels of 255: versions of libjpeg may round differently; here they agree to the bit


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours, as photographs have and noise has not."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def distance(image: torch.Tensor, other: torch.Tensor | Image.Image) -> int:
    """The largest difference of two images, in levels of 255."""
    expected = torch.as_tensor(np.array(other)) if isinstance(other, Image.Image) else other
    assert image.shape == expected.shape and image.dtype == torch.uint8
    return int((image.int() - expected.int()).abs().max())


# Decoding -------------------------------------------------------------------------------------------------------------


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a right angle
    return exif


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("RGB", {"format": "JPEG"}),
        ("RGB", {"format": "JPEG", "progressive": True, "quality": 95, "subsampling": "4:4:4"}),
        ("RGB", {"format": "JPEG", "exif": turned()}),
        ("L", {"format": "JPEG"}),
        ("CMYK", {"format": "JPEG"}),
        ("RGB", {"format": "PNG"}),
        ("RGBA", {"format": "PNG"}),
        ("P", {"format": "PNG"}),
        ("L", {"format": "BMP"}),
    ],
    ids=["JPEG", "progressive", "turned by EXIF", "grey", "CMYK", "PNG", "transparent", "palette", "bitmap"],
)
def test_an_image_is_what_pil_makes_of_it_in_rgb(mode: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever a file named .JPEG is: ImageNet has grey and CMYK images, and one PNG."""
    file = tmp_path / "image.JPEG"
    photograph(120, 90).convert(mode).save(file, **settings)
    image = decode(file)
    assert image.shape == (120, 90, 3)
    assert distance(image, Image.open(file).convert("RGB")) <= CLOSE


def test_jpegs_are_decoded_by_torchcodec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchcodec")
    photograph(60, 40).save(tmp_path / "image.JPEG")

    def forbidden(path: Path) -> None:
        raise AssertionError(f"{path} went to PIL")

    monkeypatch.setattr("pai_bench.data.decode.open_image", forbidden)
    assert decode(tmp_path / "image.JPEG").shape == (60, 40, 3)


def _enlarged(jpeg: bytes, before: bytes = b"") -> bytes:
    """A JPEG that says that it has 60,000x60,000 pixels, with something before the marker of its size."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[:at] + before + jpeg[at : at + 5] + struct.pack(">HH", 60_000, 60_000) + jpeg[at + 9 :]


@pytest.mark.parametrize(
    "before",
    [b"", b"\xff\xff", b"\xff\x01", b"\xff\xd0", b"\xff\xe2\0\x0c\xff\xc0\0\x0b\x08\0\x08\0\x08\x01"],
    ids=["plain", "fillers", "a bare marker", "a restart", "another size in a comment"],
)
def test_a_jpeg_of_too_many_pixels_is_refused_before_it_is_decoded(
    before: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.JPEG"
    photograph(60, 40).save(file)
    file.write_bytes(_enlarged(file.read_bytes(), before))
    monkeypatch.setattr("pai_bench.data.decode.jpeg_decoder", lambda: lambda data: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"bomb.JPEG: not a readable image \(.*\); restore or remove the file"):
        decode(file)


@pytest.mark.parametrize(("most", "decoder"), [(1200, "torchcodec"), (1199, "PIL"), (None, "torchcodec")])
def test_the_limit_of_pixels_is_that_of_pil(
    most: int | None, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph(60, 40).save(tmp_path / "image.JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    decoded = torch.zeros(3, 60, 40, dtype=torch.uint8)
    monkeypatch.setattr("pai_bench.data.decode.jpeg_decoder", lambda: lambda data: decoded)
    if decoder == "torchcodec":
        assert not decode(tmp_path / "image.JPEG").any()
    else:
        with pytest.raises(DataError, match=r"image.JPEG: not a readable image \(Image size \(2400 pixels\) exceeds"):
            decode(tmp_path / "image.JPEG")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    photograph(60, 40).save(tmp_path / "whole.JPEG")
    data = (tmp_path / "whole.JPEG").read_bytes()
    for name, content in (("half", data[: len(data) // 2]), ("head", data[:20]), ("empty", b""), ("text", b"no image")):
        file = tmp_path / f"{name}.JPEG"
        file.write_bytes(content)
        with pytest.raises(
            DataError, match=rf"{name}.JPEG: not a readable image \(.*\); restore or remove the file"
        ) as e:
            decode(file)
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match=r"nowhere.JPEG: not a readable image \(No such file"):
        decode(tmp_path / "nowhere.JPEG")


# Crops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (30, 20), (2, 300), (400, 3), (1, 1)])
def test_random_crops_lie_where_torchvision_puts_them(height: int, width: int) -> None:
    blank = torch.empty(1, height, width)
    for seed in range(300):
        torch.manual_seed(seed)
        theirs = transforms.RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3])
        assert random_box(height, width, Generator().manual_seed(seed)) == tuple(theirs)


def test_crops_are_those_of_torchvision() -> None:
    augment = v2.Compose([v2.RandomResizedCrop(64, antialias=True), v2.RandomHorizontalFlip()])
    plain = v2.Compose([v2.Resize(72, antialias=True), v2.CenterCrop(64)])
    for seed in range(20):
        image = torch.as_tensor(np.array(photograph(90 + 11 * seed, 200, seed)))
        planes = image.permute(2, 0, 1)
        torch.manual_seed(seed)
        assert distance(random_crop(image, 64, seed), augment(planes).permute(1, 2, 0)) <= 1
        assert distance(central_crop(image, 72, 64), plain(planes).permute(1, 2, 0)) <= 1


def test_crops_leave_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    random_crop(torch.zeros(50, 60, 3, dtype=torch.uint8), 32, 5)
    assert torch.equal(torch.get_rng_state(), before)


# Listing --------------------------------------------------------------------------------------------------------------


def test_files_are_listed_in_order_of_class_and_name(tmp_path: Path) -> None:
    names = ["b/2.JPEG", "b/10.jpg", "a/z.png", "a/sub/x.JPEG", "b/notes.txt", "b/.png", "a/é.webp"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(number))
    classes, files = class_folders(tmp_path)
    assert classes == ["a", "b"] and len(files) == 5
    listed = ["a/sub/x.JPEG", "a/z.png", "a/é.webp", "b/10.jpg", "b/2.JPEG"]
    assert list(files) == [(tmp_path / name, "ab".index(name[0])) for name in listed]
    assert files.sizes.tolist() == [names.index(name) for name in listed]


def test_the_checksum_is_of_names_sizes_and_labels(tmp_path: Path) -> None:
    for name, size in (("ant/1.png", 3), ("bee/2.png", 5)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(bytes(size))
    _, files = class_folders(tmp_path)
    lines = b"ant/1.png 3 0\nbee/2.png 5 1\n"
    assert fingerprint(files) == hashlib.sha256(lines).hexdigest()
    assert fingerprint(files, files) == hashlib.sha256(2 * lines).hexdigest()


@pytest.fixture
def listed(tmp_path: Path) -> tuple[Path, Path]:
    """Class folders whose listing is kept, and where."""
    root, cache = tmp_path / "set", tmp_path / "cache"
    for name in ("a/1.png", "a/sub/2.png", "b/3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(5))
    aged(root)
    class_folders(root, cache)
    return root, cache


def test_a_listing_is_kept_while_no_folder_is_modified(
    listed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = listed
    plain = class_folders(root)
    monkeypatch.setattr("pai_bench.data.listing._scanned", lambda *_: pytest.fail("the folders were read again"))
    classes, files = class_folders(root, cache)
    assert classes == plain[0] and list(files) == list(plain[1])
    assert files.sizes.tolist() == [5, 5, 5] and fingerprint(files) == fingerprint(plain[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a/sub/2.png").unlink(),
        lambda root: (root / "b/4.png").write_bytes(b"new"),
        lambda root: (root / "b").rename(root / "c"),
        lambda root: (root / "a/1.png").rename(root / "a/0.png"),
        lambda root: shutil.rmtree(root / "a/sub"),
    ],
    ids=["removed", "added", "class renamed", "file renamed", "folder removed"],
)
def test_a_kept_listing_that_is_stale_is_made_anew(change: Any, listed: tuple[Path, Path]) -> None:
    root, cache = listed
    change(root)
    for _ in range(2):
        classes, files = class_folders(root, cache)
        assert (classes, list(files)) == (class_folders(root)[0], list(class_folders(root)[1]))
        assert all(path.is_file() for path, _ in files)
        aged(root)


def test_a_kept_listing_that_is_damaged_is_made_anew(listed: tuple[Path, Path]) -> None:
    root, cache = listed
    (file,) = cache.iterdir()
    whole, expected = file.read_bytes(), list(class_folders(root)[1])
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    for content in (b"", b"no archive", whole[:-30], whole[: len(whole) // 2], bytes(flipped)):
        file.write_bytes(content)
        assert list(class_folders(root, cache)[1]) == expected
        assert file.read_bytes()[:2] == b"PK" and len(file.read_bytes()) == len(whole)
    np.savez(file, names=np.array([b"a/1.png"]))
    assert list(class_folders(root, cache)[1]) == expected


def test_a_listing_of_folders_that_have_just_changed_is_not_kept(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(bytes(5))
    class_folders(tmp_path / "set", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_imagenet_keeps_its_listing(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aged(photographs / "imagenet")
    first = load("dataset=imagenet", "dataset.subset=true", data_dir=photographs)
    monkeypatch.setattr("pai_bench.data.listing._scanned", lambda *_: pytest.fail("the folders were read again"))
    again = load("dataset=imagenet", "dataset.subset=true", data_dir=photographs)
    assert again.checksum == first.checksum and again.num_examples == {"train": 8, "validation": 0, "test": 4}


# The store ------------------------------------------------------------------------------------------------------------


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


# The machine ----------------------------------------------------------------------------------------------------------


def test_as_many_images_are_decoded_at_once_as_there_are_cores(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert devices.num_cores(CPU) == 16
    data = load("dataset=imagenet", "dataset.subset=true", data_dir=photographs)
    assert data._place.num_workers == 0
    data = load("dataset=imagenet", "dataset.subset=true", "num_workers=null", data_dir=photographs)
    assert data._place.num_workers == 16
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert devices.num_cores(torch.device("cuda")) == 2 and devices.num_cores(CPU) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert devices.num_cores(CPU) == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert devices.num_cores(torch.device("cuda")) == 6
