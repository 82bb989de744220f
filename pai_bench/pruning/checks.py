"""Whether scores can rank the candidates of a round, and whether a mask may be ablated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pai_bench.core import Ablation, Mask, Round, Scores
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks.known_positions import known


def check_scores(scores: Scores, candidates: Mask, *, zeros_allowed: bool = False) -> None:
    """Refuses scores that cannot rank the candidates.

    Args:
        zeros_allowed: whether all scores may be zero, as in a network that is broken on purpose.

    Raises:
        UserError: the score of a candidate is not finite, or the scores of all candidates are zero.
    """
    on_cpu = next(iter(candidates.values())).device.type == "cpu"
    # On a GPU, one look at all layers first.
    if on_cpu or not bool(torch.stack([scores[name].sum() for name in candidates]).isfinite().all()):
        _check_finite(scores, candidates)
    if not zeros_allowed and all(_is_silent(scores[name], kept) for name, kept in candidates.items()):
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
                f"{wider}lower the initial scale"
            )


def silent(scores: Scores, candidates: Mask) -> list[str]:
    """The layers that have candidates, all of them with score zero."""
    return [name for name, kept in candidates.items() if kept.any() and _is_silent(scores[name], kept)]


def _is_silent(scores: Tensor, kept: Tensor) -> bool:
    return not ((scores != 0) & kept).any()


def check_ablation(ablation: Ablation, rounds: Sequence[Round]) -> None:
    """Refuses an ablation of the mask after training that is not rewound.

    Raises:
        ConfigError: it would bring back weights that have no value.
    """
    rewinds = all(one.until_epoch == 0 or (one.rewind_epoch is not None and one.rewind_weights) for one in rounds)
    if ablation.mask is not None and not rewinds:
        raise ConfigError(
            "ablation of the mask: weights that training has moved and pruned have no value to come back with; use a "
            "schedule before training, or one that rewinds the weights"
        )
