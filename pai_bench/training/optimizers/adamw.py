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
    """AdamW as in torch.optim.AdamW(foreach=True), equal to it bit for bit on a CPU.

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
        if weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        if isinstance(lr, Tensor):
            step_sizes, corrections = _on_the_device(num_steps, lr, beta1, beta2)
            torch._foreach_div_(scale, corrections)
            torch._foreach_add_(scale, eps)
            torch._foreach_div_(scale, step_sizes)
            torch._foreach_addcdiv_(parameters, first, scale)
        else:
            counts = [float(count) for count in num_steps]
            torch._foreach_div_(scale, [(1 - beta2**count) ** 0.5 for count in counts])
            torch._foreach_add_(scale, eps)
            torch._foreach_addcdiv_(parameters, first, scale, [-(lr / (1 - beta1**count)) for count in counts])

    return Method(update, per_weight=("first_moment", "second_moment"), per_parameter=("num_steps",))


def _on_the_device(
    num_steps: list[Tensor], lr: Tensor, beta1: float, beta2: float
) -> tuple[list[Tensor], list[Tensor]]:
    """For each parameter -lr / (1 - beta1^t) and sqrt(1 - beta2^t), without reading anything from the device."""
    counts = torch.stack(num_steps)  # float64, as in Python: in float32 1 - beta2 has four digits
    step_sizes = -lr / (1 - beta1**counts)
    corrections = (1 - beta2**counts).sqrt()
    return list(step_sizes.to(lr.dtype).unbind()), list(corrections.to(lr.dtype).unbind())
