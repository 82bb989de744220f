"""The command pai-bench, which is also python -m pai_bench: runs, and in the first word what else can be done."""

import importlib
import sys

from pai_bench.errors import ConfigError
from pai_bench.launch import cli, overrides, terminal
from pai_bench.launch.usage import COMMANDS


def main() -> None:
    """Does what the command line says: `pai-bench report ...` calls commands/report.py, and settings run."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if not first.isidentifier():
        cli.main()
        return
    with terminal.one_line_errors():
        if first not in COMMANDS:
            meant, known = overrides.meant(first, COMMANDS), ", ".join(COMMANDS)
            raise ConfigError(
                f"{first}: there is no such command{meant}; choose from {known}, or give settings as key=value"
            )
    sys.argv = [f"pai-bench {first}", *sys.argv[2:]]
    importlib.import_module(f"pai_bench.commands.{first}").main()


if __name__ == "__main__":
    main()
