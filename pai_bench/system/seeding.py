"""One seed, split into independent named streams, so that two runs can differ in one of them alone."""

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
    """A CPU generator for the stream `name`: numbers are drawn on the CPU so that they are equal on every device."""
    return Generator().manual_seed(stream_seed(seed, *name))


def states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators that a run uses: the CPU's, then its GPU's if it has one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_states(states: list[Tensor], device: torch.device) -> None:
    """Puts the global generators back to what `states` returned, on this GPU or another one; without one the CPU's."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Runs a block with torch's global generators at the stream `name`, and restores them afterwards."""
    before, number = torch.get_rng_state(), stream_seed(seed, *name)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        torch.default_generator.manual_seed(number)  # torch.manual_seed takes a hundred times as long
        if cuda:
            torch.cuda.manual_seed_all(number)
        yield
    finally:
        torch.set_rng_state(before)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
