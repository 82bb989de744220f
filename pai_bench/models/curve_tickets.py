"""The tickets of two regressions: small networks that compute max(x, 0), and the points of a helix."""

import math

import torch
from torch import Tensor

from pai_bench.models.circle_ticket import Layer, heights

NUM_KNOTS = 38  # of the helix ticket, and so the units of its widest layer


def relu_ticket(depth: int) -> list[Layer]:
    """The layers of a ticket for max(x, 0). There is a ReLU between two. Each has one unit, whose one weight is 1.

    Args:
        depth: the number of layers of units, inputs and outputs included; at least 3.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153, and their released code.
    Deviates: none.
    """
    return [_passing(0.0)] * (depth - 1)


def helix_ticket(depth: int) -> list[Layer]:
    """The layers of a ticket for (y cos y, y sin y, y) / (8 pi) with y = 5 pi + 3 pi t. There is a ReLU between two.

    Layers of one unit pass t + 1 on, which is positive. The last hidden layer has 38 hinges at evenly spaced knots. The
    first two outputs weigh all of them, so that they are exact at the knots and straight in between. The third is a
    line, and reads the first hinge. These are 115 weights, and one for each layer that passes t + 1 on.

    Args:
        depth: the number of layers of units, inputs and outputs included; at least 3.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153, and their released code.
    Deviates: the construction is our own. Theirs has as many weights at depth 3, and more where it is deeper.
    """
    knots = torch.linspace(0, 2, NUM_KNOTS + 1, dtype=torch.float64)  # of t + 1, with the end of the last piece
    y = 2 * math.pi + 3 * math.pi * knots
    curve = torch.stack([y * y.cos(), y * y.sin()]) / (8 * math.pi)
    signs = torch.ones_like(knots[:-1])
    signs[1::2] = -1
    found = [heights(signs, knots[:-1], values.diff() / knots.diff(), float(values[0])) for values in curve]
    line = torch.zeros_like(signs)
    line[0] = 3 / 8
    outputs = torch.stack([*(values for values, _ in found), line])
    constants = torch.tensor([*(start for _, start in found), 1 / 4], dtype=torch.float64)
    shift = 1.0 if depth == 3 else 0.0  # the first layer reads t, and the others t + 1
    hinges = Layer(signs[:, None], signs * (shift - knots[:-1]))
    passing = [_passing(1.0), *[_passing(0.0)] * (depth - 4)] if depth > 3 else []
    return [*passing, hinges, Layer(outputs, constants)]


def _passing(bias: float) -> Layer:
    """A layer of one unit that reads one."""
    return Layer(_of(1.0)[None], _of(bias))


def _of(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)
