"""The version of the package. pyproject.toml alone says it."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_NAME = "pai_bench"
_UNKNOWN = "0+unknown"


def _of_checkout(path: Path) -> str | None:
    """The version that a pyproject.toml gives this package, or None: there is no such file, or it is of another one."""
    try:
        project = tomllib.loads(path.read_text())["project"]
        return str(project["version"]) if project["name"] == _NAME else None
    except (OSError, KeyError, ValueError):
        return None


def _found(path: Path) -> str:
    """The version of a checkout, else that of the installed package."""
    # A checkout can be newer than what was installed from it, so its file comes first.
    of_checkout = _of_checkout(path)
    if of_checkout is not None:
        return of_checkout
    try:
        return version(_NAME)
    except PackageNotFoundError:
        return _UNKNOWN


__version__ = _found(Path(__file__).resolve().parents[2] / "pyproject.toml")
