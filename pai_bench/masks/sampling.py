"""An allocation that draws: weights are kept at random, with probabilities that follow their scores."""

from typing import Literal

import torch
from torch import Generator, Tensor

from pai_bench.core import Mask, NonNegative, Scores, Selection
from pai_bench.errors import UserError
from pai_bench.masks.selection import keep_largest

_NEVER = -1e300  # keys of weights that cannot be drawn lie below
_MANY = 30.0  # log of a count that equals its mean to six digits; torch.poisson cannot hold much larger ones


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
    """Draws weights with replacement, with probability p proportional to score^beta, until k different ones are drawn.

    The set of kept weights has the distribution of drawing without replacement (Gumbel top-k). Weights with score zero
    come last, in random order. The counts c of the draws come from a Poisson process of rate p. So the draws are not
    made one by one, and there is no limit to the number of weights.

    Args:
        beta: with 0 all weights are equally likely. The larger it is, the closer the mask is to allocation=global.
        scope: "global" draws from the whole network. "layer" keeps as many weights in every layer as allocation=global,
            and draws within the layers.
        rescale: whether a kept weight is multiplied by c / (s p) for s draws, which makes the sketch unbiased.

    Reference: Bar and Giryes 2023, arXiv:2305.17559, for masks as sketches of a matrix product.
    Deviates: unknown. Whether the paper draws with replacement, rescales, and draws per layer could not be established.

    Raises:
        UserError: a score is negative, so it gives no probability.
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
    """The mask of the k weights that a Poisson process of rate p reaches first, and the factor c / (s p) of each.

    The s draws are those before the (k + 1)-th weight appears. Given the number of weights that they reach, the draws
    are exchangeable. So the sketch is unbiased, and exactly k weights are kept.
    """
    logs = {name: beta * values.to(torch.float64).log() for name, values in scores.items()}
    if beta == 0:
        logs = {name: torch.zeros_like(values) for name, values in logs.items()}
    total = torch.cat([logs[name][mask] for name, mask in candidates.items()]).logsumexp(0)
    keys = {}  # Gumbel noise plus log p: minus the log of the first arrival, which is finite for any beta
    for name, values in logs.items():
        uniform = torch.rand(values.shape, dtype=torch.float64, generator=generator).clamp_min(1e-300).to(values.device)
        # A weight with score zero never arrives. Such weights are put behind all others, in random order.
        keys[name] = torch.where(values.isneginf(), _NEVER * (1 + uniform), values - total - (-uniform.log()).log())
    mask = keep_largest(keys, candidates, k).mask
    next_key = torch.cat([keys[name][candidates[name] & ~kept] for name, kept in mask.items()])
    if len(next_key) == 0 or next_key.max() <= _NEVER:
        # No further weight ever arrives, so the process never stops, and c / (s p) tends to one.
        return mask, {name: torch.ones_like(values) for name, values in scores.items()}
    stop = -next_key.max()
    log_counts = {}
    for name, kept in mask.items():
        since = torch.log1p(-torch.exp(-keys[name] - stop))  # log of the fraction of time left
        rate = torch.where(kept, logs[name] - total + stop + since, -torch.inf)
        few = torch.poisson(rate.clamp_max(_MANY).exp().cpu(), generator=generator).to(rate.device)
        log_counts[name] = torch.where(kept, torch.where(rate > _MANY, rate, few.log1p()), -torch.inf)
    draws = torch.cat([values.flatten() for values in log_counts.values()]).logsumexp(0)
    scale = {
        name: torch.where(mask[name], (number - draws - logs[name] + total).exp(), 1.0).to(scores[name].dtype)
        for name, number in log_counts.items()
    }
    return mask, scale
