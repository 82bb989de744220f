"""One seed, split into independent named streams, so that two runs can differ in one of them alone."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator


def stream_seed(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the stream `name` of a run, e.g. `stream_seed(0, "order", epoch)`."""
    text = "/".join(str(part) for part in (seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *name: str | int) -> Generator:
    """A CPU generator for the stream `name`: numbers are drawn on the CPU so that they are equal on every device."""
    return Generator().manual_seed(stream_seed(seed, *name))


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Runs a block with torch's global generators at the stream `name`, and restores them afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        torch.manual_seed(stream_seed(seed, *name))
        yield
