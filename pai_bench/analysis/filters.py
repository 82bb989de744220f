"""The filters of a network: which can be pruned, what their scores are, and what is pruned with them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pai_bench.analysis.graph import Graph, has_norm_over_channels, is_depthwise, writers_and_readers
from pai_bench.core import Mask, Reduction, Scores, Shape
from pai_bench.errors import ConfigError
from pai_bench.masks import masks


@dataclass(frozen=True)
class Layer:
    """The filters of one convolution, and the parameters that hold slices for each of them."""

    num_filters: int
    # Norms, biases and depthwise kernels -> (O, n): for each filter, its n entries in the first dimension.
    slices: dict[str, Tensor]
    # Weights that read the filters' channels -> (O, n): for each filter, its n input channels.
    readers: dict[str, Tensor]


@dataclass(frozen=True)
class Filters:
    """The filters of a network that structured pruning ranks, by the name of their convolution's weight.

    A mask of filters has a tensor (O,) for each of these convolutions.
    """

    layers: dict[str, Layer]

    def full(self, like: Mask) -> Mask:
        """The mask of filters that keeps all of them.

        Args:
            like: a mask of weights, for shapes and the device.
        """
        return {
            name: torch.ones(like[name].shape[0], dtype=torch.bool, device=like[name].device) for name in self.layers
        }

    def reduce(self, scores: Scores, how: Reduction) -> Scores:
        """The scores of the filters (O,), from the scores of their weights (O, I, H, W)."""
        return {name: _REDUCTIONS[how](scores[name].flatten(1)) for name in self.layers}

    def expand(self, model: nn.Module, units: Mask) -> Mask:
        """The mask of parameters that keeps these filters: of the prunable weights, and of norms and biases.

        What is pruned with a filter: its norm (or the shift would leak into the next layer), the depthwise kernel
        behind it, and the weights that read its channel. If the channel is a sum to which others contribute, the
        weights that read it stay.
        """
        parameters = dict(model.named_parameters())
        mask = masks.full(model)
        for name, layer in self.layers.items():
            gone = (~units[name]).nonzero().squeeze(1)
            mask[name][gone] = False
            for other, entries in layer.slices.items():
                if other not in mask:
                    mask[other] = torch.ones_like(parameters[other], dtype=torch.bool)
                mask[other][entries[gone.to(entries.device)]] = False
            for reader, columns in layer.readers.items():
                read, width = columns[gone.to(columns.device)].flatten(), mask[reader].shape[1]
                groups = getattr(model.get_submodule(reader.rpartition(".")[0]), "groups", 1)
                by_group = mask[reader].view(groups, -1, *mask[reader].shape[1:])
                by_group[read // width, :, read % width] = False
        return mask


_REDUCTIONS = {
    "sum": lambda scores: scores.sum(1),
    "abs_sum": lambda scores: scores.sum(1).abs(),
    "l2": lambda scores: torch.linalg.vector_norm(scores, dim=1),
    "max": lambda scores: scores.amax(1),
}


def find_filters(model: nn.Module, input_shape: Shape) -> Filters:
    """The filters of every convolution that can be pruned one by one.

    Left out are depthwise convolutions (they go with the filter before them), grouped convolutions, filters that run
    into a norm over channels (layer norm), and the stem of a residual network. The output of some filters is added to
    other channels: in the last convolution of a residual block, and in a projection shortcut. Such a filter is masked
    alone: the sum and its readers stay.

    Raises:
        ConfigError: the network's channels cannot be traced.

    Reference: Lubana and Dick 2021, arXiv:2009.11839, and their released code.
    """
    graph = Graph(model, input_shape)
    layers: dict[str, Layer] = {}
    first = True
    for module, name in graph.names.items():
        if not isinstance(module, nn.Conv2d):
            continue
        is_first, first = first, False
        if module.groups > 1 or module not in graph.graph.module2node:
            continue
        group = graph.group(module)
        writers, readers = writers_and_readers(group)
        shared = len(writers) > 1
        if not readers or (shared and is_first) or has_norm_over_channels(group):
            continue
        slices = {f"{name}.bias": torch.arange(module.out_channels)[:, None]} if module.bias is not None else {}
        followers = set(graph.following(module))
        for dependency, indices in group:
            follower = dependency.target.module
            # A norm behind a sum belongs to the other summands too.
            if follower in followers or (not shared and (isinstance(follower, _BatchNorm) or is_depthwise(follower))):
                at = graph.names[follower]
                entries = graph.by_channel(module, indices)  # several behind a flattened map
                slices |= {f"{at}.{key}": entries for key, _ in follower.named_parameters(recurse=False)}
        columns = {}
        if not shared:
            for reader, indices in readers:
                # A flattened map gives every channel several columns, next to each other.
                entries = graph.by_channel(module, indices)
                if isinstance(reader, nn.Linear):
                    graph.check_flattening(module, reader, entries, input_shape)
                columns[f"{graph.names[reader]}.weight"] = entries
        layers[f"{name}.weight"] = Layer(module.out_channels, slices, columns)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no filters that can be pruned; prune weights instead of filters")
    return Filters(layers)
