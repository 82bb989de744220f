"""CUDA graphs, emulated on a CPU: what a function does to tensors is recorded, and run again on the same memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pai_bench.masks import reading
from pai_bench.system import devices, graphs, seeding

# What waits for the device, or copies from the CPU: a graph cannot hold it.
_FORBIDDEN = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique", "_unique2", "is_nonzero",
    "randperm", "repeat_interleave",
}  # fmt: skip


def _reads(func: Any, args: Any) -> bool:
    """Whether an operation waits for the device, or copies from the CPU."""
    name = func.overloadpacket.__name__
    bools = name.startswith("index") and any(
        isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
    )
    return name in _FORBIDDEN or bools


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU, where the tensors of a CPU take the place of those of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += _reads(func, args)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads() -> Iterator[Reads]:
    """Counts what waits for a GPU in a block. Tensors have the rules of those on a GPU."""
    reads = Reads()
    with pytest.MonkeyPatch.context() as patch, reads:
        patch.setattr(reading, "free", lambda tensor: False)
        for name in ("tolist", "numpy"):  # no operation of torch
            whole = getattr(Tensor, name)

            def read(tensor: Tensor, whole: Any = whole) -> Any:
                reads.number += 1
                return whole(tensor)

            patch.setattr(Tensor, name, read)

        def wait(device: torch.device) -> None:
            reads.number += 1

        patch.setattr(devices, "wait", wait)
        yield reads


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _reads(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


def _replayed(calls: list[tuple[Any, Any, Any, Any]]) -> Callable[[], None]:
    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs, out in calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)

    return replay


def recorded(
    work: Callable[[], None],
    device: torch.device,
    *,
    changed: Sequence[Tensor] = (),
    begin: Callable[[], object] = lambda: None,
    threads: bool = False,
    random: bool = True,
    warm_ups: int = 2,
) -> Callable[[], None]:
    """Like `graphs.recorded`. Raises a RuntimeError where a real capture would."""
    before, numbers = [tensor.detach().clone() for tensor in changed], seeding.states(device)
    recorder = _Recorder()
    try:
        for _ in range(warm_ups):
            begin()
            work()
        if not random:
            graphs.refuse_random(numbers, seeding.states(device))
        begin()
        with recorder:
            work()
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        seeding.set_states(numbers, device)
    return _replayed(recorder.calls)


@contextmanager
def emulated() -> Iterator[list[Callable[[], None]]]:
    """Gives a CPU emulated graphs. Yields the list of those that are recorded."""
    made: list[Callable[[], None]] = []

    def recorded_here(*arguments: Any, **settings: Any) -> Callable[[], None]:
        made.append(recorded(*arguments, **settings))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "supported", lambda device: True)
        patch.setattr(graphs, "recorded", recorded_here)
        yield made
