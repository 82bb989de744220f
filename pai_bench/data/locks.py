"""Locks for what several processes may build in one folder: one works, the others wait."""

import shutil
from pathlib import Path

from filelock import FileLock, Timeout


def lock(directory: Path, name: str) -> FileLock:
    """A lock for downloading or building `name` in a directory: one process works, the others wait."""
    directory.mkdir(parents=True, exist_ok=True)
    return FileLock(directory / f".{name}.lock")


def remove_unfinished(directory: Path) -> None:
    """Removes unfinished builds of dead processes from a directory. Holds the lock of each build meanwhile."""
    for building in directory.glob("*.building"):
        try:
            with FileLock(directory / f".{building.stem}.lock", blocking=False):
                shutil.rmtree(building, ignore_errors=True)
        except Timeout:
            continue  # a living process is building it
