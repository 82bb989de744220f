"""A perceptron with a winning ticket planted in it, so that the weights that a pruner should find are known."""

import math
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from pai_bench.core import Shape, Weights
from pai_bench.errors import ConfigError
from pai_bench.models.circle_ticket import Layer, circle_ticket
from pai_bench.models.curve_tickets import NUM_KNOTS, helix_ticket, relu_ticket
from pai_bench.models.lenet import Plain


class PlantedNetwork(Plain):
    """The network that hosts a ticket."""

    ticket: Weights  # of every prunable weight the values as they were planted, zero outside the ticket
    output_scale: float  # under the mask of the ticket, the outputs are this number times those of the ticket alone


# By the numbers of inputs and outputs: the ticket, and the width that it needs.
_TICKETS = {(2, 4): (circle_ticket, 20), (1, 1): (relu_ticket, 1), (1, 3): (helix_ticket, NUM_KNOTS)}
_CIRCLE = (2, 4)


def planted(
    input_shape: Shape, num_classes: int, *, depth: Annotated[int, Ge(3)], width: Annotated[int, Ge(20)]
) -> nn.Module:
    """A perceptron of normal weights with a ticket in it. Where the ticket is, depends on the seed.

    The numbers of inputs and outputs say which ticket it is: 2 and 4 that of the circle, 1 and 1 that of the ReLU,
    1 and 3 that of the helix.

    Weights have the variance 2 / inputs. The standard deviation of biases is the product of sqrt(2 / inputs) over the
    layers so far.

    Each unit of the ticket takes the place of a unit of the host. Of the units whose weights have the signs of the
    ticket's, it is the one with the most similar direction. These weights get the values of the ticket, times the scale
    that fits the host best, and the next layer divides by it. All other weights of the host stay.

    The outputs of the circle keep a scale, which does not change the largest. Those of a regression have their true
    size under the mask: the weights of the ticket in every layer are multiplied by the same factor more.

    Biases are not prunable. Under the mask of the ticket, no output reads a unit outside the ticket, so only the biases
    of the ticket count, and these are the ticket's.

    Args:
        depth: the number of layers of units, inputs and outputs included.
        width: units in each hidden layer; the ticket of the circle needs 20, and that of the helix 38.

    Raises:
        ConfigError: the data is that of no ticket, or the width is too small.

    Reference: Fischer and Burkholz 2021, arXiv:2111.11153, and their released code.
    Deviates: all outputs have one scale, so the largest output of the network under the mask is that of the ticket. The
        authors scale every output by itself, and divide by these scales where they judge the ticket; of regressions,
        too. The construction of the helix ticket is our own. Units are chosen
        by the cosine; their code takes the least absolute change, which prefers units of small weights. Two units of
        the ticket never get one place; in their code they can, where no unit of the host has the signs. They prune
        biases too.
    """
    task = math.prod(input_shape), num_classes
    if task not in _TICKETS:
        shown = "x".join(map(str, input_shape))
        raise ConfigError(
            f"model=planted: it has no ticket for inputs of shape {shown} and {num_classes} outputs; give "
            "dataset=planted_circle, planted_relu or planted_helix"
        )
    ticket, num_units = _TICKETS[task]
    if width < num_units:
        raise ConfigError(f"model.width={width}: the ticket of this dataset needs {num_units} units; give as many")
    network = PlantedNetwork([], task[0], [width] * (depth - 2), num_classes)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    _draw_(list(layers.values()))
    places, network.output_scale = _plant_(list(layers.values()), ticket(depth))
    if task != _CIRCLE:
        _scale_up_(list(layers.values()), places, 1 / network.output_scale)
        network.output_scale = 1.0
    network.ticket = {
        f"{name}.weight": torch.where(place, layer.weight.detach(), 0.0)
        for (name, layer), place in zip(layers.items(), places, strict=True)
    }
    return network


@torch.no_grad()
def _draw_(layers: list[nn.Linear]) -> None:
    """Draws the weights and biases of the host."""
    std_of_bias = 1.0
    for layer in layers:
        std = math.sqrt(2 / layer.in_features)
        std_of_bias *= std
        layer.weight.normal_(0, std)
        layer.bias.normal_(0, std_of_bias)


@torch.no_grad()
def _plant_(hosts: list[nn.Linear], ticket: list[Layer]) -> tuple[list[Tensor], float]:
    """Plants a ticket, in place. Returns where its weights are, a bool tensor for each layer, and the output scale."""
    places = []
    scales, units = torch.ones(hosts[0].in_features, dtype=torch.float64), torch.arange(hosts[0].in_features)
    for host, layer in zip(hosts, ticket, strict=True):
        target = torch.cat([layer.weight / scales, layer.bias[:, None]], 1)  # a row for each unit of the ticket
        rows = torch.cat([host.weight[:, units], host.bias[:, None]], 1).double()
        if host is hosts[-1]:
            # One scale keeps the largest output the largest. The host has no other outputs to choose from.
            counts = torch.cat([layer.weight, torch.ones_like(target[:, -1:])], 1) != 0
            units_out = torch.arange(len(target))
            scales_out = _scale(rows[counts], target[counts]).expand(len(target))
        else:
            units_out, scales_out = _placed(rows, target)
        place = torch.zeros_like(host.weight, dtype=torch.bool)
        outputs, inputs = layer.weight.nonzero(as_tuple=True)
        place[units_out[outputs], units[inputs]] = True
        values = (scales_out[:, None] * target).to(host.weight)
        host.weight[units_out[outputs], units[inputs]] = values[outputs, inputs]
        host.bias[units_out] = values[:, -1]
        places.append(place)
        scales, units = scales_out, units_out
    return places, float(scales[0])


@torch.no_grad()
def _scale_up_(hosts: list[nn.Linear], places: list[Tensor], factor: float) -> None:
    """Multiplies the outputs of a planted ticket by a factor, in place. Every layer has an equal share in it."""
    share = factor ** (1 / len(hosts))
    for number, (host, place) in enumerate(zip(hosts, places, strict=True), start=1):
        host.weight[place] *= share
        host.bias[place.any(1)] *= share**number


def _placed(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """For each unit of the ticket a unit of the host, and the scale of the ticket's weights there.

    Args:
        rows: of each unit of the host, the weights by which it reads the ticket's inputs, and its bias.
        target: the same of each unit of the ticket. Its zeros, but for that of a bias, are no part of it.
    """
    free = torch.ones(len(rows), dtype=torch.bool)
    units, scales = [], []
    for wanted in target:
        counts = wanted != 0
        agree = (rows[:, counts].sign() == wanted[counts].sign()).all(1) & free
        counts[-1] = True
        cosine = rows[:, counts].abs() @ wanted[counts].abs() / rows[:, counts].norm(dim=1)  # where the signs agree
        cosine[~(agree if agree.any() else free)] = -math.inf
        unit = int(cosine.argmax())
        free[unit] = False
        units.append(unit)
        scales.append(_scale(rows[unit, counts], wanted[counts]))
    return torch.tensor(units), torch.stack(scales)


def _scale(values: Tensor, wanted: Tensor) -> Tensor:
    """The factor by which the wanted values (n,) come closest to the sizes of given ones (n,)."""
    return (values.abs() @ wanted.abs()) / wanted.square().sum()
