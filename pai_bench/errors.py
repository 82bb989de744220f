"""What can go wrong for a user: one clear line each, and the exit code it ends with."""


class UserError(Exception):
    """A failure that one line explains: it names the setting, its value and the remedy."""

    exit_code = 1


class ConfigError(UserError):
    """A setting is wrong. Raised before anything is written."""

    exit_code = 2


class DataError(UserError):
    """A dataset is missing, incomplete or damaged."""

    exit_code = 4
