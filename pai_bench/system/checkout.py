"""The checkout that this package is run from, if it is no installed copy."""

import tomllib
from pathlib import Path

NAME = "pai_bench"
# Of an installed package it is the folder of all packages.
ROOT = Path(__file__).resolve().parents[2]


def version_in(folder: Path) -> str | None:
    """The version that a pyproject.toml gives this package, or None: there is no such file, or it is of another one."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        return str(project["version"]) if project["name"] == NAME else None
    except (OSError, KeyError, ValueError):
        return None
