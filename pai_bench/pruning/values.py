"""Values that the rounds of a search give to the weights of a network."""

import torch
from torch import nn

from pai_bench.core import Mask, Weights


@torch.no_grad()
def restore_(model: nn.Module, values: Weights, returned: Mask) -> None:
    """Gives the weights that return the values that they return with."""
    parameters = dict(model.named_parameters())
    for name, tensor in returned.items():
        parameters[name].copy_(torch.where(tensor, values[name], parameters[name]))


@torch.no_grad()
def assign_(model: nn.Module, weights: Weights) -> None:
    """Gives whole tensors of weights their values."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)
