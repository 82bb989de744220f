"""Whether scores can rank the candidates of a round, and whether an ablation goes with the rounds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pai_bench.core import Ablation, Mask, Pruner, Round, Scores
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import reading
from pai_bench.masks.known_positions import known


def check_scores(
    scores: Scores,
    candidates: Mask,
    required: Sequence[tuple[Tensor, Callable[[], Exception]]] | None = None,
    *,
    zeros_allowed: bool = False,
) -> None:
    """Refuses scores that cannot rank the candidates.

    Args:
        required: what a score requires, and its errors.
        zeros_allowed: whether all scores may be zero, as in a network that is broken on purpose.

    Raises:
        UserError: the score of a candidate is not finite, or the scores of all candidates are zero.
    """
    first, candidate = next(iter(candidates.items()))
    finite = live = False
    if not reading.free(candidate):  # one look at everything
        total = torch.cat([scores[name].flatten() for name in candidates]).sum()
        holds = [condition for condition, _ in required or []]
        read = torch.stack([*holds, total.isfinite(), _is_live(scores[first], candidate)]).tolist()
        for (_, error), held in zip(required or [], read, strict=False):
            if not held:
                raise error()
        finite, live = read[-2:]
    if not finite:
        _check_finite(scores, candidates)
    if not zeros_allowed and not live and all(_is_silent(scores[name], kept) for name, kept in candidates.items()):
        name = next(iter(scores))
        raise UserError(
            f"every score is zero, in {name} and all other layers: no signal reaches the output; "
            "lower the sparsity, add rounds, or check the model's initialization (model.init)"
        )


def _check_finite(scores: Scores, candidates: Mask) -> None:
    for name, candidate in candidates.items():
        # The sum is the cheap test. It decides nothing: it can overflow though every score is finite, and scores that
        # are not of candidates may be anything.
        positions = known(candidate)
        values = scores[name] if positions is None else scores[name].flatten().index_select(0, positions)
        if values.sum().isfinite():
            continue
        values = scores[name][candidate]
        if num_bad := int((~values.isfinite()).sum()):
            wider = "" if values.dtype == torch.float64 else "score in a wider type (pruner.dtype=float64) or "
            raise UserError(
                f"{num_bad} of {values.numel()} scores of {name} are not finite ({values.dtype}); "
                f"{wider}give smaller initial weights"
            )


def silent(scores: Scores, candidates: Mask) -> list[str]:
    """The layers that have candidates, all of them with score zero."""
    if all(map(reading.free, candidates.values())):
        return [name for name, kept in candidates.items() if kept.any() and _is_silent(scores[name], kept)]
    found = [kept.any() & ~_is_live(scores[name], kept) for name, kept in candidates.items()]
    return [name for name, is_silent in zip(candidates, torch.stack(found).tolist(), strict=True) if is_silent]


def _is_silent(scores: Tensor, kept: Tensor) -> bool:
    return not _is_live(scores, kept)


def _is_live(scores: Tensor, kept: Tensor) -> Tensor:
    """Whether a candidate has a score other than zero: () bool."""
    return ((scores != 0) & kept).any()


def known_number(num_kept: int | None, pruner: Pruner) -> int:
    """The number of weights that a round keeps, for a score that asks for it.

    Raises:
        ConfigError: it is not known, as the round searches for it, or counts filters.
    """
    if pruner.reduce is not None:
        raise ConfigError(
            f"pruner.reduce={pruner.reduce}: pruner={pruner.name} needs the number of weights to keep before it "
            "scores, and this keeps filters; give null"
        )
    if num_kept is None:
        raise ConfigError(
            f"target=effective: pruner={pruner.name} needs the number of weights to keep before it scores; give "
            "target=sparsity"
        )
    return num_kept


def check_ablation(ablation: Ablation, rounds: Sequence[Round]) -> None:
    """Refuses an ablation of the mask after training that is not rewound.

    Raises:
        ConfigError: weights would return that have no value to come back with.
    """
    rewinds = all(one.until_epoch == 0 or (one.rewind_epoch is not None and one.rewind_weights) for one in rounds)
    if ablation.mask is not None and not rewinds:
        raise ConfigError(
            "ablation of the mask: weights that training has moved and pruned have no value to come back with; use a "
            "schedule before training, or one that rewinds the weights"
        )
