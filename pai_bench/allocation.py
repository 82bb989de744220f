"""Scores -> mask: which of the candidates stay. Every function keeps exactly round((1 - sparsity) * N) weights."""

import math

import torch
from torch import Generator, Tensor

from pai_bench import masks
from pai_bench.core import Mask, Scores
from pai_bench.errors import UserError


def _threshold(values: Tensor, k: int) -> Tensor:
    """The k-th largest of a vector."""
    if values.device.type == "cpu":
        # numpy's quickselect takes half the time of torch.kthvalue on a long vector.
        array = values.numpy()
        partitioned = array.copy()
        partitioned.partition(len(array) - k)
        return torch.as_tensor(partitioned[len(array) - k])
    return torch.sort(values, descending=True).values[k - 1]


def keep_largest(values: Tensor, k: int) -> Tensor:
    """A bool vector that marks exactly the k largest values; of equal values the earlier ones are kept."""
    if not 0 <= k <= len(values):
        raise ValueError(f"cannot keep {k} of {len(values)} weights")
    if k == 0 or k == len(values):
        return torch.full_like(values, k > 0, dtype=torch.bool)
    threshold = _threshold(values, k)
    above = values > threshold
    equal = (values == threshold).nonzero().squeeze(1)
    above[equal[: k - int(above.sum())]] = True
    return above


def _among(scores: Scores, candidates: Mask) -> Tensor:
    """The candidates' scores as one vector, in parameter order."""
    return torch.cat([scores[name][kept] for name, kept in candidates.items()])


def _scatter(chosen: Tensor, candidates: Mask) -> Mask:
    """The inverse of `_among`: a vector over the candidates becomes a mask."""
    mask, start = {}, 0
    for name, candidate in candidates.items():
        stop = start + int(candidate.sum())
        mask[name] = torch.zeros_like(candidate)
        mask[name][candidate] = chosen[start:stop]
        start = stop
    return mask


def global_topk(scores: Scores, candidates: Mask, sparsity: float, generator: Generator) -> Mask:
    """Keeps the highest scores of the whole network; of equal scores the first in parameter order.

    Raises:
        ConfigError: the sparsity leaves no weight.
        ValueError: fewer candidates than weights to keep.
    """
    k = masks.num_kept(sparsity, masks.total(candidates))
    return _scatter(keep_largest(_among(scores, candidates), k), candidates)


def uniform(scores: Scores, candidates: Mask, sparsity: float, generator: Generator) -> Mask:
    """Keeps the same fraction of every layer, by score within the layer.

    A layer of n weights gets density * n of them, rounded so that the total is exact: the layers with the largest
    remainders are rounded up, the first of equal ones first.

    Raises:
        ConfigError: the sparsity leaves no weight.
        ValueError: a layer has fewer candidates than weights to keep.
    """
    k = masks.num_kept(sparsity, masks.total(candidates))
    shares = {name: k * mask.numel() / masks.total(candidates) for name, mask in candidates.items()}
    counts = {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    for name in by_remainder[: k - sum(counts.values())]:
        counts[name] += 1
    return {
        name: _scatter(keep_largest(scores[name][mask], counts[name]), {name: mask})[name]
        for name, mask in candidates.items()
    }


def num_tied(scores: Scores, candidates: Mask, mask: Mask) -> int:
    """Candidates whose score equals the lowest kept score: the ones among which the order decided, if not all stay.

    Zero when every candidate with that score was kept. Counted over the whole network, so it describes `global_topk`;
    other allocations decide at a threshold of their own in each layer.
    """
    values, chosen = _among(scores, candidates), torch.cat([mask[name][kept] for name, kept in candidates.items()])
    equal = values == values[chosen].min()
    return int(equal.sum()) if (equal & ~chosen).any() else 0


def check_scores(scores: Scores, candidates: Mask) -> None:
    """Refuses scores that cannot rank anything.

    Raises:
        UserError: a score is not finite, or all scores are zero.
    """
    for name, values in scores.items():
        if not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise UserError(
                f"{bad} of {values.numel()} scores of {name} are not finite ({values.dtype}); "
                "score in a wider type (pruner.score.dtype=float64 for SynFlow) or lower the initial scale"
            )
    if not any(scores[name][kept].any() for name, kept in candidates.items()):
        first = next(iter(scores))
        raise UserError(
            f"every score is zero, in {first} and all other layers: no signal reaches the output; "
            "lower the sparsity, add rounds, or check the model's initialization (model.init)"
        )
