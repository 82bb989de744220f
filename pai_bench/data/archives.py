"""Safe reading of foreign files: archives are checked and unpacked, and pickles may hold only data."""

import hashlib
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

PUBLISHED_MD5 = {
    "cifar10": "c58f30108f718f92721af3b95e74349a",  # cifar-10-python.tar.gz
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",  # cifar-100-python.tar.gz
    "tiny_imagenet": "90528d7ca1a48142e341f4ef8d21d0de",  # tiny-imagenet-200.zip
}
# The names in pickles of arrays, lists and dictionaries. numpy's core has two names, in old and in new versions.
_HARMLESS = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("bytearray", "set", "frozenset")),
}  # fmt: skip


def md5(file: Path) -> str:
    """The MD5 of a file. Datasets are published with it. It detects damage, but not forgery."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(archive: Path, target: Path) -> None:
    """Unpacks a tar or zip archive into a folder. Never writes outside the folder.

    Raises:
        ValueError: a member would lie outside, or the file is no such archive.
    """
    target.mkdir(parents=True, exist_ok=True)
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            try:
                opened.extractall(target, filter="data")
            except tarfile.TarError as error:
                raise ValueError(str(error)) from error
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if not (target / name).resolve().is_relative_to(target.resolve()):
                    raise ValueError(f"{name!r} would lie outside {target}")
            opened.extractall(target)
    else:
        shutil.unpack_archive(archive, target, filter="data")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no data")
        return super().find_class(module, name)


def unpickle(file: BinaryIO, **settings: Any) -> Any:
    """The content of a pickle of arrays, lists and dictionaries. Runs no code from the file.

    Raises:
        pickle.UnpicklingError: the pickle names anything else.
    """
    return _Restricted(file, **settings).load()
