"""Transfers: the weights that the last training starts from, once the mask is found. Each is a core.TransferRule."""

import torch
from torch import Generator, Tensor

from pai_bench.core import Mask, State, TransferRule, Weights
from pai_bench.errors import UserError
from pai_bench.masks import masks, weight_files


def transferred(
    rule: TransferRule, own: State, fresh: State, mask: Mask, generator: Generator, name: str
) -> tuple[State, float]:
    """The state that training starts from; and the share of the kept weights that have the sign they were drawn with.

    Biases, norms and their statistics are those of the initialization.

    Args:
        own: the state that the network was initialized with.
        fresh: that of another draw.
        mask: of all weights that can be pruned.
        name: of the transfer, for errors.

    Raises:
        UserError: the rule changes nothing, or gives values that are not finite.
    """
    before, other = ({key: state[key] for key in mask} for state in (own, fresh))
    values = rule(before, other, mask, generator)
    changed, same_sign = False, 0
    for key, kept in mask.items():
        old, new = before[key][kept], values[key][kept]
        if not new.isfinite().all():
            raise UserError(f"transfer={name}: it gives {key} values that are not finite; choose another")
        changed |= not torch.equal(old, new)
        same_sign += int((old.sign() == new.sign()).sum())
    if not changed:
        raise UserError(
            f"transfer={name}: it changed nothing, so the run would be a copy of the one without it; choose another"
        )
    return own | values, same_sign / masks.kept(mask)


def fan_in(own: Weights, fresh: Weights, mask: Mask, generator: Generator) -> Weights:
    """Weights drawn anew as the model draws them, times sqrt(fan-in / inputs that the output keeps).

    So the pre-activations have the variance of the dense network at initialization. Where the model draws from
    N(0, 2 / fan-in), an output with k inputs gets N(0, 2 / k).

    Reference: Evci et al. 2020, arXiv:2010.03533.
    Deviates: in the released code the distribution is a setting of its own, the same for all layers. Here every layer
        keeps the one of the model.
    """
    return {name: fresh[name] * _growth(kept) for name, kept in mask.items()}


def _growth(kept: Tensor) -> Tensor:
    """sqrt(fan-in / kept inputs) of each output, in the shape (O, 1, ...); an output without inputs counts as one."""
    inputs = kept.flatten(1).sum(1).clamp(min=1)
    return (kept[0].numel() / inputs).sqrt().view(-1, *[1] * (kept.ndim - 1))


def rescale(own: Weights, fresh: Weights, mask: Mask, generator: Generator) -> Weights:
    """The initial weights, of every layer times a factor: then the kept ones have the sum of squares of all of them.

    Reference: Hayou et al. 2021, arXiv:2002.08797 (the rescaling trick).
    Deviates: the paper brings every layer to the variance of the edge of chaos. Here it is that of the initialization.
    """

    def factor(weight: Tensor, kept: Tensor) -> Tensor:
        squares = weight.double().square()
        # Rounded to the precision of the weights, so that the order of the sums does not show.
        return (squares.sum() / (squares * kept).sum()).sqrt().nan_to_num(1.0, 1.0).to(weight.dtype)

    return {name: own[name] * factor(own[name], kept) for name, kept in mask.items()}


def signs(own: Weights, fresh: Weights, mask: Mask, generator: Generator, *, weights: str | None) -> Weights:
    """The initial weights with the signs of another run. A weight that is zero there keeps its own sign.

    Args:
        weights: a file with the weights of that run. None: the signs are those of another draw, so they are random.

    Raises:
        ConfigError: the file cannot be read, or is of another model.

    Reference: Oh et al. 2025, Find A Winning Sign (AWS), arXiv:2504.05357, and its released code.
    Deviates: their code gives signs to the biases of linear layers, too.
    """
    theirs = _theirs(weights, own, fresh)
    return {name: torch.where(theirs[name] == 0, own[name], own[name].abs() * theirs[name].sign()) for name in mask}


def magnitudes(own: Weights, fresh: Weights, mask: Mask, generator: Generator, *, weights: str | None) -> Weights:
    """The magnitudes of another run with the initial signs: the control of `signs`.

    A weight that is zero there keeps its own magnitude.

    Args:
        weights: as in `signs`. None: the magnitudes are those of another draw.

    Raises:
        ConfigError: the file cannot be read, or is of another model.
    """
    theirs = _theirs(weights, own, fresh)
    return {name: torch.where(theirs[name] == 0, own[name], theirs[name].abs() * own[name].sign()) for name in mask}


def _theirs(path: str | None, own: Weights, fresh: Weights) -> Weights:
    return fresh if path is None else weight_files.read("transfer.weights", path, own)
