"""Scores of small networks in float64, for the tests of single methods."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis.mode import mode
from pai_bench.core import (
    Batches,
    Scores,
    Subnetwork,
)
from pai_bench.masks import masks

SHAPE = (3, 8, 8)


def subnetwork(model: nn.Module, mask: masks.Mask | None = None) -> Subnetwork:
    initial = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    mask = masks.full(model) if mask is None else mask
    masks.apply_(model, mask)
    return Subnetwork(model, mask, initial, SHAPE)


def taken(
    score: Callable[..., Scores], model: nn.Module, batches: Batches, training: bool, **settings: object
) -> Scores:
    with mode(model, training):
        return score(subnetwork(model), batches, F.cross_entropy, Generator().manual_seed(0), **settings)


def assert_close(a: Tensor | float, b: Tensor | float, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=1e-14
    )
