"""The counters of operations that are active. Work that a GPU runs from a record passes none of them by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Counter(Protocol):
    """Counts the floating-point operations that it sees."""

    flops: int
    paused: bool


active: list[Counter] = []  # the innermost comes last


@contextmanager
def paused() -> Iterator[None]:
    """Runs a block whose operations are not counted."""
    stopped = [counter for counter in active if not counter.paused]
    for counter in stopped:
        counter.paused = True
    try:
        yield
    finally:
        for counter in stopped:
            counter.paused = False


def add(flops: int) -> None:
    """Adds operations that no counter has seen."""
    for counter in active:
        if not counter.paused:
            counter.flops += flops
