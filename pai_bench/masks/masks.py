"""Masks over the prunable weights of a model: which weights these are, how many a mask keeps, and how it is applied.

A mask is a dictionary: parameter name -> bool tensor of the parameter's shape, True = kept.
"""

import math
from collections.abc import Mapping
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pai_bench.core import Mask, Rounding
from pai_bench.errors import ConfigError
from pai_bench.masks.clearing import clear_, clear_removed_
from pai_bench.masks.known_positions import known

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention

# Which weights --------------------------------------------------------------------------------------------------------


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions, linear layers and attention projections, by parameter name, in module order.

    The classifier is among them. Biases and the parameters of normalisation layers are never prunable. A weight that
    two layers share counts once.
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
    """The other parameters with two or more dimensions, which no mask covers: embeddings, mixtures of kernels."""
    covered = prunable(model)
    named = model.named_parameters()
    return {name: p for name, p in named if name not in covered and sum(size > 1 for size in p.shape) > 1}


def full(model: nn.Module) -> Mask:
    """The mask that keeps every prunable weight."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}


# How many -------------------------------------------------------------------------------------------------------------


def total(tensors: Mapping[str, Tensor]) -> int:
    """The number of entries: N, when given a mask, scores or the prunable weights."""
    return sum(tensor.numel() for tensor in tensors.values())


def count(tensor: Tensor) -> int:
    """The number of entries of a bool tensor that are True."""
    if (found := known(tensor)) is not None:
        return len(found)
    # On the CPU numpy is ten times as fast.
    return int(np.count_nonzero(tensor.numpy()) if tensor.device.type == "cpu" else tensor.count_nonzero())


def counts(mask: Mask) -> list[int]:
    """`count` of each tensor."""
    tensors = list(mask.values())
    if not tensors or tensors[0].device.type == "cpu":
        return [count(tensor) for tensor in tensors]
    numbers: list[int] = torch.stack([tensor.count_nonzero() for tensor in tensors]).tolist()  # waits once
    return numbers


def kept(mask: Mask) -> int:
    """The number of weights that a mask keeps."""
    return sum(counts(mask))


def sparsity(mask: Mask) -> float:
    """The fraction of the prunable weights that is pruned, in [0, 1]."""
    return 1 - kept(mask) / total(mask)


def densities(mask: Mask) -> dict[str, float]:
    """The fraction kept of each prunable tensor."""
    return {name: number / mask[name].numel() for name, number in zip(mask, counts(mask), strict=True)}


def num_kept(sparsity: float, num_prunable: int, rounding: Rounding = "nearest") -> int:
    """k = round((1 - sparsity) * N), the exact number of weights to keep. A half goes to the even number.

    Raises:
        ConfigError: no weight would be left.
    """
    if rounding == "nearest":
        # 1 - 0.98 is not 0.02 in binary. Twelve digits are more than any N can tell apart.
        k = round(round(1 - sparsity, 12) * num_prunable)
    else:
        whole = math.ceil if rounding == "up" else math.floor
        k = whole(round((1 - sparsity) * num_prunable, 6))  # 0.02 * 100 is 2, whatever its last bits say
    if k < 1:
        raise ConfigError(
            f"sparsity {sparsity} leaves none of {num_prunable} weights; give at most {1 - 1 / num_prunable:.9g}"
        )
    return k


# Where ----------------------------------------------------------------------------------------------------------------


def positions(mask: Tensor) -> Tensor:
    """Where a bool tensor is True: flat indices (n,) int64, ascending."""
    if (found := known(mask)) is not None:
        return found
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # a quarter of the time of torch.nonzero
    return mask.flatten().nonzero().squeeze(1)


def collapsed(mask: Mask) -> list[str]:
    """The names of the prunable tensors with nothing kept (layer collapse)."""
    return [name for name, tensor in mask.items() if not tensor.any()]


def connected(mask: Tensor) -> Tensor:
    """Which output and input channels a layer connects: (O, I) bool, from the mask (O, I, ...) of its weight."""
    if mask.ndim == 2:
        return mask
    return reduce(torch.logical_or, mask.flatten(2).unbind(2))  # half the time of any(2)


def has_empty_slices(mask: Mask) -> bool:
    """Whether some layer has an output or input channel with nothing kept."""
    weights = [connected(tensor) for tensor in mask.values() if tensor.ndim > 1]
    return any(not between.any(dim).all() for between in weights for dim in (0, 1))


# Applying -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def apply_(model: nn.Module, mask: Mask) -> None:
    """Sets the pruned weights of the model to zero, in place."""
    parameters = dict(model.named_parameters())
    for name, kept in mask.items():
        clear_(parameters[name], kept)


@torch.no_grad()
def apply_narrower_(model: nn.Module, before: Mask, after: Mask) -> None:
    """As `apply_(model, after)`, for a model that has the mask `before` already. A missing name means all is kept."""
    parameters = dict(model.named_parameters())
    for name, kept in after.items():
        clear_removed_(parameters[name], before.get(name), kept)
