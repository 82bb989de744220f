"""Processes that tests start: copies of this one, which spare the seconds that importing torch takes, and new ones."""

import atexit
import importlib
import logging
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra

from pai_bench.launch import overrides

ROOT = Path(__file__).resolve().parents[1]

Ended = subprocess.CompletedProcess[str]

# torch counts its devices at the first backward pass. If it finds one, copies of the process can make no backward pass.
# A fake tensor, which torch.compile and torch.export use, counts as a device. So the first pass comes before it.
torch.ones((), requires_grad=True).backward()


def in_child(work: Callable[[], object]) -> int:
    """Runs a function in a copy of this process; returns the process id."""
    pid = os.fork()
    if pid == 0:
        logging.disable()
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(getattr(sys.exception(), "exit_code", 1))
    return pid


def run_script(script: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Ended:
    """Runs a script of the repository as a user would, with one thread; returns the finished process.

    Args:
        env: in addition to the environment of this process. It is for a new process: libraries read it at their import.
    """
    command = [str(ROOT / script), *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA"))}
    environment |= {"OMP_NUM_THREADS": "1"}
    # A copy can use neither CUDA nor the pool of processes that joblib keeps.
    launches = any(word.startswith("hydra/launcher=") for word in arguments)
    if env is None and not launches and not torch.cuda.is_available():
        return _run_copy(command, environment, cwd)
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def _run_copy(command: list[str], environment: Mapping[str, str], cwd: Path) -> Ended:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _as_new(environment, cwd, out.fileno(), err.fileno())
                code = _run(command)
            finally:
                os._exit(code)
        code = _code_of(pid, command)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def _code_of(pid: int, command: list[str], timeout_seconds: float = 300) -> int:
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise subprocess.TimeoutExpired(command, timeout_seconds)


def _as_new(environment: Mapping[str, str], cwd: Path, out: int, err: int) -> None:
    """Undoes what pytest and earlier tests did to this process, but for what was imported."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, to in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(to, number)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(warnings)  # pytest collects them
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    logging.raiseExceptions = True
    for log in (logging.getLogger(), logging.getLogger("pai_bench")):
        log.handlers, log.propagate = [], True
        log.setLevel(logging.WARNING if log.name == "root" else logging.NOTSET)
    GlobalHydra.instance().clear()
    overrides._say_once.cache_clear()
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)


def _run(command: list[str]) -> int:
    """Runs a script in this process as Python does; returns the exit code."""
    sys.argv = list(command)
    code: object = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


# Start-up -------------------------------------------------------------------------------------------------------------


def imported(script: str, arguments: list[str], names: set[str], folder: Path) -> set[str]:
    """Which of some modules a script has imported by its end, in a process of its own."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = [{script!r}, *{arguments!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print('IMPORTED', *sorted({names!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return set(done.stdout.splitlines()[-1].split()[1:])


HEAVY = {"torch", "torchvision", "timm", "wandb", "numpy", "matplotlib", "sklearn", "pandas", "safetensors", "scipy"}
