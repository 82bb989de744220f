"""A results folder as one file, to publish what tables and verdicts are made of."""

import gzip
import io
import json
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pai_bench.config.composition import shareable
from pai_bench.errors import ConfigError, DataError
from pai_bench.runs import status
from pai_bench.system import files

_ENDINGS = (".tar.gz", ".tgz")
# Enough for tables, figures, the page and verdicts. Weights and masks stay where they are.
_FILES = (status.RESULT, "config.yaml", "mask.json")
_CURVE = "metrics.csv"
_ORIGIN = "provenance.json"  # rows that were packed before may lack it
# On whose machine a run was made says nothing about its numbers.
_PRIVATE = ("host", "platform", "command")


def pack(folder: Path, output: Path, curves: bool = False) -> int:
    """Writes the rows, configs, layers and versions of all finished runs below a folder to one compressed file.

    The same runs give the same file, byte for byte. Of paths in the configs the last names are left. Of the
    provenance, the names of machines and the command lines are left out.

    Args:
        curves: add what was recorded in every epoch.

    Returns:
        The number of runs.

    Raises:
        ConfigError: the name of the output does not end in .tar.gz.
        DataError: there are no finished runs, or a file of a run is missing or damaged.
    """
    if not output.name.endswith(_ENDINGS):
        raise ConfigError(f"-o {output}: it has to end in {' or '.join(_ENDINGS)}; give such a name")
    found = status.finished_runs(folder) if folder.is_dir() else {}
    if not found:
        raise DataError(f"{folder}: there are no finished runs; give a results folder that has some")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for directory in found:
            for name in (*_FILES, _CURVE) if curves else _FILES:
                _add(archive, directory / name)
            if (directory / _ORIGIN).exists():
                _add(archive, directory / _ORIGIN)
    files.write_atomically(output, gzip.compress(packed.getvalue(), mtime=0))
    return len(found)


def _add(archive: tarfile.TarFile, path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: it cannot be read ({error.strerror}); remove this run, or run it again") from error
    if path.name == "config.yaml":
        content = shareable(path).encode()
    if path.name == _ORIGIN:
        content = json.dumps(_public(path), indent=2).encode()
    entry = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _public(path: Path) -> dict[str, Any]:
    """What may be published of the provenance of a run."""
    try:
        return {key: value for key, value in files.read_json(path).items() if key not in _PRIVATE}
    except ValueError as error:
        raise DataError(f"{error}; remove this run, or run it again") from error


@contextmanager
def opened(results: Path) -> Iterator[Path]:
    """A results folder: the one that is given, or the content of a file that `pack` wrote, for as long as it is open.

    Raises:
        DataError: the file is no such archive.
    """
    if not (results.is_file() and results.name.endswith(_ENDINGS)):
        yield results
        return
    with tempfile.TemporaryDirectory(prefix="pai_bench-") as name:
        folder = Path(name)
        try:
            # Unpacked as a whole, because tarfile alone does not look at the checksum.
            content = gzip.decompress(results.read_bytes())
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{results}: it is no archive of results ({error}); fetch it again") from error
        yield folder
