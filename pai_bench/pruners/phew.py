"""PHEW: paths with higher edge weights, found by random walks through the network, without data."""

import torch
from torch import Generator, Tensor, nn

from pai_bench.analysis import walk
from pai_bench.analysis.walk import Step
from pai_bench.core import Batches, Count, Loss, Scores, Subnetwork
from pai_bench.errors import ConfigError
from pai_bench.masks import masks


def score(
    net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, kernels: bool, batch_size: Count
) -> Scores:
    """The earlier a random walk takes a weight, the higher its score. Weights that no walk takes follow by magnitude.

    Walks go forward from an input channel and backward from an output, by turns, and start at each unit in turn. At
    every layer a walk chooses the next unit in proportion to the sum of |w| of the kernel between the two units, and a
    weight of that kernel in proportion to |w|. It takes no identity shortcut, and at any other branch one of the
    branches at random. Walks end when they have taken as many weights as the round keeps.

    Args:
        kernels: whether a walk takes the whole kernel, and not one weight of it.
        batch_size: the number of walks that are drawn at once.

    Raises:
        ConfigError: the channels of the network cannot be followed.

    Reference: Patil and Dovrolis 2021, arXiv:2010.11354.
    Deviates: in the released code a walk forwards that takes a projection leaves out the last convolution of the block
        before it. Here it does not. The number kept is exact, so the last walk may be cut short: the first of its
        weights in parameter order stay, and up to L - 1 of them, of L layers, may lie on no path. Beside gates and at
        the borders of small maps there may be more, because a walk does not see those. The authors keep the last walk
        whole. Walks also end when they find hardly any new weights, as at low sparsity. Then the rest is
        kept by magnitude.
    """
    num_kept = net.num_kept()
    _check_layers(net)
    way = walk.steps(net.model, net.input_shape)
    # Walks pass layers that are not pruned, too.
    sizes = {name: weight.detach().abs().cpu() for name, weight in masks.prunable(net.model).items()}
    taken = {name: torch.full((size.numel(),), torch.inf, dtype=torch.float64) for name, size in sizes.items()}
    tables = {step.weight: _Table(sizes[step.weight], step.groups) for step in way if step.weight is not None}
    number, before = 0, -num_kept
    while True:
        backward = number % 2 == 1
        walks = torch.arange(number // 2 * batch_size, (number // 2 + 1) * batch_size)
        _walk(way, tables, sizes, taken, walks, 2 * walks.double() + backward, backward, kernels, generator)
        number += 1
        reached = int(sum(taken[name].isfinite().sum() for name in net.mask))
        # Walks of both directions alternate in time, so a batch of one alone would be half of a turn. If a turn finds
        # hardly any new weights, the others lie on paths too rare to wait for.
        if backward and (reached >= num_kept or reached - before < 1e-3 * num_kept):
            break
        if backward:
            before = reached
    last = max(float(times[times.isfinite()].max()) for times in taken.values() if times.isfinite().any())
    largest = max(float(size.max()) for size in sizes.values())
    scores = {}
    for name in net.mask:
        size = sizes[name]
        # Weights that a walk took score above 1, the others below.
        walked = 2 + last - taken[name].view(size.shape)
        scores[name] = torch.where(walked.isfinite(), walked, 0.5 * size.double() / largest).to(net.mask[name].device)
    return scores


def _check_layers(net: Subnetwork) -> None:
    """Refuses layers that a walk would pass without taking a weight of theirs."""
    for name in net.mask:
        layer = net.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise ConfigError(
                f"pruner=phew: no walk goes through {name} ({type(layer).__name__}), only through Conv2d and Linear; "
                "choose another pruner, or leave the layer out"
            )


class _Table:
    """The probabilities of the next unit at a layer, in both directions, as running sums."""

    def __init__(self, size: Tensor, groups: int) -> None:
        between = size.flatten(2).sum(2) if size.ndim > 2 else size  # (O, I / groups)
        self.groups, (self.num_out, self.per_group) = groups, between.shape
        self.num_in = groups * self.per_group
        self.backward = between.double().cumsum(1)  # given an output, over the inputs of its group
        grouped = between.double().view(groups, -1, self.per_group)
        self.forward = grouped.transpose(1, 2).reshape(groups * self.per_group, -1).cumsum(1)  # given an input
        self.kernel = size.double().flatten(2).cumsum(2) if size.ndim > 2 else None

    def step(self, units: Tensor, backward: bool, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The next unit of every walk, and the weight that it passes: its output, and its input within the group."""
        per_out = self.num_out // self.groups
        if backward:
            chosen = _choose(self.backward[units], generator)
            return units // per_out * self.per_group + chosen, units, chosen
        chosen = _choose(self.forward[units], generator) + units // self.per_group * per_out
        return chosen, chosen, units % self.per_group


def _choose(cumulative: Tensor, generator: Generator) -> Tensor:
    """An index for every row of running sums (B, n), drawn in proportion to the terms of the sum."""
    at = torch.rand(len(cumulative), 1, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp_max(cumulative.shape[1] - 1)


def _walk(
    way: list[Step],
    tables: dict[str, _Table],
    sizes: dict[str, Tensor],
    taken: dict[str, Tensor],
    walks: Tensor,
    times: Tensor,
    backward: bool,
    kernels: bool,
    generator: Generator,
) -> None:
    """Walks through the network, and writes into `taken` the time of the first walk that takes a weight."""
    starts = [i for i, step in enumerate(way) if not (step.outputs if backward else step.inputs)]
    # step -> the walks that arrive: their times, their units, and the number of units to choose from
    at: dict[int, list[tuple[Tensor, Tensor, int]]] = {i: [] for i in range(len(way))}
    for place, start in enumerate(starts):
        mine = slice(place, None, len(starts))
        table = tables[str(way[start].weight)]
        width = table.num_out if backward else table.num_in
        at[start].append((times[mine], walks[mine] // len(starts) % width, width))  # each unit in turn
    for i in reversed(range(len(way))) if backward else range(len(way)):
        step, arriving = way[i], at.pop(i)
        if not arriving:
            continue
        width = max(of for _, _, of in arriving)
        now = torch.cat([when for when, _, _ in arriving])
        units = torch.cat([_fit(units, of, width, generator) for _, units, of in arriving])
        if step.weight is not None:
            table = tables[step.weight]
            units = _fit(units, width, table.num_out if backward else table.num_in, generator)
            sums = (table.backward if backward else table.forward)[units, -1]
            now, units = now[sums > 0], units[sums > 0]  # an earlier round has pruned the others' ways
            units, outputs, inputs = table.step(units, backward, generator)
            flat = outputs * table.per_group + inputs
            if table.kernel is not None:
                area = table.kernel.shape[2]
                if kernels:
                    flat = (flat[:, None] * area + torch.arange(area)).flatten()
                else:
                    flat = flat * area + _choose(table.kernel[outputs, inputs], generator)
            repeated = now.repeat_interleave(len(flat) // len(now)) if len(now) else now
            taken[step.weight].scatter_reduce_(0, flat, repeated, "amin")
            width = table.num_in if backward else table.num_out
        onward = step.inputs if backward else step.outputs
        if onward:
            branch = torch.randint(len(onward), now.shape, generator=generator)
            for number, other in enumerate(onward):
                at[other].append((now[branch == number], units[branch == number], width))


def _fit(units: Tensor, width: int, size: int, generator: Generator) -> Tensor:
    """Units among `width` of one layer as units among `size` of the next.

    At a flattened map the numbers differ. Forward, a channel is several units, and one of them is drawn. Backward, a
    unit lies in one channel.
    """
    if size > width:
        factor = size // width
        return units * factor + torch.randint(factor, units.shape, generator=generator)
    return units // (width // size)
