"""Allocations with structure: N of M weights in every group, and as many inputs for every output."""

from typing import Literal

import torch
from torch import Generator, Tensor

from pai_bench.core import Count, Mask, Scores, Selection
from pai_bench.errors import ConfigError
from pai_bench.masks import allocation, masks
from pai_bench.masks.allocation import asked, require_weights

# N of M ---------------------------------------------------------------------------------------------------------------


def n_m(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, n: Count, m: Count) -> Selection:
    """Keeps the n highest scores of every m consecutive weights along the input channels.

    A group is of one output channel and one position of the kernel. A layer whose input channels m does not divide
    stays whole, as a first convolution of three channels does. So the number of weights follows from the layers.

    Args:
        n: weights that stay in a group; of equal scores the first.
        m: weights of a group.

    Reference: Zhou et al. 2021, arXiv:2102.04010, for groups and layers.
    Deviates: there the scores are magnitudes, and the mask moves while training. Here it is fixed.

    Raises:
        ConfigError: the sparsity is another one than these groups have, n exceeds m, m divides the channels of no
            layer, or an earlier round has left a group fewer than n weights.
    """
    require_weights(candidates, "n_m")
    if n > m:
        raise ConfigError(f"allocation.n={n}: a group has allocation.m={m} weights; give at most as many")
    grouped = [name for name, mask in candidates.items() if mask.shape[1] % m == 0]
    if not grouped:
        raise ConfigError(f"allocation.m={m}: it divides the input channels of no layer; give another")
    needed = sum(
        candidate.numel() // m * n if name in grouped else masks.count(candidate)
        for name, candidate in candidates.items()
    )
    if keep != needed:
        fits = _shortest_sparsity(needed, masks.total(candidates))
        raise ConfigError(
            f"{asked(keep, candidates)}: allocation=n_m with {n}:{m} keeps {needed} of "
            f"{masks.total(candidates)} weights here; give sparsity={fits}"
        )
    chosen, num_tied = {}, 0
    for name, candidate in candidates.items():
        if name not in grouped:
            chosen[name] = candidate.clone()
            continue
        values, allowed = (tensor.movedim(1, -1).reshape(-1, m) for tensor in (scores[name], candidate))
        if int(allowed.sum(1).min()) < n:
            raise ConfigError(f"allocation=n_m: an earlier round left a group of {name} fewer than {n} weights")
        kept, tied = _best_of_rows(values, allowed, n)
        num_tied += tied
        shape = candidate.movedim(1, -1).shape
        chosen[name] = kept.view(shape).movedim(-1, 1).contiguous()
    return Selection(chosen, num_tied=num_tied)


def _shortest_sparsity(keep: int, total: int) -> str:
    """The sparsity with the fewest digits that keeps so many weights."""
    exact = 1 - keep / total
    texts = (f"{exact:.{digits}f}" for digits in range(1, 13))
    return next((text for text in texts if masks.num_kept(float(text), total) == keep), f"{exact:.12f}")


def _best_of_rows(values: Tensor, allowed: Tensor, number: int) -> tuple[Tensor, int]:
    """The highest allowed values of each row (R, C) bool, of equal ones the first; and how many the order decided."""
    order = torch.where(allowed, values, -torch.inf).sort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(allowed).scatter_(1, order.indices[:, :number], True)
    if number in (0, values.shape[1]):
        return kept, 0
    last, next_one = order.values[:, number - 1 : number], order.values[:, number : number + 1]
    tied = (last == next_one) & allowed & (values == last)
    return kept, int(tied.sum())


# As many inputs for every output --------------------------------------------------------------------------------------


def constant_fan_in(
    scores: Scores, candidates: Mask, keep: int, generator: Generator, *, densities: Literal["uniform", "erk"]
) -> Selection:
    """Keeps the same number of weights for every output unit of a layer, by score within the unit.

    Args:
        densities: of the layers: "uniform" or "erk", as those allocations have them. They are rounded to whole numbers
            of weights for each output. Where that does not add up to the number to keep, one layer gets the rest: there
            some outputs have one weight more, those whose next weight has the highest score.

    Reference: Lasby et al. 2024, arXiv:2305.02299.
    Deviates: the total is exact, which takes the rest above. No output is cut off on purpose, and the mask is fixed.

    Raises:
        ConfigError: earlier rounds have left the outputs of a layer different numbers of weights.
        ValueError: there are fewer candidates than weights to keep.
    """
    require_weights(candidates, "constant_fan_in")
    if densities == "erk":
        wanted = allocation.erk(scores, candidates, keep, generator, kernel=True).mask
    else:
        wanted = allocation.uniform(scores, candidates, keep, generator).mask
    fan_ins, rest, last = _fan_ins(candidates, {name: masks.count(mask) for name, mask in wanted.items()}, keep)
    chosen, num_tied = {}, 0
    for name, candidate in candidates.items():
        values, allowed = scores[name].flatten(1), candidate.flatten(1)
        kept, tied = _best_of_rows(values, allowed, fan_ins[name])
        num_tied += tied
        if name == last and rest:
            left = torch.where(allowed & ~kept, values, -torch.inf)
            best, at = left.max(1)  # of equal ones the first
            rows = best.sort(descending=True, stable=True).indices[:rest]
            kept[rows, at[rows]] = True
        chosen[name] = kept.view(candidate.shape)
    return Selection(chosen, num_tied=num_tied)


def _fan_ins(candidates: Mask, wanted: dict[str, int], keep: int) -> tuple[dict[str, int], int, str]:
    """The weights for each output by layer, how many are left over, and the layer whose outputs get them."""
    rows = {name: candidate.shape[0] for name, candidate in candidates.items()}
    room = {name: candidate.flatten(1).sum(1) for name, candidate in candidates.items()}
    most = {name: int(counts.min()) for name, counts in room.items()}
    fan_ins = {name: min(wanted[name] // rows[name], most[name]) for name in candidates}
    rest = keep - sum(fan_ins[name] * rows[name] for name in candidates)

    def lacks(name: str) -> float:
        """Weights for each output, in whole and in part, that a layer has still to get."""
        return wanted[name] / rows[name] - fan_ins[name]

    while True:
        # Layers that lack half a weight for each output get one. Then one layer takes what is left over, if it can.
        fitting = [name for name in candidates if fan_ins[name] < most[name] and rows[name] <= rest]
        able = [name for name in candidates if int((room[name] > fan_ins[name]).sum()) >= rest]
        name = max(fitting, key=lacks, default=None)
        if name is None or (able and lacks(name) < 0.5):
            break
        fan_ins[name] += 1
        rest -= rows[name]
    if not able:
        raise ConfigError(
            "allocation=constant_fan_in: earlier rounds left the outputs of a layer different numbers of weights; "
            "use this allocation from the first round on"
        )
    return fan_ins, rest, max(able, key=lacks)
