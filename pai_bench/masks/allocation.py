"""Which weights stay, given their scores: the allocations of the field, each beside its reference.

Every allocation keeps exactly `keep` of the candidates. `sampling.py` has the one that draws.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from torch import Generator

from pai_bench.core import Fraction, Mask, NonNegative, Scores, Selection
from pai_bench.errors import ConfigError
from pai_bench.masks import mask_files, masks
from pai_bench.masks.selection import keep_largest, keep_largest_of_each


def global_topk(
    scores: Scores, candidates: Mask, keep: int, generator: Generator, *, min_density: Fraction
) -> Selection:
    """Keeps the highest scores of the whole network. Of equal scores the first in parameter order stay.

    Args:
        min_density: the fraction of every layer that always stays (its highest scores, rounded up), or what an
            earlier round has left there. With 0 layers can collapse.

    Raises:
        ConfigError: the layers together would keep more than the sparsity allows.
        ValueError: there are fewer candidates than weights to keep.
    """
    if min_density == 0:
        return keep_largest(scores, candidates, keep)
    left = zip(candidates, masks.counts(candidates), strict=True)
    floors = {name: min(math.ceil(round(min_density * candidates[name].numel(), 9)), number) for name, number in left}
    if sum(floors.values()) > keep:
        raise ConfigError(
            f"allocation.min_density={min_density}: it keeps {sum(floors.values())}, the sparsity {keep}; lower one"
        )
    safe = by_count(scores, candidates, floors).mask  # its ties are not counted: they take part in the next choice
    rest = {name: mask & ~safe[name] for name, mask in candidates.items()}
    chosen = keep_largest(scores, rest, keep - sum(floors.values()))
    return replace(chosen, mask={name: mask | safe[name] for name, mask in chosen.mask.items()})


def uniform(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
    """Keeps the same fraction of every layer, by score within the layer.

    Raises:
        ValueError: there are fewer candidates than weights to keep.
    """
    return by_density(scores, candidates, keep, dict.fromkeys(candidates, 1.0))


def uniform_plus(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, min_last: Fraction) -> Selection:
    """Keeps the first layer whole and at least the fraction `min_last` of the last. The others share the rest evenly.

    Reference: Gale et al. 2019, arXiv:1902.09574; as in Liu et al. 2022, arXiv:2202.02643.
    Deviates: the code of Liu et al. misses the target. For densities below 0.2 it divides the rest by the size of the
        whole network and keeps too few weights. From 0.2 on it keeps that density of all layers but the first, and so
        too many weights.

    Raises:
        ConfigError: the first and the last layer would keep more than the sparsity allows.
    """
    require_weights(candidates, "uniform_plus")
    names = list(candidates)
    if len(names) < 3:
        raise ConfigError("allocation=uniform_plus: it needs a first, a last and other layers; use allocation=uniform")
    first, last = names[0], names[-1]
    sizes = {name: mask.numel() for name, mask in candidates.items()}
    density = (keep - sizes[first]) / (sum(sizes.values()) - sizes[first])
    of_last = max(density, min_last)
    rest = sum(sizes[name] for name in names[1:-1])
    others = (keep - sizes[first] - of_last * sizes[last]) / rest
    if others <= 0:
        raise ConfigError(
            f"{asked(keep, candidates)}: allocation=uniform_plus keeps the first layer and {min_last:g} of the last, "
            "which leaves nothing for the others; lower the sparsity"
        )
    shares = dict.fromkeys(names, others) | {first: 1.0, last: of_last}
    return by_density(scores, candidates, keep, shares, fixed={first, last})


def erk(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, kernel: bool) -> Selection:
    """Erdos-Renyi densities, by score within the layer: the sum of a layer's sizes over their product, times a factor.

    A layer that would get more weights than it has is kept whole, and the others share the rest.

    Args:
        kernel: whether the height and width of the kernel are among a layer's sizes (ERK) or not (ER).

    Reference: Evci et al. 2020, arXiv:1911.11134, section 3; Mocanu et al. 2018, arXiv:1707.04780, for ER.
    Deviates: none.
    """
    require_weights(candidates, "erk")
    shares = {}
    for name, mask in candidates.items():
        sizes = mask.shape if kernel else mask.shape[:2]
        shares[name] = sum(sizes) / math.prod(sizes)
    return by_density(scores, candidates, keep, shares)


def smart_ratio(
    scores: Scores,
    candidates: Mask,
    keep: int,
    generator: Generator,
    *,
    shape: Literal["resnet", "vgg"],
    linear_density: Fraction,
    surplus: Literal["proportional", "next"],
) -> Selection:
    """Densities that fall with depth, by score within the layer: (L - l + 1)^2 + (L - l + 1) in layer l of L.

    Args:
        shape: "resnet" takes this formula; "vgg" divides it by l^2.
        linear_density: the density of every linear layer.
        surplus: where the weights go that a full layer has no room for. "proportional": to all other layers, in
            proportion. "next": to the next layers, as far as they have room, as in the released code. It decides the
            densities of the paper's VGG-19 at 90 to 98 %.

    Reference: Su et al. 2020, arXiv:2009.11094, section 4, and the released code.
    Deviates: the total is exact; their code rounds every layer down. With surplus=proportional the densities differ
        from theirs if a layer is full.

    Raises:
        ConfigError: the linear layers alone would keep more than the sparsity allows.
    """
    require_weights(candidates, "smart_ratio")
    depth = len(candidates)
    shares, linear = {}, set()
    for index, (name, mask) in enumerate(candidates.items(), start=1):
        if mask.ndim == 2:
            linear.add(name)
            shares[name] = linear_density
        else:
            height = depth - index + 1
            shares[name] = (height**2 + height) / (index**2 if shape == "vgg" else 1)
    return by_density(scores, candidates, keep, shares, fixed=linear, surplus=surplus)


def layer_rates(
    scores: Scores, candidates: Mask, keep: int, generator: Generator, *, convolution: NonNegative, last: NonNegative
) -> Selection:
    """Prunes the same fraction of what is left of every linear layer, and other fractions of the other layers.

    In rounds of p this gives the densities of the lottery-ticket papers: (1 - p)^k after k rounds, and for a last layer
    at half the rate (1 - p / 2)^k. The fraction p follows from the sparsity.

    Args:
        convolution: the fraction pruned of a convolution, over that of a linear layer.
        last: the same for the last layer.

    Reference: Frankle and Carbin 2019, arXiv:1803.03635, figure 2: the last layer is pruned at half the rate, and
        convolutions at 0.5 (Conv-2 and Conv-4) or 0.75 (Conv-6) of the rate.

    Raises:
        ConfigError: these rates cannot reach the sparsity.
    """
    require_weights(candidates, "layer_rates")
    names = list(candidates)
    rates = {name: convolution if mask.ndim > 2 else 1.0 for name, mask in candidates.items()} | {names[-1]: last}
    room = {name: masks.count(mask) for name, mask in candidates.items()}
    at_full_rate = sum(rates[name] * room[name] for name in names)
    pruned = sum(room.values()) - keep
    fraction = pruned / at_full_rate if at_full_rate else math.inf * pruned
    if pruned and fraction * max(rates.values()) > 1:
        raise ConfigError(
            f"{asked(keep, candidates)}: allocation=layer_rates would prune more than all of a layer; "
            "lower the sparsity, take more rounds, or give rates nearer to each other"
        )
    wanted = {name: room[name] * (1 - fraction * rates[name]) if pruned else room[name] for name in names}
    return by_count(scores, candidates, _rounded(wanted, room, keep))


def densities_of_mask(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, mask: str) -> Selection:
    """Keeps as many weights in every layer as another mask keeps there, by score within the layer.

    With pruner=random this asks: does the method's choice of weights matter, or only its layerwise densities?

    Args:
        mask: the file of that mask: mask.safetensors of a finished run, or any file that mask_files reads.

    Reference: Frankle et al. 2021, arXiv:2009.08576, section 5; Liu et al. 2022, arXiv:2202.02643, for "SNIP ratio".

    Raises:
        ConfigError: the mask has other layers, or keeps another number of weights.
    """
    theirs = mask_files.read("allocation.mask", mask, zeros=False)
    counts = {name: int(theirs[name].sum()) if name in theirs else -1 for name in candidates}
    for name, candidate in candidates.items():
        if name not in theirs or theirs[name].size != candidate.numel():  # candidates may be turned
            raise ConfigError(
                f"allocation.mask={mask}: it holds no mask of {name} {tuple(candidate.shape)}; give one of this model"
            )
    if sum(counts.values()) != keep:
        raise ConfigError(
            f"allocation.mask={mask}: it keeps {sum(counts.values())} weights and {asked(keep, candidates)} keeps "
            f"{keep}; give a mask of the same sparsity"
        )
    return by_count(scores, candidates, counts)


def asked(keep: int, candidates: Mask) -> str:
    """The sparsity that keeps so many of the candidates, as a setting."""
    return f"sparsity={1 - keep / masks.total(candidates):.6g}"


def require_weights(candidates: Mask, allocation: str) -> None:
    """Refuses filters.

    Raises:
        ConfigError: a candidate is no weight of a layer.
    """
    if any(mask.ndim < 2 for mask in candidates.values()):
        raise ConfigError(
            f"allocation={allocation}: it is defined for weights, not for filters; use allocation=uniform"
        )


# From densities to a mask ---------------------------------------------------------------------------------------------


def by_count(scores: Scores, candidates: Mask, counts: dict[str, int]) -> Selection:
    """Keeps a given number of weights in each layer, by score."""
    return keep_largest_of_each(scores, candidates, counts)


def by_density(
    scores: Scores,
    candidates: Mask,
    keep: int,
    shares: dict[str, float],
    fixed: Collection[str] = (),
    surplus: Literal["proportional", "next"] = "proportional",
) -> Selection:
    """Keeps a fraction of each layer, by score within it: its share times one factor for all layers, at most 1.

    The factor makes the total exact. No layer keeps more weights than it has candidates.

    Args:
        fixed: the layers whose share is their density, without the factor. At a low sparsity all others may be whole
            and weights still left. Then these layers get them, and those with share 0, in proportion to their room.
        surplus: what becomes of the weights that a full layer has no room for. "proportional": the factor of the other
            layers grows. "next": the next layers get them.

    Raises:
        ConfigError: the fixed layers would keep more than the sparsity allows.
        ValueError: there are fewer candidates than weights to keep.
    """
    sizes = {name: mask.numel() for name, mask in candidates.items()}
    room = dict(zip(candidates, masks.counts(candidates), strict=True))
    if keep > sum(room.values()):
        raise ValueError(f"cannot keep {keep} of {sum(room.values())} weights")
    wanted = {name: min(shares[name] * sizes[name], room[name]) for name in fixed}
    left = keep - sum(wanted.values())
    if left < 0:
        names = ", ".join(name for name in candidates if name in fixed)
        raise ConfigError(
            f"{asked(keep, candidates)}: it keeps {keep} weights, and {names} alone {sum(wanted.values()):.0f}; lower "
            "the sparsity or their density"
        )
    wanted |= {name: 0.0 for name in candidates if name not in wanted and shares[name] == 0}
    open_layers = [name for name in candidates if name not in wanted]
    if surplus == "next" and open_layers:
        factor = left / sum(shares[name] * sizes[name] for name in open_layers)
        wanted |= _carried({name: factor * shares[name] * sizes[name] for name in open_layers}, room)
        open_layers = []
    while open_layers:
        factor = left / sum(shares[name] * sizes[name] for name in open_layers)
        full = [name for name in open_layers if factor * shares[name] * sizes[name] > room[name]]
        for name in full or open_layers:
            wanted[name] = room[name] if full else factor * shares[name] * sizes[name]
            left -= wanted[name]
        open_layers = [name for name in open_layers if name not in wanted]
    if (rest := keep - sum(wanted.values())) > 0.5:
        free = {name: room[name] - wanted[name] for name in candidates}
        wanted |= {name: wanted[name] + rest * free[name] / sum(free.values()) for name in candidates}
    return by_count(scores, candidates, _rounded(wanted, room, keep))


def _carried(wanted: dict[str, float], room: dict[str, int]) -> dict[str, float]:
    """What each layer gets if the surplus of a full layer goes to the next, and from the last layer to the first."""
    given, surplus = dict(wanted), 0.0
    for name in [*wanted, *wanted]:
        given[name] += surplus
        surplus = max(given[name] - room[name], 0.0)
        given[name] -= surplus
    return given


def _rounded(wanted: dict[str, float], room: dict[str, int], keep: int) -> dict[str, int]:
    """Whole numbers whose sum is `keep`. The largest remainders are rounded up, of equal ones the first.

    A full layer is not rounded up.
    """
    counts = {name: min(math.floor(round(wanted[name], 6)), room[name]) for name in room}
    by_remainder = sorted(counts, key=lambda name: counts[name] - wanted[name])
    while (missing := keep - sum(counts.values())) > 0:
        for name in [name for name in by_remainder if counts[name] < room[name]][:missing]:
            counts[name] += 1
    return counts
