"""biprop: edge-popup with binary weights."""

import torch
from torch import Tensor

from pai_bench.learned.initial import Frozen, frozen, kaiming_uniform
from pai_bench.learned.method import Method


def binary(weight: Tensor, kept: Tensor) -> Tensor:
    """sign(w) * alpha. alpha is the mean size of the kept weights of the layer; 0 if none is kept."""
    alpha = (weight.abs() * kept).sum() / kept.sum().clamp(min=1)
    return torch.sign(weight) * alpha


def biprop(*, weights: Frozen, scale_fan: bool) -> Method:
    """As edge-popup, with weights sign(w) * alpha in a layer, where alpha is the mean |w| of its kept weights.

    The gradient of a score is that of edge-popup: w times the gradient of the weight that is applied.

    Args:
        weights: values of the frozen weights before they are made binary.
        scale_fan: make the weights larger where the layer is sparser.

    Reference: Diffenderfer and Kailkhura 2021, arXiv:2103.09377.
    Deviates: the released code rounds in each layer for itself. Here the allocation says how many weights each layer
        keeps, and the total is exact. With allocation=global the number of kept weights is the final one from the first
        step on; the released code lets it fall over ten epochs.
    """
    return Method(draw=kaiming_uniform, weights=frozen(weights, scale_fan), values=binary)
