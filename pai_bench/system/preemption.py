"""Signals that ask a run to stop: SIGTERM, SIGUSR1, SIGUSR2, or Ctrl-C.

After the first signal, the run writes a checkpoint at its next step and ends. A second SIGTERM or Ctrl-C ends the
process at once.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pai_bench.errors import PreemptedError
from pai_bench.system import second_signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGTERM, signal.SIGINT)  # the second of these ends the process

_received: list[str] = []
_watching: list[int] = []  # the id of the process that watches
_asked: list[float] = []  # when SIGTERM or Ctrl-C came
_last_words: list[Callable[[], None]] = []
_pipe: list[int] = []  # tells the process of `second_signal` about signals


def watch() -> None:
    """Makes this process remember the first signal instead of ending at it. Runs read `requested` between steps."""
    owner = os.getpid()
    if _watching == [owner]:
        return
    _watching[:] = [owner]

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker process has inherited the handler; it ends at the signal, as usual
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number in _ENDING:
            _asked.append(time.monotonic())
            if _asked[-1] - _asked[0] > second_signal.SAME_NOTICE_SECONDS:
                _die(number)
        _received.append(signal.Signals(number).name)
        for child in multiprocessing.active_children():
            if child.name.startswith("LokyProcess") and child.pid:  # the workers of a sweep, which do the runs
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    for number in SIGNALS:
        signal.signal(number, note)
    _end_though_it_hangs()


def _die(number: int) -> None:
    """Calls the functions of `last_words`, then ends this process by a signal."""
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_DFL)
    for say in _last_words:
        with suppress(Exception):
            say()
    os.kill(os.getpid(), number)


def _end_though_it_hangs() -> None:
    """Starts another process, which ends this one if Python cannot handle the second signal."""
    reading, writing = os.pipe()
    _pipe.append(writing)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    subprocess.Popen(
        [sys.executable, "-I", "-S", second_signal.__file__, str(os.getpid())],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(reading)


def _forget() -> None:
    """Run in a forked worker: the signals of a worker must not reach the process that watches its parent."""
    if _pipe:
        signal.set_wakeup_fd(-1)
        os.close(_pipe.pop())


os.register_at_fork(after_in_child=_forget)


@contextmanager
def last_words(say: Callable[[], None]) -> Iterator[None]:
    """Inside the block, a second signal calls `say` before the process ends."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def end_with_parent() -> None:
    """Makes this worker process end within a second after its parent, even if the parent is killed."""
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


def leave_alone(worker: int = 0) -> None:
    """Makes a worker process end at SIGTERM, which its parent sends, and ignore the other signals."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """The name of the first signal received, if any."""
    return _received[0] if _received else None


def check() -> None:
    """Stops a run that has not begun yet.

    Raises:
        PreemptedError: a signal came.
    """
    if name := requested():
        raise PreemptedError(f"{name} came before the run began; the same command starts it")
