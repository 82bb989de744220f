"""Masks over the prunable weights of a model: which weights those are, how many are kept, and how masks are applied."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.weak import WeakTensorKeyDictionary

from pai_bench.core import Mask, Rounding
from pai_bench.errors import ConfigError

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions, linear layers and attention's projections, classifier included, by parameter name.

    They come in module order. Biases and the parameters of normalisation layers are never prunable. A weight shared by
    two layers counts once.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            weights = [getattr(module, name) for name in _PROJECTIONS]
        else:
            weights = [module.weight] if isinstance(module, (_ConvNd, nn.Linear)) else []
        found |= {names[id(weight)]: weight for weight in weights if id(weight) in names}
    return found


def unprunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Other parameters of two dimensions or more, which no mask covers: embeddings, mixtures of kernels."""
    covered = prunable(model)
    named = model.named_parameters()
    return {name: p for name, p in named if name not in covered and sum(size > 1 for size in p.shape) > 1}


def full(model: nn.Module) -> Mask:
    """The mask that keeps every prunable weight."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}


def total(tensors: Mapping[str, Tensor]) -> int:
    """Number of entries: N, when given a mask, scores or the prunable weights."""
    return sum(tensor.numel() for tensor in tensors.values())


_positions: Any = WeakTensorKeyDictionary()  # mask -> its version and its positions
_SMALL = 1 << 16  # entries of a mask that are found again as fast as they are remembered
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
_IN_CACHE = 1 << 17  # entries that are converted at a time, to stay in the cache of a core


def remembered(mask: Tensor) -> Tensor | None:
    """Where a mask keeps something, if that is known already."""
    if mask.numel() < _SMALL:
        return None
    version, found = _positions.get(mask, (None, None))
    return cast(Tensor, found) if version == mask._version else None


def positions(mask: Tensor) -> Tensor:
    """Where a mask keeps something: flat indices (n,) int64, ascending."""
    found = remembered(mask)
    if found is not None:
        return found
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # a quarter of the time of torch.nonzero
    return mask.flatten().nonzero().squeeze(1)


def at(shape: torch.Size, positions: Tensor) -> Tensor:
    """The mask that keeps what lies at flat positions, ascending; they are remembered as long as it lives."""
    mask = torch.zeros(shape, dtype=torch.bool, device=positions.device)
    mask.view(-1)[positions] = True
    if mask.numel() >= _SMALL:
        _positions[mask] = (mask._version, positions)
    return mask


def kept(mask: Mask) -> int:
    """Number of weights kept."""
    return sum(count(tensor) for tensor in mask.values())


def count(tensor: Tensor) -> int:
    """Number of entries of a bool tensor that are true."""
    found = remembered(tensor)
    if found is not None:
        return len(found)
    # numpy is ten times as fast on the CPU.
    return int(np.count_nonzero(tensor.numpy()) if tensor.device.type == "cpu" else tensor.count_nonzero())


def sparsity(mask: Mask) -> float:
    """Fraction of the prunable weights that are pruned, in [0, 1]."""
    return 1 - kept(mask) / total(mask)


def num_kept(sparsity: float, num_prunable: int, rounding: Rounding = "nearest") -> int:
    """k = round((1 - sparsity) * N), the exact number of weights to keep; a half goes to the even number.

    Raises:
        ConfigError: nothing would be left.
    """
    if rounding == "nearest":
        # 1 - 0.98 is not 0.02 in binary; twelve digits are more than any N can tell apart.
        k = round(round(1 - sparsity, 12) * num_prunable)
    else:
        whole = math.ceil if rounding == "up" else math.floor
        k = whole(round((1 - sparsity) * num_prunable, 6))  # 0.02 * 100 is 2, whatever its last bits say
    if k < 1:
        raise ConfigError(
            f"sparsity {sparsity} leaves none of {num_prunable} weights; give at most {1 - 1 / num_prunable:.9g}"
        )
    return k


def densities(mask: Mask) -> dict[str, float]:
    """Fraction kept of each prunable tensor."""
    return {name: count(tensor) / tensor.numel() for name, tensor in mask.items()}


def collapsed(mask: Mask) -> list[str]:
    """Names of the prunable tensors with nothing kept (layer collapse)."""
    return [name for name, tensor in mask.items() if not tensor.any()]


def connected(mask: Tensor) -> Tensor:
    """Which channels (O, I) of a weight (O, I, ...) something kept connects."""
    if mask.ndim == 2:
        return mask
    found = remembered(mask)
    if found is None:
        return mask.flatten(2).any(2)
    connections = torch.zeros(mask.shape[:2], dtype=torch.bool, device=mask.device)
    connections.view(-1)[found // mask[0, 0].numel()] = True
    return connections


def has_empty_slices(mask: Mask) -> bool:
    """Whether some output or input channel of a layer has nothing kept."""
    weights = [connected(tensor) for tensor in mask.values() if tensor.ndim > 1]
    return any(not between.any(dim).all() for between in weights for dim in (0, 1))


@torch.no_grad()
def apply_narrower_(model: nn.Module, before: Mask, after: Mask) -> None:
    """Sets to zero, in place, what one mask keeps of a model and the next does not; the rest stays as it is.

    Args:
        before: the mask that the weights have; of a name that it lacks it keeps all.
    """
    parameters = dict(model.named_parameters())
    for name, kept in after.items():
        clear_(parameters[name], kept, before.get(name))


@torch.no_grad()
def apply_(model: nn.Module, mask: Mask) -> None:
    """Sets the pruned weights of the model to zero, in place."""
    parameters = dict(model.named_parameters())
    for name, kept in mask.items():
        clear_(parameters[name], kept)


def clear_(weight: Tensor, kept: Tensor, before: Tensor | None = None) -> None:
    """Sets all but what is kept of a tensor to zero, in place; not for autograd to see.

    Args:
        before: where all else is zero already, if that is known.
    """
    found = remembered(before) if before is not None else None
    if found is not None:
        gone = found[~kept.flatten()[found]]
        if weight.is_contiguous():
            weight.view(-1).index_fill_(0, gone, 0)
        else:
            weight[torch.unravel_index(gone, weight.shape)] = 0
        return
    # To keep all bits or none takes half the time of a product, and a quarter of that of masked_fill_.
    bits = weight.view(_INTEGERS[weight.element_size()])
    signs = kept.view(torch.int8).neg()
    if kept.numel() <= _IN_CACHE or kept.device.type != "cpu":
        bits.bitwise_and_(signs)
        return
    rows = max(_IN_CACHE * len(kept) // kept.numel(), 1)
    for some, sign in zip(torch.split(bits, rows), torch.split(signs, rows), strict=True):
        some.bitwise_and_(sign)
