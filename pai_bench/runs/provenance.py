"""Where the numbers of a run come from."""

import platform
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pai_bench.system import checkout

_PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "wandb", "numpy")


def _version(package: str) -> str | None:
    """The installed version of a package, or None: some packages are optional."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in a folder, or None: it fails, or there is no git."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache  # a process goes on with the code that it has imported, whatever happens to the files
def _state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of a checkout, and whether files have changed since. None of what is no checkout of this package."""
    # An installed package may lie in the checkout of another project, whose commit says nothing about it.
    top = _git(folder, "rev-parse", "--show-toplevel")
    if checkout.version_in(folder) is None or top is None or Path(top).resolve() != folder.resolve():
        return None, None
    changes = _git(folder, "status", "--porcelain")
    return _git(folder, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def provenance() -> dict[str, Any]:
    """Where the numbers of a run come from: commit, versions, machine and command line."""
    commit, dirty = _state(checkout.ROOT)
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": sys.argv,
    }
