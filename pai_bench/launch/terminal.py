"""What a person sees in a terminal: the log, one clear line for each failure, an exit code, and a count of runs."""

import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from pai_bench.errors import ConfigError, PreemptedError, UserError
from pai_bench.system import preemption
from pai_bench.system.world import world

log = logging.getLogger("pai_bench")


OUTCOMES = "PAI_BENCH_OUTCOMES"  # environment variable: a file to which every run of a sweep adds a line


def one_line(error: BaseException) -> str:
    """The reason for a failure, in one line."""
    if type(error).__name__ == "TerminatedWorkerError":
        return (
            "a process of the sweep was killed, perhaps for want of memory; the same command goes on with what is left "
            "(fewer at once: hydra.launcher.n_jobs=)"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file == "hydra/launcher/joblib":
        return "hydra/launcher=parallel: hydra-joblib-launcher is not installed; pip install hydra-joblib-launcher"
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


def in_worker() -> bool:
    """Whether this process is a worker of a sweep. Workers share one terminal, so they print little."""
    return multiprocessing.current_process().name != "MainProcess"


def count(code: int, skipped: bool = False) -> None:
    """Adds a run to the count of this sweep, by its exit code."""
    if OUTCOMES in os.environ:
        with Path(os.environ[OUTCOMES]).open("a") as file:
            file.write(f"{code} {int(skipped)}\n")


def _rank() -> int:
    """The rank of this process. It is 0 too if the environment makes no sense: that error must be reported."""
    try:
        return world().rank
    except ConfigError:
        return 0


def report(error: Exception) -> int:
    """Prints one line about a failure, and returns its exit code."""
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(error, InstantiationException):
        code = ConfigError.exit_code
    else:
        code = getattr(error, "exit_code", UserError.exit_code)
    rank = _rank()
    if rank > 0 and (getattr(error, "shared", False) or code in (2, 75) or preemption.requested()):
        return code  # the first process reports it
    kind = {2: "config error", 4: "data error", 6: "owned", 75: "preempted"}.get(code, "error")
    where = f"process {rank}: " if rank else ""
    print(f"{kind}: {where}{'; '.join([one_line(error), *getattr(error, '__notes__', [])])}", file=sys.stderr)
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
        sys.exit(report(error))


@contextmanager
def counted() -> Iterator[None]:
    """Counts the runs inside the block, logs the numbers by outcome, and exits with the worst code."""
    with tempfile.NamedTemporaryFile("r", prefix="pai_bench-") as outcomes:
        os.environ[OUTCOMES] = outcomes.name
        try:
            with one_line_errors():
                yield
        finally:
            del os.environ[OUTCOMES]
            runs = [tuple(map(int, line.split())) for line in outcomes]
            if len(runs) > 1:
                preempted = sum(code == PreemptedError.exit_code for code, _ in runs)
                failed, skipped = sum(code != 0 for code, _ in runs) - preempted, sum(skipped for _, skipped in runs)
                done = len(runs) - failed - skipped - preempted
                rest = f", {preempted} preempted" if preempted else ""
                log.info("%d done, %d skipped, %d failed%s", done, skipped, failed, rest)
    sys.exit(max((code for code, _ in runs), default=0))


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stdout is at the time. Notebooks replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message."""
        self.stream = sys.stdout
        super().emit(record)


def start_process() -> None:
    """Prepares this process for runs. Later calls do nothing.

    The terminal gets the messages for people. The run.log of a run gets all messages.
    """
    if any(isinstance(handler, _Console) for handler in log.handlers):
        return
    # A thread that waits for the others must not spin: beside other programs, spinning makes a step many times slower.
    # OpenMP reads this when torch is imported.
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.raiseExceptions = False  # a log line that cannot be written (full disk) must not hide the real failure
    log.setLevel(logging.DEBUG)
    log.propagate = False
    console = _Console()
    console.setLevel(logging.ERROR if world().rank > 0 else logging.WARNING if in_worker() else logging.INFO)
    log.addHandler(console)
    if in_worker():
        preemption.end_with_parent()
