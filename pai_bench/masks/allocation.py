"""Scores -> mask: which of the candidates stay. Every function keeps exactly the number asked for."""

import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from pai_bench.core import Fraction, Mask, NonNegative, Scores, Selection
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import mask_files, masks

_NEVER = -1e300  # keys of what cannot be drawn lie below
_FEW = 0.25  # of a layer's weights, below which its candidates are gathered before they are compared
_SMALL = 1 << 20  # weights of a network whose layers are ranked as one
_MANY = 30.0  # log of a count that equals its mean to six digits, below what torch.poisson can hold


@dataclass(frozen=True)
class Pool:
    """The candidates of one layer: gathered where they are few, else all values and which of them count."""

    values: Tensor  # (n,)
    number: int  # how many of them count
    allowed: Tensor | None = None  # (n,) bool, which; None = all of them
    positions: Tensor | None = None  # (n,) int64, where in the layer the values lie; None = it is these

    def every(self, step: int) -> Tensor:
        """What counts of every `step`-th value."""
        values = self.values[::step].contiguous()
        return values if self.allowed is None else values[self.allowed[::step].contiguous()]

    def which(self, chosen: Tensor) -> Tensor:
        """Those among a choice (n,) bool, which is changed in place, that count."""
        return chosen if self.allowed is None else chosen.logical_and_(self.allowed)


def pool(values: Tensor, candidate: Tensor) -> Pool:
    """The candidates of a layer, from its scores and the mask of those that count."""
    number = masks.count(candidate)
    if number == candidate.numel():
        return Pool(values.flatten(), number)
    if number > _FEW * candidate.numel():
        return Pool(values.flatten(), number, candidate.flatten())
    positions = masks.positions(candidate)
    return Pool(values.flatten().index_select(0, positions), number, None, positions)


@dataclass(frozen=True)
class _Bracket:
    """Pools of which all but a few values are known to lie above or below the k-th largest."""

    above: list[Tensor]  # of each pool, (n,) bool: what is among the k largest for certain
    inside: list[Tensor]  # of each pool, positions of what has to be compared: int64, ascending
    values: Tensor  # the latter, pool after pool
    k: int  # how many of those are among the k largest

    def threshold(self) -> Tensor:
        """The k-th largest value of all pools."""
        return _ranked(self.values, [self.k])[0]


def _ranked(values: Tensor, ranks: list[int]) -> list[Tensor]:
    """The r-th largest of a vector, for each of the ranks."""
    if values.device.type != "cpu":
        ordered = torch.sort(values, descending=True).values
        return [ordered[rank - 1] for rank in ranks]
    array = np.partition(values.numpy(), [len(values) - rank for rank in ranks])  # far faster than torch.kthvalue
    return [values.new_tensor(array[len(values) - rank]) for rank in ranks]


def _bracket(pools: Sequence[Pool], k: int) -> _Bracket:
    """Narrows down where the k-th largest value lies, by a sample: four standard deviations to either side.

    A bracket that missed, or that holds nearly everything since many values are equal, costs time and changes nothing.

    Reference: Floyd and Rivest 1975, Algorithm 489, for selection by a sample and for its size.
    """
    low, high = -torch.inf, torch.inf
    number, length = sum(pool.number for pool in pools), sum(len(pool.values) for pool in pools)
    step = round((length / 4) ** (1 / 3))
    while math.gcd(step, 210) > 1:  # or the sample would see few of the places in a kernel, whose scores differ
        step += 1
    if step >= 8 and len(sample := torch.cat([pool.every(step) for pool in pools])):
        at, spread = k / number * len(sample), 2 * math.sqrt(len(sample))
        ends = _ranked(sample, [max(int(at - spread), 1), min(int(at + spread) + 1, len(sample))])
        high = ends[0].item() if at > spread else high
        low = ends[1].item() if at + spread < len(sample) else low
    for bounds in ((low, high), (-torch.inf, torch.inf)):
        above = [pool.which(_compared(pool.values, operator.gt, bounds[1])) for pool in pools]
        inside = [
            masks.positions(pool.which(_compared(pool.values, operator.ge, bounds[0]).logical_xor_(over)))
            for pool, over in zip(pools, above, strict=True)
        ]
        num_above = sum(masks.count(over) for over in above)
        if num_above < k <= num_above + sum(len(positions) for positions in inside):
            break
    values = torch.cat([pool.values.index_select(0, positions) for pool, positions in zip(pools, inside, strict=True)])
    return _Bracket(above, inside, values, k - num_above)


def _compared(values: Tensor, how: Callable[[Any, float], Any], bound: float) -> Tensor:
    if values.device.type == "cpu":  # where numpy takes half of torch's time with one thread
        return torch.from_numpy(how(values.numpy(), bound))
    result: Tensor = how(values, bound)
    return result


def kth_largest(pools: Sequence[Pool], k: int) -> Tensor:
    """The k-th largest of what counts in the pools, exactly: as torch.sort(values, descending=True).values[k - 1]."""
    return _bracket(pools, k).threshold()


def keep_largest(scores: Scores, candidates: Mask, k: int) -> Selection:
    """Chooses exactly the k largest scores among the candidates; of equal scores the first in parameter order.

    Raises:
        ValueError: there are fewer candidates than k.
    """
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
    for (name, of), above, inside, part in zip(pools.items(), bracket.above, bracket.inside, parts, strict=True):
        above[inside[part]] = True
        if of.positions is None:
            mask[name] = above.view(candidates[name].shape)
        else:
            mask[name] = masks.at(candidates[name].shape, of.positions[masks.positions(above)])
    return Selection(mask, num_tied=len(equal) if missing < len(equal) else 0)


def _keep_together(scores: Scores, candidates: Mask, k: int) -> Selection:
    """`keep_largest` where a few operations on everything take less time than those on each layer."""
    values = torch.cat([scores[name].flatten() for name in candidates])
    together = keep_largest({"all": values}, {"all": torch.cat([mask.flatten() for mask in candidates.values()])}, k)
    parts = torch.split(together.mask["all"], [mask.numel() for mask in candidates.values()])
    mask = {name: part.view(candidates[name].shape).clone() for name, part in zip(candidates, parts, strict=True)}
    return replace(together, mask=mask)


def global_topk(
    scores: Scores, candidates: Mask, keep: int, generator: Generator, *, min_density: Fraction
) -> Selection:
    """Keeps the highest scores of the whole network; of equal scores the first in parameter order.

    Args:
        min_density: the part of every layer that always stays, its highest scores, rounded up; 0 lets layers collapse.

    Raises:
        ConfigError: less is to be kept than min_density.
        ValueError: fewer candidates than weights to keep.
    """
    if min_density == 0:
        return keep_largest(scores, candidates, keep)
    floors = {name: math.ceil(round(min_density * mask.numel(), 9)) for name, mask in candidates.items()}
    if sum(floors.values()) > keep:
        raise ConfigError(
            f"allocation.min_density={min_density}: it keeps {sum(floors.values())}, the sparsity {keep}; lower one"
        )
    safe = by_count(scores, candidates, floors).mask  # ties among these take part in the next choice
    rest = {name: mask & ~safe[name] for name, mask in candidates.items()}
    chosen = keep_largest(scores, rest, keep - sum(floors.values()))
    return replace(chosen, mask={name: mask | safe[name] for name, mask in chosen.mask.items()})


def uniform(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
    """Keeps the same fraction of every layer, by score within the layer.

    Raises:
        ValueError: fewer candidates than weights to keep.
    """
    return by_density(scores, candidates, keep, dict.fromkeys(candidates, 1.0))


def uniform_plus(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, min_last: Fraction) -> Selection:
    """Keeps the first layer whole and at least `min_last` of the last; the others share what is left, uniformly.

    Reference: Gale et al. 2019, arXiv:1902.09574; as in Liu et al. 2022, arXiv:2202.02643.
    Deviates: the code of the latter misses the target. Below a density of 0.2 it divides what is left by the size of
        the whole network, and keeps too few; from 0.2 on it keeps that density of all layers but the first, and so too
        many.

    Raises:
        ConfigError: less is to be kept than the first and last layer take.
    """
    _require_weights(candidates, "uniform_plus")
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
            f"{_asked(keep, candidates)}: allocation=uniform_plus keeps the first layer and {min_last:g} of the last, "
            "which leaves nothing for the others; lower the sparsity"
        )
    shares = dict.fromkeys(names, others) | {first: 1.0, last: of_last}
    return by_density(scores, candidates, keep, shares, fixed={first, last})


def erk(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, kernel: bool) -> Selection:
    """Erdos-Renyi layer densities, by score within the layer: proportional to the sum over the product of the sizes.

    Layers that would get more than they have are kept whole, and the others share what is left.

    Args:
        kernel: count the kernel's height and width among a layer's sizes (ERK); without, ER.

    Reference: Evci et al. 2020, arXiv:1911.11134, section 3; Mocanu et al. 2018, arXiv:1707.04780, for ER.
    Deviates: none.
    """
    _require_weights(candidates, "erk")
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
        shape: "vgg" divides by l^2, too.
        linear_density: what every linear layer keeps.
        surplus: what exceeds a full layer is spread over all others in proportion, or goes to the next layers, as far
            as they have room, as in the released code. All of the paper's VGG-19 is concerned, at 90 to 98 %.

    Reference: Su et al. 2020, arXiv:2009.11094, section 4, and the released code.
    Deviates: the total is exact; their code rounds every layer down. With surplus=proportional densities differ from
        theirs where a layer is full.

    Raises:
        ConfigError: the linear layers alone exceed the target.
    """
    _require_weights(candidates, "smart_ratio")
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


def densities_of_mask(scores: Scores, candidates: Mask, keep: int, generator: Generator, *, mask: str) -> Selection:
    """As many weights in every layer as another mask keeps there, by score within the layer.

    With pruner=random the positions are random: is it the method's choice of weights that matters, or only its layers?

    Args:
        mask: a mask.safetensors, for example of a finished run of another pruner, or any file that mask_files reads.

    Reference: Frankle et al. 2021, arXiv:2009.08576, section 5; Liu et al. 2022, arXiv:2202.02643, for "SNIP ratio".

    Raises:
        ConfigError: the mask is of other layers, or keeps another number of weights.
    """
    theirs = mask_files.read("allocation.mask", mask, zeros=False)
    counts = {name: int(theirs[name].sum()) if name in theirs else -1 for name in candidates}
    for name, candidate in candidates.items():
        if name not in theirs or theirs[name].shape != candidate.shape:
            raise ConfigError(f"allocation.mask={mask}: it holds no mask of {name} {tuple(candidate.shape)}")
    if sum(counts.values()) != keep:
        raise ConfigError(
            f"allocation.mask={mask}: it keeps {sum(counts.values())} weights and {_asked(keep, candidates)} keeps "
            f"{keep}; give a mask of the same sparsity"
        )
    return by_count(scores, candidates, counts)


def _asked(keep: int, candidates: Mask) -> str:
    return f"sparsity={1 - keep / masks.total(candidates):.6g}"


def _require_weights(candidates: Mask, allocation: str) -> None:
    if any(mask.ndim < 2 for mask in candidates.values()):
        raise ConfigError(
            f"allocation={allocation}: it is defined for weights, not for filters; use allocation=uniform"
        )


def by_count(scores: Scores, candidates: Mask, counts: dict[str, int]) -> Selection:
    """Keeps a given number of weights in each layer, by score."""
    layers = [keep_largest(scores, {name: mask}, counts[name]) for name, mask in candidates.items()]
    mask = {name: kept for layer in layers for name, kept in layer.mask.items()}
    return Selection(mask, num_tied=sum(layer.num_tied for layer in layers))


def by_density(
    scores: Scores,
    candidates: Mask,
    keep: int,
    shares: dict[str, float],
    fixed: Collection[str] = (),
    surplus: Literal["proportional", "next"] = "proportional",
) -> Selection:
    """Keeps a fraction of each layer, by score within it: its share times one factor for all, at most 1.

    The factor is what makes the total exact. Counts are rounded so that it stays exact: the layers with the largest
    remainders are rounded up, the first of equal ones first. A layer cannot get more than it has candidates.

    Args:
        fixed: layers whose share is their density, and takes no factor.
        surplus: whether what exceeds a full layer changes the factor of the others, or goes to the next layers.

    Raises:
        ConfigError: less is to be kept than the fixed layers take.
        ValueError: fewer candidates than weights to keep.
    """
    sizes = {name: mask.numel() for name, mask in candidates.items()}
    room = {name: int(mask.count_nonzero()) for name, mask in candidates.items()}
    if keep > sum(room.values()):
        raise ValueError(f"cannot keep {keep} of {sum(room.values())} weights")
    wanted = {name: min(shares[name] * sizes[name], room[name]) for name in fixed}
    left = keep - sum(wanted.values())
    if left < 0:
        names = ", ".join(name for name in candidates if name in fixed)
        raise ConfigError(
            f"{_asked(keep, candidates)}: it keeps {keep} weights, and {names} alone {sum(wanted.values()):.0f}; lower "
            "the sparsity or their density"
        )
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
    counts = {name: min(math.floor(round(wanted[name], 6)), room[name]) for name in candidates}
    by_remainder = sorted(counts, key=lambda name: counts[name] - wanted[name])
    while (missing := keep - sum(counts.values())) > 0:
        for name in [name for name in by_remainder if counts[name] < room[name]][:missing]:
            counts[name] += 1
    return by_count(scores, candidates, counts)


def _carried(wanted: dict[str, float], room: dict[str, int]) -> dict[str, float]:
    """What layers want, where what one has no room for goes to the next, and from the last to the first."""
    given, surplus = dict(wanted), 0.0
    for name in [*wanted, *wanted]:
        given[name] += surplus
        surplus = max(given[name] - room[name], 0.0)
        given[name] -= surplus
    return given


def sampled(
    scores: Scores,
    candidates: Mask,
    keep: int,
    generator: Generator,
    *,
    beta: NonNegative,
    scope: Literal["global", "layer"],
    rescale: bool,
) -> Selection:
    """Draws the mask: weights with replacement, with probability p proportional to score^beta, until k are reached.

    The kept set is that of drawing without replacement (Gumbel top-k). Weights of score zero come last, at random. The
    counts c of the draws are those of a Poisson process of rate p, so nothing is drawn one by one and there is no limit
    to the number of weights.

    Args:
        beta: 0 is uniform; the larger, the closer to allocation=global.
        scope: "layer" keeps as many in every layer as allocation=global would, and draws within the layers.
        rescale: multiply a kept weight by c / (s p) for s draws, which makes the sketch unbiased; else binary.

    Reference: Bar and Giryes 2023, arXiv:2305.17559, for masks as sketches of a matrix product.
    Deviates: whether the paper draws with replacement, rescales, and draws per layer could not be established.

    Raises:
        UserError: a score is negative, and so no probability.
    """
    for name, values in scores.items():
        if (values[candidates[name]] < 0).any():
            raise UserError(
                f"allocation=sampled draws in proportion to scores, and {name} has negative ones; use a pruner whose "
                "scores are sizes (for GraSP pruner=grasp_abs)"
            )
    if scope == "global":
        groups = [(dict(candidates), keep)]
    else:
        top = keep_largest(scores, candidates, keep).mask
        groups = [({name: mask}, int(top[name].count_nonzero())) for name, mask in candidates.items()]
    mask: Mask = {}
    scale: dict[str, Tensor] = {}
    for group, number in groups:
        if number == 0:
            mask |= {name: torch.zeros_like(candidate) for name, candidate in group.items()}
            scale |= {name: torch.ones_like(scores[name]) for name in group}
            continue
        drawn, factors = _draw({name: scores[name] for name in group}, group, number, beta, generator)
        mask |= drawn
        scale |= factors
    return Selection(mask, scale if rescale else None)


def _draw(
    scores: Scores, candidates: Mask, k: int, beta: float, generator: Generator
) -> tuple[Mask, dict[str, Tensor]]:
    """The k weights that a Poisson process of rate p reaches first, and c / (s p) of each.

    The s draws are those before the (k + 1)-th weight appears. Given how many weights they reach they are exchangeable,
    so the sketch is unbiased, and exactly k weights are kept.
    """
    logs = {name: beta * values.to(torch.float64).log() for name, values in scores.items()}
    if beta == 0:
        logs = {name: torch.zeros_like(values) for name, values in logs.items()}
    total = torch.cat([logs[name][mask] for name, mask in candidates.items()]).logsumexp(0)
    keys = {}  # Gumbel noise plus log p, which is minus the log of the first arrival: finite for any beta
    for name, values in logs.items():
        uniform = torch.rand(values.shape, dtype=torch.float64, generator=generator).clamp_min(1e-300).to(values.device)
        # A weight of score zero never arrives; those are put in random order behind all others.
        keys[name] = torch.where(values.isneginf(), _NEVER * (1 + uniform), values - total - (-uniform.log()).log())
    mask = keep_largest(keys, candidates, k).mask
    next_key = torch.cat([keys[name][candidates[name] & ~kept] for name, kept in mask.items()])
    if len(next_key) == 0 or next_key.max() <= _NEVER:
        # The process never stops, and c / (s p) tends to one.
        return mask, {name: torch.ones_like(values) for name, values in scores.items()}
    stop = -next_key.max()
    log_counts = {}
    for name, kept in mask.items():
        since = torch.log1p(-torch.exp(-keys[name] - stop))  # log of the part of the time that is left after it came
        rate = torch.where(kept, logs[name] - total + stop + since, -torch.inf)
        few = torch.poisson(rate.clamp_max(_MANY).exp().cpu(), generator=generator).to(rate.device)
        log_counts[name] = torch.where(kept, torch.where(rate > _MANY, rate, few.log1p()), -torch.inf)
    draws = torch.cat([values.flatten() for values in log_counts.values()]).logsumexp(0)
    scale = {
        name: torch.where(mask[name], (number - draws - logs[name] + total).exp(), 1.0).to(scores[name].dtype)
        for name, number in log_counts.items()
    }
    return mask, scale


def check_scores(scores: Scores, candidates: Mask, *, zeros_allowed: bool = False) -> None:
    """Refuses scores of candidates that cannot rank anything.

    Args:
        zeros_allowed: for a network that is broken on purpose.

    Raises:
        UserError: a score is not finite, or all scores are zero.
    """
    for name, candidate in candidates.items():
        positions = masks.remembered(candidate)
        values = scores[name] if positions is None else scores[name].flatten().index_select(0, positions)
        # The sum is the cheap test; it can also overflow where every score is finite, so it does not decide.
        if values.sum().isfinite():
            continue
        values = scores[name][candidate]
        if bad := int((~values.isfinite()).sum()):
            wider = "" if values.dtype == torch.float64 else "score in a wider type (pruner.dtype=float64) or "
            raise UserError(
                f"{bad} of {values.numel()} scores of {name} are not finite ({values.dtype}); "
                f"{wider}lower the initial scale"
            )
    if not zeros_allowed and all(_is_silent(scores[name], kept) for name, kept in candidates.items()):
        first = next(iter(scores))
        raise UserError(
            f"every score is zero, in {first} and all other layers: no signal reaches the output; "
            "lower the sparsity, add rounds, or check the model's initialization (model.init)"
        )


def silent(scores: Scores, candidates: Mask) -> list[str]:
    """Layers that have candidates, all of which score zero."""
    return [name for name, kept in candidates.items() if kept.any() and _is_silent(scores[name], kept)]


def _is_silent(scores: Tensor, kept: Tensor) -> bool:
    return not ((scores != 0) & kept).any()
