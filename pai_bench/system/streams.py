"""Copies to a GPU while it computes."""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

_IN_USE = 2  # batches on the GPU at a time: one is copied while the other is computed with


@cache  # torch keeps freed memory for each stream apart, so a new one for every epoch would hoard it
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which batches are made."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def beside(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches. On a GPU, what makes them runs on a stream of its own, beside the work on earlier batches.

    The program waits where it is more than one batch ahead of the GPU. Otherwise batches would fill its memory.
    """
    if device.type != "cuda":
        yield from batches
        return
    main, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(main)  # constants that were made there
    used: deque[torch.cuda.Event] = deque()  # when the work on each of the last batches is done
    source = iter(batches)
    while True:
        if len(used) == _IN_USE:
            used.popleft().synchronize()
        with torch.cuda.stream(side):
            batch = next(source, None)
        if batch is None:
            return
        main.wait_stream(side)
        for tensor in batch:
            tensor.record_stream(main)  # its memory is not used again before the work there is done
        yield batch
        used.append(main.record_event())
