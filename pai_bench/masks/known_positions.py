"""The positions of sparse masks, remembered while the mask lives.

Late rounds of a search keep about 1 % of the weights. With known positions they gather, count and clear only these.
Where nothing is known, the plain formula beside each use gives the same result.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SMALL = 1 << 16  # in masks with fewer entries, positions are found as fast as they are remembered
_known: Any = WeakTensorKeyDictionary()  # mask -> its version and its positions


def mask_at(shape: torch.Size, positions: Tensor) -> Tensor:
    """The mask that keeps the entries at flat positions (ascending), which are remembered."""
    mask = torch.zeros(shape, dtype=torch.bool, device=positions.device)
    mask.view(-1)[positions] = True
    if mask.numel() >= _SMALL:
        _known[mask] = (mask._version, positions)
    return mask


def known(mask: Tensor) -> Tensor | None:
    """The flat positions (n,) that a mask keeps, ascending. None: they are not known, or the mask has changed since."""
    if mask.numel() < _SMALL:
        return None
    version, positions = _known.get(mask, (None, None))
    return cast(Tensor, positions) if version == mask._version else None
