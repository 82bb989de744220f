"""What can go wrong for a user: one clear line each, and the exit code it ends with."""

import importlib.util


class UserError(Exception):
    """A failure that one line explains: it names the setting, its value and the remedy."""

    exit_code = 1


class ConfigError(UserError):
    """A setting is wrong. Raised before anything is written."""

    exit_code = 2


def is_installed(library: str) -> bool:
    """Whether a library is there to import. A folder of its name is no library."""
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None


def check_installed(user: str, library: str, extra: str) -> None:
    """Makes sure that an optional library is there.

    Args:
        user: what needs it.
        extra: the part of pyproject.toml's optional dependencies that brings it.

    Raises:
        ConfigError: it is not.
    """
    if not is_installed(library):
        raise ConfigError(
            f"{user} {library}, which is not installed: pip install {library} (it belongs to 'pai_bench[{extra}]')"
        )


class DataError(UserError):
    """A dataset is missing, incomplete or damaged."""

    exit_code = 4


class NotReproducedError(UserError):
    """A published number was asked to be reproduced and was not."""

    exit_code = 5


class OwnedError(UserError):
    """Another live process is working on the run."""

    exit_code = 6


class PreemptedError(UserError):
    """The process was asked to end; what it had done is in a checkpoint, and the same command goes on from there."""

    exit_code = 75


class LostWorkerError(UserError):
    """A process that decodes images is gone."""
