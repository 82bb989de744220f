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


def keep_largest(scores: Scores, candidates: Mask, k: int) -> Mask:
    """Marks exactly the k largest scores among the candidates; of equal scores the first in parameter order.

    Raises:
        ValueError: there are fewer candidates than k.
    """
    values = _among(scores, candidates)
    if k > len(values):
        raise ValueError(f"cannot keep {k} of {len(values)} weights")
    if k == 0:
        return {name: torch.zeros_like(candidate) for name, candidate in candidates.items()}
    threshold = _threshold(values, k)
    mask = {name: ((scores[name] > threshold) & candidate).contiguous() for name, candidate in candidates.items()}
    missing = k - masks.kept(mask)
    for name, candidate in candidates.items():
        if missing == 0:
            break
        equal = ((scores[name] == threshold) & candidate).flatten().nonzero().squeeze(1)[:missing]
        mask[name].view(-1)[equal] = True
        missing -= len(equal)
    return mask


def _among(scores: Scores, candidates: Mask) -> Tensor:
    """The candidates' scores as one vector, in parameter order."""
    return torch.cat([scores[name][candidate] for name, candidate in candidates.items()])


def global_topk(scores: Scores, candidates: Mask, sparsity: float, generator: Generator) -> Mask:
    """Keeps the highest scores of the whole network; of equal scores the first in parameter order.

    Raises:
        ConfigError: the sparsity leaves no weight.
        ValueError: fewer candidates than weights to keep.
    """
    return keep_largest(scores, candidates, masks.num_kept(sparsity, masks.total(candidates)))


def uniform(scores: Scores, candidates: Mask, sparsity: float, generator: Generator) -> Mask:
    """Keeps the same fraction of every layer, by score within the layer.

    A layer of n weights gets density * n of them, rounded so that the total is exact: the layers with the largest
    remainders are rounded up, the first of equal ones first. A layer cannot get more than it has candidates.

    Raises:
        ConfigError: the sparsity leaves no weight.
        ValueError: fewer candidates than weights to keep.
    """
    k = masks.num_kept(sparsity, masks.total(candidates))
    shares = {name: k * mask.numel() / masks.total(candidates) for name, mask in candidates.items()}
    room = {name: int(mask.count_nonzero()) for name, mask in candidates.items()}
    counts = {name: min(math.floor(share), room[name]) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    while (missing := k - sum(counts.values())) > 0:
        open_layers = [name for name in by_remainder if counts[name] < room[name]]
        if not open_layers:
            raise ValueError(f"cannot keep {k} of {sum(room.values())} weights")
        for name in open_layers[:missing]:
            counts[name] += 1
    return {name: keep_largest(scores, {name: mask}, counts[name])[name] for name, mask in candidates.items()}


def num_tied(scores: Scores, candidates: Mask, mask: Mask) -> int:
    """Candidates whose score equals the lowest kept score: the ones among which the order decided, if not all stay.

    Zero when every candidate with that score was kept. Counted over the whole network, so it describes `global_topk`;
    other allocations decide at a threshold of their own in each layer.
    """
    lowest = _among(scores, mask).min()
    equal = {name: (scores[name] == lowest) & candidate for name, candidate in candidates.items()}
    split = any((tensor & ~mask[name]).any() for name, tensor in equal.items())
    return masks.kept(equal) if split else 0


def check_scores(scores: Scores, candidates: Mask) -> None:
    """Refuses scores that cannot rank anything.

    Raises:
        UserError: a score is not finite, or all scores are zero.
    """
    for name, values in scores.items():
        # The sum is the cheap test; it can also overflow where every score is finite, so it does not decide.
        if not values.sum().isfinite() and not values.isfinite().all():
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
