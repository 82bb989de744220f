"""One seed, split into independent named streams. So two runs can differ in one stream only."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor


def stream_seed(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the stream `name` of a run, e.g. `stream_seed(0, "order", epoch)`."""
    text = "/".join(str(part) for part in (seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *name: str | int) -> Generator:
    """A generator for the stream `name`. It draws on the CPU, so the numbers are the same for every device."""
    return Generator().manual_seed(stream_seed(seed, *name))


def states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators that a run uses: that of the CPU, then that of its GPU if it has one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_states(states: list[Tensor], device: torch.device) -> None:
    """Restores the states that `states` returned. Without a GPU, only the generator of the CPU is restored."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Runs a block with torch's global generators seeded for the stream `name`. Restores them afterwards."""
    before, number = torch.get_rng_state(), stream_seed(seed, *name)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        torch.default_generator.manual_seed(number)  # torch.manual_seed takes 100 times as long
        if cuda:
            torch.cuda.manual_seed_all(number)
        yield
    finally:
        torch.set_rng_state(before)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
