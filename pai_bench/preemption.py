"""Notice that the machine is wanted for something else: SIGTERM, SIGUSR1, SIGUSR2."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_received: list[str] = []


def watch() -> None:
    """Makes this process note the signals instead of dying of them; runs look at `requested` between steps."""
    owner = os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker process has inherited the handler: it dies as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _received.append(signal.Signals(number).name)

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
