"""ImageNet at its scale: decoding, cropping, listing, and the copy of a short side of a few pixels."""

import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import aged, load, photograph, photographs
from PIL import Image
from torch import Generator
from torchvision import transforms
from torchvision.transforms import v2

from pai_bench.data.crops import central_crop, random_box, random_crop
from pai_bench.data.decode import decode
from pai_bench.data.listing import class_folders, fingerprint
from pai_bench.errors import DataError
from pai_bench.system import devices

__all__ = ["photographs"]  # a fixture

CPU = torch.device("cpu")
CLOSE = 2  # levels of 255: versions of libjpeg may round differently; here they agree to the bit


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
