"""What scores see: a copy of the network in the precision of the pruner, laid out channels first as the images are.

So a mask depends neither on the layout in which the network is trained nor on the rounding of its precision.
"""

import copy

import torch
from torch import Tensor, nn

from pai_bench.core import Weights
from pai_bench.system.layout import laid_out, lay_out_

PLAIN = torch.contiguous_format
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def copy_for_scores(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network, its floating-point parameters and buffers in `dtype`."""
    copied = copy.deepcopy(model).to(dtype)
    lay_out_(copied, PLAIN)
    return copied


@torch.no_grad()
def update_(copied: nn.Module, model: nn.Module) -> None:
    """Gives a copy the present values of the network that it was made from."""
    torch._foreach_copy_(_tensors(copied), _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def cast_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    """Weights in `dtype`, laid out as those of the copy."""
    return {name: laid_out(weight.to(dtype), PLAIN) for name, weight in weights.items()}
