"""Stochastic gradient descent with momentum."""

from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from pai_bench.training.optimizer import Method


def sgd(*, momentum: Annotated[float, Ge(0), Lt(1)], nesterov: bool) -> Method:
    """SGD as in torch.optim.SGD(foreach=True), equal to it bit for bit on a CPU.

    Weight decay is added to the gradient.

    Args:
        momentum: factor by which the sum of earlier gradients shrinks at every step. 0 keeps no such sum.
        nesterov: whether to use Nesterov's momentum. It needs momentum above 0.

    Reference: Sutskever et al., On the importance of initialization and momentum in deep learning (ICML 2013).
    """

    def update(
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        changes = gradients
        if weight_decay:
            changes = list(torch._foreach_add(changes, parameters, alpha=weight_decay))
        if momentum:
            velocity = state["momentum"]
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, changes)
            if nesterov:
                torch._foreach_add_(changes, velocity, alpha=momentum)
            else:
                changes = velocity
        if isinstance(lr, Tensor):
            torch._foreach_add_(parameters, list(torch._foreach_mul(changes, -lr)))
        else:
            torch._foreach_add_(parameters, changes, alpha=-lr)

    return Method(update, per_weight=("momentum",) if momentum else ())
