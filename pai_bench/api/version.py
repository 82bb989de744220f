"""The version of the package. pyproject.toml alone says it."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pai_bench.system import checkout

_UNKNOWN = "0+unknown"


def _found(folder: Path) -> str:
    """The version of a checkout, else that of the installed package."""
    # A checkout can be newer than what was installed from it, so its file comes first.
    of_checkout = checkout.version_in(folder)
    if of_checkout is not None:
        return of_checkout
    try:
        return version(checkout.NAME)
    except PackageNotFoundError:
        return _UNKNOWN


__version__ = _found(checkout.ROOT)
