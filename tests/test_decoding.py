"""The pixels of image files, and the libraries that decode them."""

import builtins
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import save_image
from PIL import Image

from pai_bench.data import decode
from pai_bench.errors import ConfigError, DataError


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
