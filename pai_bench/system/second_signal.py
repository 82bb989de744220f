"""Ends a process that hangs after a second SIGTERM or Ctrl-C.

This is a process of its own. While C code runs, Python handles no signal, and no other Python thread can run.
`preemption.watch` starts it. It reads the numbers of the signals that its parent receives, one byte each.
"""

import os
import select
import signal
import sys
import time

# A launcher signals a process and then its whole group. Signals this close together count as one.
SAME_NOTICE_SECONDS = 1.0
_LEAVE_SECONDS = 0.5  # a parent that does not hang ends by itself within this time


def _outlives(seconds: float) -> bool:
    """Whether the parent is still there after this time. Its end closes the pipe."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([0], [], [], left)[0] and not os.read(0, 1):
            return False
    return True


def main(parent: int) -> None:
    """Waits for the second signal or the end of the parent."""
    first = None
    while byte := os.read(0, 1):
        if byte[0] not in (signal.SIGTERM, signal.SIGINT):
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > SAME_NOTICE_SECONDS and _outlives(_LEAVE_SECONDS):
            os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
