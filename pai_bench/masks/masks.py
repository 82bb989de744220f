"""Masks over the prunable weights of a model: which weights these are, how many a mask keeps, and how it is applied.

A mask is a dictionary: parameter name -> bool tensor of the parameter's shape, True = kept.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pai_bench.core import Mask, Prunable, Round, Rounding
from pai_bench.errors import ConfigError
from pai_bench.masks import reading
from pai_bench.masks.clearing import clear_, clear_all_, clear_removed_
from pai_bench.masks.known_positions import known

Which = Prunable | Sequence[Prunable]  # one word, or several that all hold

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention
_OF_SHORTCUTS = ("shortcut", "downsample", "skip")  # what models call the module of a shortcut

# Which weights --------------------------------------------------------------------------------------------------------


def prunable(model: nn.Module, which: Which = "all") -> dict[str, nn.Parameter]:
    """The weights of convolutions, linear layers and attention projections, by parameter name, in module order.

    The classifier is among them. Biases and the parameters of normalisation layers are never prunable. A weight that
    two layers share counts once.

    Args:
        which: "no_first" and "no_last" leave out the first and the last of these weights. "no_shortcut" leaves out the
            1x1 convolutions of shortcuts: those in a module whose name has "shortcut", "downsample" or "skip" in it.
            "conv" leaves out all but convolutions. Of several words each leaves out its own.

    Raises:
        ConfigError: there is nothing that a word could leave out, or nothing is left.
    """
    weights = _layer_weights(model)
    words = [which] if isinstance(which, str) else list(which)
    left_out: set[str] = set()
    for word in words:
        if word not in _LEAVES_OUT:
            raise ConfigError(f"prunable={word}: give one of {', '.join(_LEAVES_OUT)}, or several of them")
        names = _left_out(weights, word)
        if word != "all" and not names:
            raise ConfigError(f"prunable={word}: {type(model).__name__} has no {_LEAVES_OUT[word]}; leave the word out")
        left_out |= names
    if weights and left_out == set(weights):
        asked = words[0] if len(words) == 1 else f"[{','.join(words)}]"
        raise ConfigError(f"prunable={asked}: no layer of {type(model).__name__} is left to prune; give prunable=all")
    return {name: weight for name, weight in weights.items() if name not in left_out}


_LEAVES_OUT = {
    "all": "layer",
    "no_first": "first layer",
    "no_last": "last layer",
    "no_shortcut": "1x1 convolution in a module that is called shortcut, downsample or skip",
    "conv": "layers other than convolutions",
}


def _left_out(weights: Mapping[str, Tensor], word: Prunable) -> set[str]:
    """The names of the weights that a word leaves out."""
    match word:
        case "no_first":
            return set(list(weights)[:1])
        case "no_last":
            return set(list(weights)[-1:])
        case "no_shortcut":
            return {name for name, weight in weights.items() if _is_shortcut(name, weight)}
        case "conv":
            return {name for name, weight in weights.items() if weight.ndim < 3}
        case "all":
            return set()


def _is_shortcut(name: str, weight: Tensor) -> bool:
    """Whether a weight is a 1x1 convolution of a shortcut, going by its name."""
    pointwise = weight.ndim > 2 and math.prod(weight.shape[2:]) == 1
    return pointwise and any(word in name.lower() for word in _OF_SHORTCUTS)


def _layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            weights = [getattr(module, name) for name in _PROJECTIONS]
        else:
            weights = [module.weight] if isinstance(module, (_ConvNd, nn.Linear)) else []
        found |= {names[id(weight)]: weight for weight in weights if id(weight) in names}
    return found


def unprunable(model: nn.Module, masked: Collection[str] | None = None) -> dict[str, nn.Parameter]:
    """The other parameters with two or more dimensions, which no mask covers: embeddings, mixtures of kernels.

    Args:
        masked: the parameters that a mask covers. By default all weights that can be pruned.
    """
    covered = prunable(model) if masked is None else masked
    named = model.named_parameters()
    return {name: p for name, p in named if name not in covered and sum(size > 1 for size in p.shape) > 1}


def full(model: nn.Module, which: Which = "all") -> Mask:
    """The mask that keeps every prunable weight.

    Args:
        which: as in `prunable`.

    Raises:
        ConfigError: as in `prunable`.
    """
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model, which).items()}


# How many -------------------------------------------------------------------------------------------------------------


def total(tensors: Mapping[str, Tensor]) -> int:
    """The number of entries: N, when given a mask, scores or the prunable weights."""
    return sum(tensor.numel() for tensor in tensors.values())


def count(tensor: Tensor) -> int:
    """The number of entries of a bool tensor that are True."""
    if (found := known(tensor)) is not None:
        return len(found)
    if reading.free(tensor):
        return int(np.count_nonzero(tensor.numpy()))  # ten times as fast as torch
    return counts({"": tensor})[0]


def counts(mask: Mask) -> list[int]:
    """`count` of each tensor."""
    tensors = list(mask.values())
    if not tensors or reading.free(tensors[0]):
        return [count(tensor) for tensor in tensors]
    noted = [reading.noted_count(tensor) for tensor in tensors]
    if None not in noted:
        return [number for number in noted if number is not None]
    numbers: list[int] = torch.stack([tensor.count_nonzero() for tensor in tensors]).tolist()  # waits once
    return numbers


def note_counts(mask: Mask) -> None:
    """Lets `counts` of this mask read nothing from a GPU any more. For masks that change no more."""
    if not all(map(reading.free, mask.values())):
        for tensor, number in zip(mask.values(), counts(mask), strict=True):
            reading.note_count(tensor, number)


def kept(mask: Mask) -> int:
    """The number of weights that a mask keeps."""
    return sum(counts(mask))


def sparsity(mask: Mask) -> float:
    """The fraction of the prunable weights that is pruned, in [0, 1]."""
    return 1 - kept(mask) / total(mask)


def densities(mask: Mask) -> dict[str, float]:
    """The fraction kept of each prunable tensor."""
    return {name: number / mask[name].numel() for name, number in zip(mask, counts(mask), strict=True)}


def num_kept(sparsity: float, num_prunable: int, rounding: Rounding = "nearest", least: int = 0) -> int:
    """k = round((1 - sparsity) * N), the exact number of weights to keep. A half goes to the even number.

    Args:
        least: k is no smaller.

    Raises:
        ConfigError: no weight would be left.
    """
    if rounding == "nearest":
        # 1 - 0.98 is not 0.02 in binary. Twelve digits are more than any N can tell apart.
        k = round(round(1 - sparsity, 12) * num_prunable)
    else:
        whole = math.ceil if rounding == "up" else math.floor
        k = whole(round((1 - sparsity) * num_prunable, 6))  # 0.02 * 100 is 2, whatever its last bits say
    k = max(k, least)
    if k < 1:
        raise ConfigError(
            f"sparsity {sparsity} leaves none of {num_prunable} weights; give at most {1 - 1 / num_prunable:.9g}"
        )
    return k


def num_kept_after(this: Round, num_prunable: int) -> int:
    """The number of weights that a round keeps: as `num_kept`, and no fewer than the last round keeps.

    Raises:
        ConfigError: no weight would be left.
    """
    least = 0 if this.final_sparsity is None else num_kept(this.final_sparsity, num_prunable)
    return num_kept(this.sparsity, num_prunable, this.rounding, least)


# Where ----------------------------------------------------------------------------------------------------------------


def positions(mask: Tensor) -> Tensor:
    """Where a bool tensor is True: flat indices (n,) int64, ascending."""
    if (found := known(mask)) is not None:
        return found
    if reading.free(mask):
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
    if not all(map(reading.free, mask.values())):
        clear_all_([parameters[name] for name in mask], list(mask.values()))
        return
    for name, kept in mask.items():
        clear_(parameters[name], kept)


@torch.no_grad()
def apply_narrower_(model: nn.Module, before: Mask, after: Mask) -> None:
    """As `apply_(model, after)`, for a model that has the mask `before` already. A missing name means all is kept."""
    parameters = dict(model.named_parameters())
    if not all(map(reading.free, after.values())):
        clear_all_([parameters[name] for name in after], list(after.values()))
        return
    for name, kept in after.items():
        clear_removed_(parameters[name], before.get(name), kept)
