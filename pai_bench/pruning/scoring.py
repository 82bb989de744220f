"""What scores see: a copy of the network in the precision of the pruner, with channels first as in the images.

So a mask depends neither on the memory layout nor on the precision in which the network is trained.
"""

import copy

import torch
from torch import Tensor, nn

from pai_bench.core import Weights
from pai_bench.system.layout import laid_out, lay_out_

PLAIN = torch.contiguous_format
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def copy_for_scores(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network, with floating-point parameters and buffers in `dtype`."""
    copied = copy.deepcopy(model).to(dtype)
    lay_out_(copied, PLAIN)
    return copied


@torch.no_grad()
def update_(copied: nn.Module, model: nn.Module) -> None:
    """Gives a copy the present values of the network it was made from."""
    torch._foreach_copy_(_tensors(copied), _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def cast_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    """Weights in `dtype`, laid out as in the copy."""
    return {name: laid_out(weight.to(dtype), PLAIN) for name, weight in weights.items()}
