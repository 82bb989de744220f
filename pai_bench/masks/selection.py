"""Exact selection: the k largest of many scores, without sorting all of them.

Beside each fast function stands the plain one, which sorts. Tests hold that both give the same bits.
"""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pai_bench.core import Mask, Scores, Selection
from pai_bench.masks import masks, reading
from pai_bench.masks.known_positions import mask_at

_FEW = 0.25  # a layer with a smaller fraction of candidates has them gathered before they are compared
_SMALL = 1 << 20  # the layers of a network with fewer weights are ranked as one

# The plain formulas ---------------------------------------------------------------------------------------------------


def kth_largest_by_sorting(values: Tensor, k: int) -> Tensor:
    """The k-th largest value of a vector."""
    return torch.sort(values, descending=True).values[k - 1]


def keep_largest_by_sorting(scores: Scores, candidates: Mask, k: int) -> Selection:
    """The k largest scores of the candidates: sort all, take k. Of equal scores the first in parameter order stay."""
    values = torch.cat([scores[name].flatten()[candidate.flatten()] for name, candidate in candidates.items()])
    order = torch.sort(values, descending=True, stable=True).indices
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[order[:k]] = True
    num_tied = 0
    if k > 0:
        equal = values == values[order[k - 1]]
        num_tied = int(equal.sum()) if (equal & ~chosen).any() else 0
    mask = {}
    parts = torch.split(chosen, [int(candidate.sum()) for candidate in candidates.values()])
    for (name, candidate), part in zip(candidates.items(), parts, strict=True):
        mask[name] = torch.zeros(candidate.shape, dtype=torch.bool, device=candidate.device)
        mask[name][candidate] = part
    return Selection(mask, num_tied=num_tied)


# The fast ones --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The candidates of one layer: gathered where they are few, else all values and which of them are candidates."""

    values: Tensor  # (n,)
    number: int  # of candidates
    allowed: Tensor | None = None  # (n,) bool, which values are candidates; None: all
    positions: Tensor | None = None  # (n,) int64, where in the layer the values lie; None: they are the whole layer

    def every(self, step: int) -> Tensor:
        """The candidates among every `step`-th value."""
        values = self.values[::step].contiguous()
        return values if self.allowed is None else values[self.allowed[::step].contiguous()]

    def candidates_in(self, chosen: Tensor) -> Tensor:
        """The candidates in a choice of values (n,) bool. The choice is changed in place."""
        return chosen if self.allowed is None else chosen.logical_and_(self.allowed)


def pool(values: Tensor, candidate: Tensor) -> Pool:
    """The candidates of a layer, from its scores and the mask of the candidates."""
    number = masks.count(candidate)
    if number == candidate.numel():
        return Pool(values.flatten(), number)
    if number > _FEW * candidate.numel():
        return Pool(values.flatten(), number, candidate.flatten())
    positions = masks.positions(candidate)
    return Pool(values.flatten().index_select(0, positions), number, None, positions)


def kth_largest(pools: Sequence[Pool], k: int) -> Tensor:
    """The k-th largest candidate of all pools, as `kth_largest_by_sorting` finds it."""
    return _bracket(pools, k).threshold()


def keep_largest(scores: Scores, candidates: Mask, k: int) -> Selection:
    """Chooses the k largest scores of the candidates, as `keep_largest_by_sorting` does.

    Raises:
        ValueError: there are fewer than k candidates.
    """
    if not reading.free(next(iter(candidates.values()))):
        return keep_largest_on_device(scores, candidates, k)
    if len(candidates) > 1 and masks.total(candidates) < _SMALL:
        return _keep_together(scores, candidates, k)
    pools = {name: pool(scores[name], candidate) for name, candidate in candidates.items()}
    if k > (number := sum(pool.number for pool in pools.values())):
        raise ValueError(f"cannot keep {k} of {number} weights")
    if k == 0:
        return Selection({name: torch.zeros_like(candidate) for name, candidate in candidates.items()})
    bracket = _bracket(list(pools.values()), k)
    threshold = bracket.threshold()
    chosen, equal = bracket.values > threshold, masks.positions(bracket.values == threshold)
    missing = bracket.k - masks.count(chosen)
    chosen[equal[:missing]] = True
    parts = torch.split(chosen, [len(positions) for positions in bracket.inside])
    mask = {}
    for (name, source), above, inside, part in zip(pools.items(), bracket.above, bracket.inside, parts, strict=True):
        above[inside[part]] = True
        mask[name] = _scattered(above, source, candidates[name])
    return Selection(mask, num_tied=len(equal) if missing < len(equal) else 0)


def keep_largest_on_device(scores: Scores, candidates: Mask, k: int) -> Selection:
    """`keep_largest` for a GPU: a few operations on all layers, and one look at what they found.

    To wait for a GPU takes longer than to sort what a sample could have left out.
    """
    return _chosen(scores, [(candidates, k)])


def keep_largest_of_each(scores: Scores, candidates: Mask, counts: Mapping[str, int]) -> Selection:
    """Chooses in each layer as many of its largest scores as are asked for.

    Raises:
        ValueError: a layer has fewer candidates.
    """
    layers = [({name: candidate}, counts[name]) for name, candidate in candidates.items()]
    if not all(map(reading.free, candidates.values())):
        return _chosen(scores, layers)
    chosen = [keep_largest(scores, layer, k) for layer, k in layers]
    mask = {name: kept for one in chosen for name, kept in one.mask.items()}
    return Selection(mask, num_tied=sum(one.num_tied for one in chosen))


def _chosen(scores: Scores, groups: Sequence[tuple[Mask, int]]) -> Selection:
    """The largest scores of each group of layers, with one look at the device: candidates, and how many stay."""
    mask: Mask = {}
    read: list[Tensor] = []
    for candidates, k in groups:
        sizes = [candidate.numel() for candidate in candidates.values()]
        values = torch.cat([scores[name].flatten() for name in candidates])
        allowed = torch.cat([candidate.flatten() for candidate in candidates.values()])
        # A tensor that is made of a number on the CPU would be waited for.
        wanted = torch.full((1,), k, dtype=torch.int64, device=values.device)
        chosen, tied = chosen_on_device(values, allowed, wanted)
        up_to = F.pad(chosen.cumsum(0), (1, 0))  # how many are chosen before each
        read += [allowed.sum(), tied, *(up_to[end] for end in itertools.accumulate(sizes, initial=0))]
        copies = [torch.empty(kept.shape, dtype=torch.bool, device=kept.device) for kept in candidates.values()]
        parts = torch.split(chosen, sizes)
        torch._foreach_copy_(copies, [part.view_as(copied) for part, copied in zip(parts, copies, strict=True)])
        mask |= dict(zip(candidates, copies, strict=True))
    found = iter(torch.stack(read).tolist())
    num_tied = 0
    for candidates, k in groups:
        number, tied_here, *ends = itertools.islice(found, 3 + len(candidates))
        if k > number:
            raise ValueError(f"cannot keep {k} of {number} weights")
        num_tied += tied_here
        for name, (before, end) in zip(candidates, itertools.pairwise(ends), strict=True):
            reading.note_count(mask[name], end - before)
    return Selection(mask, num_tied=num_tied)


def chosen_on_device(values: Tensor, allowed: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of the allowed values; of equal ones the first. Nothing is read from the device.

    Args:
        values: (n,) floats.
        allowed: (n,) bool.
        k: (1,) int64, at most the number of allowed values.

    Returns:
        The choice (n,) bool, and among how many equal values the order decided: () int64.
    """
    ordered = torch.sort(torch.where(allowed, values, -torch.inf), descending=True).values
    threshold = ordered.index_select(0, (k - 1).clamp(min=0, max=len(ordered) - 1))
    above, equal = allowed & (values > threshold), allowed & (values == threshold)
    above, equal = above & (k > 0), equal & (k > 0)
    missing, num_equal = k - above.sum(), equal.sum()
    chosen = above | (equal & (equal.cumsum(0, dtype=torch.int32) <= missing))
    return chosen, torch.where(missing < num_equal, num_equal, 0).squeeze(0)


def _scattered(chosen: Tensor, source: Pool, candidate: Tensor) -> Tensor:
    """The mask of a layer, from the choice (n,) bool among the values of its pool."""
    if source.positions is None:
        return chosen.view(candidate.shape)
    return mask_at(candidate.shape, source.positions[masks.positions(chosen)])


def _keep_together(scores: Scores, candidates: Mask, k: int) -> Selection:
    """`keep_largest` for small networks: a few operations on all layers are faster than some on each layer."""
    values = torch.cat([scores[name].flatten() for name in candidates])
    together = keep_largest({"all": values}, {"all": torch.cat([mask.flatten() for mask in candidates.values()])}, k)
    parts = torch.split(together.mask["all"], [mask.numel() for mask in candidates.values()])
    mask = {name: part.view(candidates[name].shape).clone() for name, part in zip(candidates, parts, strict=True)}
    return replace(together, mask=mask)


# The bracket ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bracket:
    """Pools in which all but a few values are known to lie above or below the k-th largest."""

    above: list[Tensor]  # for each pool, (n,) bool: the values that are surely among the k largest
    inside: list[Tensor]  # for each pool, int64, ascending: the positions of the values that have to be compared
    values: Tensor  # the values to be compared, pool after pool
    k: int  # how many of these are among the k largest

    def threshold(self) -> Tensor:
        """The k-th largest value of all pools."""
        return _ranked(self.values, [self.k])[0]


def _bracket(pools: Sequence[Pool], k: int) -> _Bracket:
    """Narrows down where the k-th largest value lies.

    A bracket that misses the value, or that holds nearly all values since many are equal, costs time and changes
    nothing.
    """
    for low, high in (_bounds(pools, k), (-torch.inf, torch.inf)):
        above = [pool.candidates_in(_compared(pool.values, operator.gt, high)) for pool in pools]
        inside = [
            masks.positions(pool.candidates_in(_compared(pool.values, operator.ge, low).logical_xor_(over)))
            for pool, over in zip(pools, above, strict=True)
        ]
        num_above = sum(masks.count(over) for over in above)
        if num_above < k <= num_above + sum(len(positions) for positions in inside):
            break
    values = torch.cat([pool.values.index_select(0, positions) for pool, positions in zip(pools, inside, strict=True)])
    return _Bracket(above, inside, values, k - num_above)


def _bounds(pools: Sequence[Pool], k: int) -> tuple[float, float]:
    """Bounds of the k-th largest value that hold most likely: four standard deviations to either side, by a sample.

    Reference: Floyd and Rivest 1975, Algorithm 489, for selection by a sample and for its size.
    """
    low, high = -torch.inf, torch.inf
    number, length = sum(pool.number for pool in pools), sum(len(pool.values) for pool in pools)
    step = round((length / 4) ** (1 / 3))
    # A step with a factor in common with a kernel would see few of its positions, and their scores differ.
    while math.gcd(step, 210) > 1:
        step += 1
    if step >= 8 and len(sample := torch.cat([pool.every(step) for pool in pools])):
        rank, spread = k / number * len(sample), 2 * math.sqrt(len(sample))
        ends = _ranked(sample, [max(int(rank - spread), 1), min(int(rank + spread) + 1, len(sample))])
        high = ends[0].item() if rank > spread else high
        low = ends[1].item() if rank + spread < len(sample) else low
    return low, high


def _ranked(values: Tensor, ranks: list[int]) -> list[Tensor]:
    """The r-th largest value of a vector, for each rank r."""
    if values.device.type != "cpu":
        ordered = torch.sort(values, descending=True).values
        return [ordered[rank - 1] for rank in ranks]
    array = np.partition(values.numpy(), [len(values) - rank for rank in ranks])  # far faster than torch.kthvalue
    return [values.new_tensor(array[len(values) - rank]) for rank in ranks]


def _compared(values: Tensor, how: Callable[[Any, float], Any], bound: float) -> Tensor:
    """Every value compared with a bound: (n,) bool."""
    if values.device.type == "cpu":  # with one thread numpy takes half the time of torch
        return torch.from_numpy(how(values.numpy(), bound))
    result: Tensor = how(values, bound)
    return result
