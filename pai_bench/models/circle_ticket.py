"""The circle ticket: a small network whose outputs say in which ring around the origin a point of the plane lies."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BORDERS = (0.2, 0.5, 0.7)  # of |x|^2, between the four classes
SLOPE = 5.0  # of the first class's output as a function of |x|^2; it doubles from class to class
_KNOTS = 10  # of the piecewise linear square of one coordinate
_MARGIN = 0.01  # how far the last knot lies beyond the outermost border


@dataclass(frozen=True)
class Layer:
    """A linear layer of a ticket, in float64."""

    weight: Tensor  # (outputs, inputs); its zeros are no part of the ticket
    bias: Tensor  # (outputs,)


def circle_ticket(depth: int) -> list[Layer]:
    """The layers of the ticket. There is a ReLU between two layers.

    Output j is a_j r + b_j, where r approximates |x|^2 and a_j = 5 * 2^j. The largest output changes where r passes
    0.2, 0.5 and 0.7. At depth 3, each coordinate is squared. From depth 4 on, the first layer takes absolute values.
    From depth 6 on, layers fold the plane at lines through the origin, so that few knots are needed across the last.

    Args:
        depth: the number of layers of units, inputs and outputs included; at least 3.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153, and their released code.
    Deviates: none.
    """
    layers: list[Layer] = []
    coordinates = torch.eye(2, dtype=torch.float64)  # (2, units): the two coordinates as sums over the present units
    if depth > 3:
        layers.append(_without_bias(torch.cat([coordinates, -coordinates])))
        coordinates = torch.cat([coordinates, coordinates], 1)
    if depth > 4:
        layers.append(_without_bias(coordinates))
        coordinates = torch.eye(2, dtype=torch.float64)
    angle = math.pi / 2
    for _ in range(depth - 5):
        angle /= 2
        along = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        across = torch.tensor([math.sin(angle), -math.cos(angle)], dtype=torch.float64)
        layers.append(_without_bias(torch.stack([along, across, -across]) @ coordinates))
        coordinates = torch.stack([along, across, across], 1)
    if depth > 5:  # the last fold leaves the way along its line, and the distance from it
        coordinates = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.float64)
    return layers + _squares_and_outputs(coordinates, _knots(depth, angle), last_is_rising=depth > 4)


def _knots(depth: int, angle: float) -> list[Tensor]:
    """The knots of both coordinates. Of folded ones, the longer gets more of the twenty."""
    if depth <= 5:
        start = -1 if depth == 3 else 0
        return [torch.linspace(start, 1, _KNOTS, dtype=torch.float64)] * 2
    along, across = math.sqrt(2), abs(math.sin(angle)) * math.sqrt(BORDERS[-1]) + _MARGIN
    num_along = min(math.ceil(2 * _KNOTS * along / (along + across)), 2 * _KNOTS - 3)
    num_across = max(2 * _KNOTS - num_along, 3)
    return [
        torch.linspace(0, end, number, dtype=torch.float64)
        for end, number in ((along, num_along), (across, num_across))
    ]


def _squares_and_outputs(coordinates: Tensor, knots: list[Tensor], *, last_is_rising: bool) -> list[Layer]:
    """The layer of hinge functions, and the outputs, which weigh their sum."""
    hinges = [_hinges(of_one, last_is_rising=last_is_rising) for of_one in knots]
    weight = torch.cat([signs[:, None] * row for (signs, _, _), row in zip(hinges, coordinates, strict=True)])
    bias = torch.cat([-signs * of_one for (signs, _, _), of_one in zip(hinges, knots, strict=True)])
    slopes, offsets = class_lines()
    sums = torch.cat([of_one for _, of_one, _ in hinges])
    constant = sum(start for _, _, start in hinges)
    return [Layer(weight, bias), Layer(slopes[:, None] * sums, slopes * constant + offsets)]


def _hinges(knots: Tensor, *, last_is_rising: bool) -> tuple[Tensor, Tensor, float]:
    """Signs (n,), heights (n,) and a constant: constant + sum of height * relu(sign * (x - knot)) is x^2 at the knots.

    Signs alternate, and the first hinge rises.

    Args:
        last_is_rising: whether the last hinge rises, whatever its place.
    """
    signs = torch.ones_like(knots)
    signs[1::2] = -1
    if last_is_rising:
        signs[-1] = 1
    beyond = torch.cat([knots, 2 * knots[-1:] - knots[-2:-1]])  # one knot more, for the slope behind the last
    slopes = beyond[1:] + beyond[:-1]  # of the chords of x^2
    return signs, *heights(signs, knots, slopes, float(knots[0] ** 2))


def heights(signs: Tensor, knots: Tensor, slopes: Tensor, start: float) -> tuple[Tensor, float]:
    """Heights (n,) and a constant: constant + sum of height * relu(sign * (x - knot)) is a piecewise linear function.

    From the first knot on, the sum does not depend on the signs: a falling hinge is a rising one less a line, and the
    first hinge makes up for the line.

    Args:
        signs: (n,), 1 for a hinge that rises and -1 for one that falls. The first rises.
        knots: (n,), in rising order.
        slopes: (n,), of the function behind each knot.
        start: its value at the first knot.
    """
    found = slopes.diff(prepend=torch.zeros(1, dtype=torch.float64))
    falling = signs < 0
    constant = float(start - (found * (knots - knots[0]))[falling].sum())
    found[0] = slopes[0] + found[falling].sum()
    return found, constant


def class_lines() -> tuple[Tensor, Tensor]:
    """Slopes (4,) and offsets (4,) of the classes' outputs as functions of |x|^2: neighbours cross at the borders."""
    slopes = SLOPE * 2.0 ** torch.arange(len(BORDERS) + 1, dtype=torch.float64)
    steps = -slopes.diff() * torch.tensor(BORDERS, dtype=torch.float64)
    return slopes, torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])


def _without_bias(weight: Tensor) -> Layer:
    return Layer(weight, torch.zeros(len(weight), dtype=torch.float64))
