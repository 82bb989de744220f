"""NPB: node-path balancing, which weighs the number of live channels against the number of paths, without data."""

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from pai_bench.analysis import paths
from pai_bench.analysis.norm_statistics import uses_batch_statistics
from pai_bench.core import (
    Batches,
    Count,
    Fraction,
    Loss,
    Mask,
    NonNegative,
    Scores,
    Selection,
    Shape,
    Subnetwork,
    Weights,
)
from pai_bench.errors import UserError
from pai_bench.masks import allocation, masks
from pai_bench.masks.layers import groups, turned


def score(
    net: Subnetwork,
    batches: Batches,
    loss: Loss,
    generator: Generator,
    *,
    densities: Literal["erk", "uniform"],
    alpha: Fraction,
    beta: NonNegative,
    max_per_kernel: Count,
) -> Scores:
    """Above 1 for the weights that node-path balancing chooses, below 1 for the others; at random within both.

    As many are chosen as the round keeps, layer by layer in module order. The places of a layer's n weights maximise
    alpha A / (I + O) + (1 - alpha) B / Bmax + beta K / n. A is the number of input and output channels that have a
    weight, of I and O. B is the sum over weights of the paths that reach their input channel, Bmax its largest value. K
    is the number of kernels that have a weight. The positions within a kernel are random. In the end, weights on no
    path move to where they are on one.

    Args:
        densities: of the layers, as in the allocations of these names.
        alpha: between paths (0) and channels (1).
        beta: how much kernels with a weight count. In linear layers it is 0.
        max_per_kernel: the most weights in a kernel, except in the first layer of the network, and where a layer's
            weights do not fit.

    Raises:
        UserError: the number of paths overflows; train mode.

    Reference: Pham et al. 2023, Towards Data-Agnostic Pruning At Initialization: What Makes a Good Sparse Mask?
        (NeurIPS 2023, OpenReview xdOoCWCYaY), and the released code; Evci et al. 2020, arXiv:1911.11134, for densities.
    Deviates: the maximum is found exactly, by taking the weights with the largest gain one after another; their code
        has an integer program for 32 output channels at a time. The number kept is exact. Weights on no path move to
        full kernels as in their code, and then to other kernels between live channels. Inputs that no path reaches get
        weights last. max_per_kernel stays the same along the network.
    """
    if uses_batch_statistics(net.model):
        raise UserError("pruner.mode=train: paths are those of weights, without statistics; set pruner.mode=eval")
    keep = net.num_kept()
    by_size = allocation.uniform if densities == "uniform" else _erk
    candidates = turned(net.model, net.mask)
    device = next(iter(candidates.values())).device
    whole = {name: torch.ones(kept.shape, device=device) for name, kept in candidates.items()}
    budget = {name: masks.count(kept) for name, kept in by_size(whole, candidates, keep, generator).mask.items()}
    values = masks.prunable(net.model)
    weights: Weights = {name: torch.ones_like(weight).detach() for name, weight in values.items()}
    weights |= {name: kept.to(weights[name].dtype) for name, kept in net.mask.items()}
    first = next(iter(values))  # of the network, whether or not it is pruned
    layers, chosen = {}, {}
    for name, candidate in candidates.items():
        paths_in = _paths_into(net.model, net.input_shape, weights, name)
        layers[name] = Layer.of(candidate.cpu(), paths_in, groups(net.model, name))
        limit = candidate[0, 0].numel() if name == first else max_per_kernel
        counts = _balanced(layers[name], budget[name], alpha, 0.0 if candidate.ndim == 2 else beta, limit)
        chosen[name] = _placed(candidate.cpu(), counts, generator)
        weights |= {key: kept.to(weights[key]) for key, kept in turned(net.model, {name: chosen[name]}).items()}
    mask = turned(net.model, {name: kept.to(device) for name, kept in chosen.items()})
    reached = paths.effective(net.model, mask, net.input_shape)
    on_paths = None if reached is None else turned(net.model, reached)
    scores = {}
    for name, kept in chosen.items():
        if on_paths is not None:
            kept = _refilled(kept, on_paths[name].cpu(), candidates[name].cpu(), layers[name])
        noise = torch.rand(kept.shape, dtype=torch.float64, generator=generator)
        scores[name] = (noise + kept).to(device)
    return turned(net.model, scores)


def _erk(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
    return allocation.erk(scores, candidates, keep, generator, kernel=True)


# One layer ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The kernels of a layer, from input channels to output channels.

    A convolution in groups has the kernels of each group.
    """

    room: Tensor  # (O, I) int64: weights that a kernel could keep; I are the inputs of a group
    paths: Tensor  # (G, I) float64: paths that reach each input channel

    @classmethod
    def of(cls, candidate: Tensor, into: Tensor, groups: int) -> "Layer":
        """The layer of a mask of candidates (O, I, ...), and the paths into each input (G I,)."""
        room = candidate.flatten(2).sum(2) if candidate.ndim > 2 else candidate.long()
        return cls(room, into.view(groups, -1))

    @property
    def per_group(self) -> int:
        """Output channels of a group."""
        return len(self.room) // len(self.paths)


def _balanced(layer: Layer, number: int, alpha: float, beta: float, limit: int) -> Tensor:
    """The weights in each kernel (O, I) int64, `number` in all, at the maximum that `score` describes.

    Without weights that are pruned already it is the exact maximum: gains never grow, and kernels of one input channel
    are alike. Of equal gains the first input channel has precedence.

    Args:
        limit: the most weights in a kernel. If they do not fit, it grows until they do.
    """
    room = layer.room.clamp(max=limit)
    while int(room.sum()) < number:
        limit += 1
        room = layer.room.clamp(max=limit)
    spread, stacked = _units(layer, room, number, alpha, beta)
    counts = torch.zeros_like(room)
    size = layer.per_group
    for group, of_input in sorted(spread, key=lambda at: (-float(layer.paths[at]), at)):
        rows = slice(group * size, (group + 1) * size)
        column, free = counts[rows, of_input], room[rows, of_input]
        load = counts[rows].sum(1)
        # Outputs with the fewest weights come first, so all get one as long as there are weights.
        open_rows = (free > 0).nonzero().flatten()
        column[open_rows[load[open_rows].sort(stable=True).indices[: spread[group, of_input]]]] = 1
        left = stacked.get((group, of_input), 0)
        while left:
            open_rows = (column < free).nonzero().flatten()
            at = open_rows[column[open_rows].sort(stable=True).indices[:left]]
            column[at] += 1
            left -= len(at)
    return counts


def _units(
    layer: Layer, room: Tensor, number: int, alpha: float, beta: float
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """For each group and input: the kernels that get a weight, and the further weights in these kernels."""
    size, (groups, inputs) = layer.per_group, layer.paths.shape
    per_channel, per_kernel = alpha / (groups * inputs + len(room)), beta / max(number, 1)
    of_path = (1 - alpha) / max(_most_paths(layer, room, number), 1e-300)
    outputs = [0] * groups  # that have a weight, at most
    spread: dict[tuple[int, int], int] = {}
    stacked: dict[tuple[int, int], int] = {}
    # Three blocks for each input: its first kernel, its other kernels, and further weights in them.
    heap: list[tuple[float, int, int, int, float, int]] = []
    for group in range(groups):
        rooms = room[group * size : (group + 1) * size]
        for of_input in range(inputs):
            kernels, total = int((rooms[:, of_input] > 0).sum()), int(rooms[:, of_input].sum())
            of_paths = of_path * float(layer.paths[group, of_input])
            gains = (per_channel + per_kernel + of_paths, per_kernel + of_paths, of_paths)
            for kind, units in enumerate((min(kernels, 1), kernels - 1, total - kernels)):
                reached = of_paths > 0 or alpha == 1
                gain = gains[kind] if reached else gains[kind] - 1e3  # a dead input comes last
                if units > 0:
                    extra = per_channel if kind < 2 else 0.0
                    heap.append((-(gain + extra), kind, group, of_input, gain, units))
    heapq.heapify(heap)
    while number and heap:
        before, kind, group, of_input, gain, units = heapq.heappop(heap)
        fresh = kind < 2 and outputs[group] < size
        now = gain + per_channel * fresh
        if now < -before:  # all outputs have a weight by now
            heapq.heappush(heap, (-now, kind, group, of_input, gain, units))
            continue
        taken = min(units, number, size - outputs[group] if fresh else units)
        chosen = spread if kind < 2 else stacked
        chosen[group, of_input] = chosen.get((group, of_input), 0) + taken
        outputs[group] += taken if fresh else 0
        number -= taken
        if taken < units:
            heapq.heappush(heap, (before, kind, group, of_input, gain, units - taken))
    return spread, stacked


def _most_paths(layer: Layer, room: Tensor, number: int) -> float:
    """The largest sum of paths that so many weights can have."""
    capacity = room.view(len(layer.paths), layer.per_group, -1).sum(1).flatten()
    order = layer.paths.flatten().sort(descending=True, stable=True)
    before = capacity[order.indices].cumsum(0) - capacity[order.indices]
    taken = torch.minimum(capacity[order.indices], (number - before).clamp(min=0))
    return float((order.values * taken).sum())


def _placed(candidate: Tensor, counts: Tensor, generator: Generator) -> Tensor:
    """The mask of a layer that keeps as many random candidates of each kernel as `counts` says."""
    values = torch.rand(candidate.shape, dtype=torch.float64, generator=generator)
    of_kernels = torch.where(candidate, values, -1.0).view(*candidate.shape[:2], -1)
    rank = of_kernels.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    return (rank < counts[:, :, None]).view(candidate.shape)


def _refilled(kept: Tensor, reached: Tensor, candidate: Tensor, layer: Layer) -> Tensor:
    """The mask of a layer whose weights on no path have moved to where they are on one. Their number stays.

    They fill the kernels that have most weights, then other kernels between channels with weights, those with most
    paths first. Only weights for which there is no room stay where they are.

    Args:
        reached: the weights on a path.
        candidate: the weights that may be kept.
    """
    lost = masks.count(kept) - masks.count(reached)
    if lost == 0:
        return kept
    number = reached.flatten(2).sum(2) if reached.ndim > 2 else reached.long()  # (O, I)
    of_group = number.view(len(layer.paths), layer.per_group, -1)
    live = (of_group.any(2)[:, :, None] & of_group.any(1)[:, None]).view(number.shape)
    into = layer.paths.repeat_interleave(layer.per_group, 0)
    # Kernels with weights by their number, then empty ones by their paths; what stays in the end comes last.
    worth = torch.where(number > 0, 2.0 + number, into.clamp(max=1.0))
    order = torch.where(live, worth, -1.0).view(*number.shape, *[1] * (kept.ndim - 2)).expand(kept.shape)
    order = torch.where(kept & (order < 0), -0.5, order)
    order = torch.where(candidate & ~reached, order, -torch.inf)
    moved = reached.clone().flatten()
    moved[order.flatten().sort(descending=True, stable=True).indices[:lost]] = True
    return moved.view(kept.shape)


# Paths ----------------------------------------------------------------------------------------------------------------


class _WithoutNorms(TorchFunctionMode):
    """Takes norms out of a pass. A batch norm with running statistics stays: all of these divide by the same number."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        name = getattr(function, "__name__", "")
        if name not in paths.NORMS:
            return function(*args, **named)
        of_the_batch = named.get("training", args[5] if len(args) > 5 else False)
        if name == "batch_norm" and not of_the_batch:
            return function(*args, **named)
        return args[0] if args else named["input"]


def _paths_into(model: nn.Module, input_shape: Shape, weights: Weights, name: str) -> Tensor:
    """The paths that reach each input channel of a layer, at all positions together: float64 on the CPU.

    They are what an image of ones becomes in the network with these weights, without biases and norms. A layer that is
    never called by itself, as within attention, has one for each input.

    Raises:
        UserError: they overflow, or an input of the layer has other channels than its weight.
    """
    values = {}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = key.rpartition(".")[2]
        zero = leaf == "bias" or leaf == "running_mean"
        values[key] = torch.zeros_like(tensor) if zero else torch.ones_like(tensor)
    seen: list[Tensor] = []
    module = model.get_submodule(name.rpartition(".")[0])
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    like = next(model.parameters())
    try:
        with torch.no_grad(), _WithoutNorms():
            torch.func.functional_call(model, values | weights, (like.new_ones((1, *input_shape)),))
    finally:
        hook.remove()
    weight = turned(model, {name: weights[name]})[name]
    number, dimension = weight.shape[1] * groups(model, name), 1 - weight.ndim
    if not seen:
        return torch.ones(number, dtype=torch.float64)
    totals = [image.movedim(dimension, -1).flatten(0, -2).double().sum(0) for image in seen]
    if (other := next((total for total in totals if len(total) != number), None)) is not None:
        raise UserError(
            f"pruner=npb: an input of {name} has {len(other)} channels, and its weight is for {number}; choose another "
            "pruner, or leave the layer out (prunable=)"
        )
    found = torch.stack(totals).sum(0).clamp(min=0).cpu()
    if not found.isfinite().all():
        raise UserError(f"NPB: the number of paths into {name} overflows {like.dtype}; set pruner.dtype=float64")
    # In single precision, so that what is equal stays equal however a convolution sums up.
    return (found / found.max().clamp(min=1e-300)).float().double()
