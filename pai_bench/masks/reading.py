"""Numbers that are read off a device. A GPU is waited for at each read, until it has done all that it was asked."""

from typing import Any, cast

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_counts: Any = WeakTensorKeyDictionary()  # mask -> its version and how many entries are True


def free(tensor: Tensor) -> bool:
    """Whether reading a tensor waits for nothing: it lies in the memory of the CPU."""
    return tensor.device.type == "cpu"


def note_count(mask: Tensor, count: int) -> None:
    """Remembers how many entries of a mask are True, so that it is read once."""
    if not mask.is_inference():  # such a tensor does not know its version
        _counts[mask] = (mask._version, count)


def noted_count(mask: Tensor) -> int | None:
    """How many entries of a mask are True. None: it was not noted, or the mask has changed since."""
    if mask not in _counts:
        return None
    version, count = _counts[mask]
    return cast(int, count) if version == mask._version else None
