"""The command line: compose, run, and end with one clear line and an exit code that says what happened."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pai_bench import config, preemption
from pai_bench.errors import ConfigError, PreemptedError, UserError

CONF = Path(__file__).resolve().parents[1] / "conf"
log = logging.getLogger("pai_bench")

_exit_codes: list[int] = []  # of the runs of this process, in order
_skipped: list[str] = []  # those that were finished before


def _one_line(error: BaseException) -> str:
    """The reason for a failure in a line: the setting that it names, or the error's own words."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    reason = error.__cause__ if isinstance(error, HydraException) and error.__cause__ is not None else error
    lines = [line.strip() for line in f"{error}\n{reason}".splitlines() if line.strip()]
    details = [
        line for line in dict.fromkeys(lines) if not line.startswith(("object_type", "full_key", "reference_type"))
    ]
    text = "; ".join(details)
    return (
        text
        if isinstance(error, (UserError, HydraException, OmegaConfBaseException))
        else f"{type(error).__name__}: {text}"
    )


def _run(composed: DictConfig) -> float | None:
    """One job. Its failure is reported and counted, and the next job of a sweep goes on."""
    if preemption.requested():
        sys.exit(PreemptedError.exit_code)
    try:
        completed = config.complete(composed)
        from pai_bench import experiment

        if experiment.is_finished(completed):
            _skipped.append(config.run_id(completed))
        row: dict[str, Any] = experiment.run(completed)
    except Exception as error:
        _exit_codes.append(_report(error))
        if isinstance(error, PreemptedError):
            sys.exit(error.exit_code)
        return None
    _exit_codes.append(0)
    return float(row["test_top1"])


def _report(error: Exception) -> int:
    """Says in one line what went wrong, and returns the exit code."""
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(error, InstantiationException):
        code = ConfigError.exit_code
    else:
        code = getattr(error, "exit_code", UserError.exit_code)
    kind = {2: "config error", 4: "data error", 6: "owned", 75: "preempted"}.get(code, "error")
    print(f"{kind}: {'; '.join([_one_line(error), *getattr(error, '__notes__', [])])}", file=sys.stderr)
    return code


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a failure inside the block into one line on stderr and the exit code of its kind."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(_report(error))


def compose(overrides: list[str]) -> dict[str, Any]:
    """The completed config that a command line with these overrides would run.

    Raises:
        ConfigError: and Hydra's own errors, for a wrong override.
    """
    config.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return config.complete(hydra.compose("config", overrides))


def start_logging() -> None:
    """Sends what a person follows to the terminal; run.log, where there is one, gets everything."""
    logging.raiseExceptions = False  # a log line that cannot be written (full disk) must not hide the real failure
    log.setLevel(logging.DEBUG)
    log.propagate = False
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO)
    log.handlers = [console]


def main() -> None:
    """Runs what the command line says. Exits with the worst code of its runs.

    0: finished, now or before. 1: failure. 2: config error, nothing was written. 4: data missing or damaged.
    6: another live process is running it. 75: preempted, a checkpoint is written.
    """
    # Hydra reports errors itself, in its own words and with exit code 1, unless it is told to raise them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    config.register()
    start_logging()
    preemption.watch()
    with one_line_errors():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_run)()
    if len(_exit_codes) > 1:
        failed = sum(code != 0 for code in _exit_codes)
        skipped = len(_skipped)
        log.info("%d done, %d skipped, %d failed", len(_exit_codes) - failed - skipped, skipped, failed)
    sys.exit(max(_exit_codes, default=0))
