"""Masks over the prunable weights of a model: which weights those are, how many are kept, and how masks are applied."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.weak import WeakTensorKeyDictionary

from pai_bench.core import Mask
from pai_bench.errors import ConfigError


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions and linear layers, classifier included, by parameter name in module order.

    Biases and the parameters of normalisation layers are never prunable. A weight shared by two layers counts once.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and id(module.weight) in names:
            found[names[id(module.weight)]] = cast(nn.Parameter, module.weight)
    return found


def full(model: nn.Module) -> Mask:
    """The mask that keeps every prunable weight."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}


def total(tensors: Mapping[str, Tensor]) -> int:
    """Number of entries: N, when given a mask, scores or the prunable weights."""
    return sum(tensor.numel() for tensor in tensors.values())


_positions: Any = WeakTensorKeyDictionary()  # mask -> its version and its positions


def positions(mask: Tensor) -> Tensor:
    """Where a mask keeps something: flat indices (n,) int64, ascending.

    They are found once and remembered as long as the mask lives, since a round asks several times.
    """
    version, found = cast(tuple[int | None, Tensor], _positions.get(mask, (None, mask)))
    if version != mask._version:
        if mask.device.type == "cpu":
            found = torch.from_numpy(np.flatnonzero(mask.numpy()))  # a quarter of the time of torch.nonzero
        else:
            found = mask.flatten().nonzero().squeeze(1)
        if len(found) < mask.numel():
            _positions[mask] = (mask._version, found)
    return found


def at(shape: torch.Size, positions: Tensor) -> Tensor:
    """The mask that keeps what lies at flat positions."""
    mask = torch.zeros(shape, dtype=torch.bool, device=positions.device)
    mask.view(-1)[positions] = True
    _positions[mask] = (mask._version, positions)
    return mask


def kept(mask: Mask) -> int:
    """Number of weights kept."""
    return sum(count(tensor) for tensor in mask.values())


def count(tensor: Tensor) -> int:
    """Number of entries of a bool tensor that are true."""
    # numpy is ten times as fast on the CPU.
    return int(np.count_nonzero(tensor.numpy()) if tensor.device.type == "cpu" else tensor.count_nonzero())


def sparsity(mask: Mask) -> float:
    """Fraction of the prunable weights that are pruned, in [0, 1]."""
    return 1 - kept(mask) / total(mask)


def num_kept(sparsity: float, num_prunable: int) -> int:
    """k = round((1 - sparsity) * N), the exact number of weights to keep.

    Raises:
        ConfigError: nothing would be left.
    """
    # 1 - 0.98 is not 0.02 in binary; twelve digits are more than any N can tell apart.
    k = round(round(1 - sparsity, 12) * num_prunable)
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


def has_empty_slices(mask: Mask) -> bool:
    """Whether some output or input channel of a layer has nothing kept."""
    weights = [tensor.flatten(2).any(2) if tensor.ndim > 2 else tensor for tensor in mask.values() if tensor.ndim > 1]
    return any(not between.any(dim).all() for between in weights for dim in (0, 1))


def minus(mask: Mask, other: Mask) -> Mask:
    """What the second mask does not keep of the first, for the names of the second; all, of what the first lacks."""
    return {name: mask[name] & ~tensor if name in mask else ~tensor for name, tensor in other.items()}


@torch.no_grad()
def zero_(model: nn.Module, gone: Mask) -> None:
    """Sets weights of the model to zero, in place: those that are marked."""
    parameters = dict(model.named_parameters())
    for name, tensor in gone.items():
        weight = parameters[name]
        if weight.is_contiguous() and 4 * count(tensor) < tensor.numel():
            weight.view(-1).index_fill_(0, positions(tensor), 0)
        else:
            weight.masked_fill_(tensor, 0)


@torch.no_grad()
def apply_(model: nn.Module, mask: Mask) -> None:
    """Sets the pruned weights of the model to zero, in place."""
    parameters = dict(model.named_parameters())
    for name, tensor in mask.items():
        weight = parameters[name]
        weight.mul_(tensor.to(weight.dtype))  # a product of two types takes twice the time
