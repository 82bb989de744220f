"""What a person sees in a terminal: the log, one clear line for each failure, and an exit code."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from pai_bench.errors import ConfigError, UserError
from pai_bench.launch import colours, sweep_progress
from pai_bench.system import preemption
from pai_bench.system.world import in_worker, world

log = logging.getLogger("pai_bench")


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
    several = re.match(r"Ambiguous value for argument '(.*)'$", str(error).partition("\n")[0])
    if isinstance(error, HydraException) and several:
        return f"{several[1]}: several values are a sweep; put -m in front (a list stands in brackets)"
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
    text = "; ".join([one_line(error), *getattr(error, "__notes__", [])])
    line = colours.wrapped(f"{kind}: {where}{text}", sys.stderr)
    print(colours.painted(f"{kind}:", colours.RED, sys.stderr) + line.removeprefix(f"{kind}:"), file=sys.stderr)
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
    """Counts the runs inside the block, says how they ended, and exits with the worst code."""
    with sweep_progress.counting() as count, one_line_errors():
        yield
    sys.exit(count.worst)


def start_process() -> None:
    """Prepares this process for runs, which are all that it does. Later calls do nothing."""
    if not show_messages():
        return
    # A thread that waits for the others must not spin for long: beside other programs, spinning makes a step many times
    # slower. Not to spin at all makes it slower where no other program runs. OpenMP reads this when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.raiseExceptions = False  # a log line that cannot be written (full disk) must not hide the real failure
    for launcher in ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins.hydra_joblib_launcher._core"):
        logging.getLogger(launcher).setLevel(logging.WARNING)  # they print long lines; the sweep prints its own
    if in_worker():
        preemption.end_with_parent()


def show_messages() -> bool:
    """Gives the terminal the messages for people. The run.log of a run gets all messages.

    Returns:
        whether they were not shown before.
    """
    if any(isinstance(handler, colours.Console) for handler in log.handlers):
        return False
    log.setLevel(logging.DEBUG)
    log.propagate = False
    console = colours.Console()
    console.setLevel(logging.ERROR if world().rank > 0 else logging.WARNING if in_worker() else logging.INFO)
    console.setFormatter(colours.Formatter(sys.stdout))
    log.addHandler(console)
    sweep_progress.quieten()
    return True
