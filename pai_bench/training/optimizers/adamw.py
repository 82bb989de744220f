"""Adam with decoupled weight decay."""

from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from pai_bench.training.optimizer import Method


def adamw(
    *,
    beta1: Annotated[float, Ge(0), Lt(1)],
    beta2: Annotated[float, Ge(0), Lt(1)],
    eps: Annotated[float, Ge(1e-30), Lt(3e38)],
) -> Method:
    """AdamW as in torch.optim.AdamW(fused=True), equal to it bit for bit.

    One kernel reads every tensor once. Single operations would take a CPU several times as long for a pruned network:
    MKL is slow at the square root of 0.

    Weight decay multiplies the weights by 1 - lr * weight_decay, apart from the gradient.

    Args:
        beta1: decay of the mean of the gradients (first moment).
        beta2: decay of the mean of their squares (second moment).
        eps: added to the root of the second moment. Not 0, or a pruned weight becomes 0 / 0.

    Reference: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101, Algorithm 2.
    """

    def update(
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        first, second, num_steps = state["first_moment"], state["second_moment"], state["num_steps"]
        torch._foreach_add_(num_steps, 1)
        torch._fused_adamw_(
            parameters,
            gradients,
            first,
            second,
            [],
            num_steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return Method(update, per_weight=("first_moment", "second_moment"), per_parameter=("num_steps",))
