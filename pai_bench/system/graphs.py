"""Work on a GPU as one CUDA graph. Launching its hundreds of kernels one by one takes longer than running them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WARM_UPS = 3  # runs before the capture: algorithms are chosen, memory is taken, a model is compiled


def supported(device: torch.device) -> bool:
    """Whether a device has graphs."""
    return device.type == "cuda"


def recorded(
    work: Callable[[], None],
    device: torch.device,
    *,
    changed: Sequence[Tensor] = (),
    begin: Callable[[], object] = lambda: None,
    threads: bool = False,
) -> Callable[[], None]:
    """Records a function and returns what runs it again: the same kernels on the same memory, in one launch.

    The function is run a few times before. It must not wait for the device, and every tensor that it reads or writes
    must stay at its address as long as it is run again.

    Args:
        changed: the tensors that the function changes. They and the random numbers of the device are as before
            afterwards.
        begin: called before each of the first runs.
        threads: whether other threads use the device meanwhile, for example to pin memory.

    Raises:
        RuntimeError: the function does something that cannot be recorded, or the memory is too small.
    """
    before, random = [tensor.detach().clone() for tensor in changed], torch.cuda.get_rng_state(device)
    graph = torch.cuda.CUDAGraph()
    try:
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                begin()
                work()
        torch.cuda.current_stream(device).wait_stream(aside)
        with torch.cuda.graph(graph, capture_error_mode="thread_local" if threads else "global"):
            work()
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        torch.cuda.set_rng_state(random, device)
    return graph.replay
