"""Ends a process that goes on after a second SIGTERM or Ctrl-C, however it hangs.

Runs as a process of its own: Python cannot handle a signal while C code spins, and no other thread gets a turn then.
`preemption.watch` starts it. It reads the numbers of the signals that its parent gets, a byte each.
"""

import os
import select
import signal
import sys
import time

SAME_NOTICE_SECONDS = 1.0  # launchers tell a process and then its whole group: that is one notice
_LEAVE_SECONDS = 0.5  # for a parent that does not hang to end by itself


def _outlives(seconds: float) -> bool:
    """Whether the parent is still there after so long; its end closes the pipe."""
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
