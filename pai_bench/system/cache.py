"""A folder of what was costly to compute. The key is a checksum of everything that determines it."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from pai_bench.system import files

T = TypeVar("T")
log = logging.getLogger(__name__)

_SECONDS = 1.0  # what takes less time is not worth keeping


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _checksum(path: Path) -> str | None:
    """Of a file; None if it is gone."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


_PACKAGE = sorted(Path(__file__).parents[1].rglob("*.py"))
# The files as this process runs them. Whoever edits one changes nothing in the process.
_as_imported = {path: _checksum(path) for path in _PACKAGE}


def code(targets: Iterable[str]) -> str:
    """A checksum of this package's source, and of the source of the modules of other functions, as they were imported.

    Args:
        targets: dotted names of functions.
    """
    modules = [sys.modules.get(target.rpartition(".")[0]) for target in targets]
    others = {Path(module.__file__) for module in modules if module is not None and module.__file__}
    found = [_as_imported.setdefault(path, _checksum(path)) for path in sorted({*_PACKAGE, *others})]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _edited() -> Path | None:
    """A file that is no longer as it was imported, if there is one."""
    return next((path for path, known in _as_imported.items() if _checksum(path) != known), None)


class Cache:
    """A folder of tensors that were costly to compute. Any number of processes may share it.

    If it grows too large, the files that were used least recently are removed.

    Args:
        limit: the largest size of the folder, in bytes.
        determines: everything that determines what a run computes, as JSON values.
    """

    def __init__(self, folder: Path, limit: int, determines: dict[str, Any]) -> None:
        self.folder, self.limit, self.determines = folder, limit, determines
        self.used: str | None = None  # the kind of what was found

    def _path(self, kind: str, more: dict[str, Any]) -> Path:
        text = json.dumps([kind, self.determines, more], sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def take(self, kind: str, more: dict[str, Any], use: Callable[[dict[str, Tensor], dict[str, Any]], T]) -> T | None:
        """What `use` makes of cached tensors (on the CPU) and of the notes beside them. None: they are not cached.

        Args:
            kind: of what was computed, such as "scores", for the log and the name of the file.
            more: what determines them beside the settings of the cache.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(kind, more)
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                notes = json.loads(file.metadata()["notes"])
            if notes.pop("checksum") != fingerprint(dict(sorted(tensors.items()))):
                raise ValueError("its checksum is another")
            found = use(tensors, notes)
            with suppress(PermissionError):  # it is another user's
                os.utime(path)
        except FileNotFoundError:
            return None
        # The file may be damaged, or lack the notes.
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            log.warning("%s cannot be read and is computed again: %s: %s", path, type(error).__name__, error)
            return None
        self.used = kind
        log.info("the %s of an earlier run with the same network and settings are used: %s", kind, path)
        return found

    def put(self, kind: str, more: dict[str, Any], tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Caches tensors with notes. If the disk or the memory is full, or the code has been edited, it only warns.

        Code that is imported late may be newer than what the key says, so after an edit nothing is cached.
        """
        path = self._path(kind, more)
        if sum(tensor.nbytes for tensor in tensors.values()) > self.limit:
            return
        if (edited := _edited()) is not None:
            log.warning("the %s are not kept for other runs: %s has changed since this process began", kind, edited)
            return
        try:
            checksum = fingerprint(dict(sorted(tensors.items())))
            content = files.tensor_bytes(tensors, json.dumps(notes | {"checksum": checksum}))
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, content)
            self._make_room()
        except (OSError, MemoryError) as error:
            log.warning("%s cannot be kept for other runs: %s", path, error)

    def worth_keeping(self, seconds: float) -> bool:
        """Whether what took so long to compute is to be put into the cache."""
        return seconds >= _SECONDS

    def _make_room(self) -> None:
        for partial in self.folder.glob("*.tmp-*"):  # left by processes that died while they wrote
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime > 3600:
                    partial.unlink()
        found = []
        for path in self.folder.glob("*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            found.append((status.st_mtime, status.st_size, path))
        left = self.limit
        for _, size, path in sorted(found, reverse=True):
            left -= size
            if left < 0:
                path.unlink(missing_ok=True)
