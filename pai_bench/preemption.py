"""Notice that the machine is wanted for something else: SIGTERM, SIGUSR1, SIGUSR2."""

import multiprocessing
import os
import signal
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_received: list[str] = []
_watching: list[int] = []  # the process that does


def watch() -> None:
    """Makes this process note the signals instead of dying of them; runs look at `requested` between steps."""
    owner = os.getpid()
    if _watching == [owner]:
        return
    _watching[:] = [owner]

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker process has inherited the handler: it dies as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _received.append(signal.Signals(number).name)
        for child in multiprocessing.active_children():
            if child.name.startswith("LokyProcess") and child.pid:  # the workers of a sweep, which do the runs
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    for number in SIGNALS:
        signal.signal(number, note)


def leave_alone(worker: int = 0) -> None:
    """Gives a worker process back the usual SIGTERM, by which its parent ends it, and makes it ignore the notices."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """The name of the first signal received, if any."""
    return _received[0] if _received else None
