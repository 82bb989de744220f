"""A smaller dense network that computes the same as a masked one, and the way back to the full network."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pai_bench.analysis.channels import channel_groups, remove_dead_
from pai_bench.analysis.graph import Graph
from pai_bench.core import Mask, Shape


@dataclass(frozen=True)
class Compact:
    """A network without dead channels, and where its entries lie in the full network."""

    model: nn.Module
    places: dict[str, Tensor]  # parameters and buffers that have lost entries -> flat indices of the entries left

    def gather(self, name: str, full: Tensor) -> Tensor:
        """The entries that are left of a tensor of the full network.

        Args:
            name: the parameter or buffer to which the tensor belongs: its values, its mask, its momentum.
        """
        place = self.places.get(name)
        return full.detach().clone() if place is None else full.detach().flatten()[place]

    def scatter_(self, name: str, small: Tensor, full: Tensor) -> None:
        """Writes a tensor of the smaller network to its places in a tensor of the full one."""
        place = self.places.get(name)
        if place is None:
            full.copy_(small)
        else:
            put_(full, place, small)

    def gone(self, mask: Mask) -> dict[str, Tensor]:
        """The flat indices of the weights that a mask keeps in channels that are gone, by parameter."""
        left = {}
        for name, place in self.places.items():
            if name in mask:
                gone = mask[name].flatten().clone()
                gone[place] = False
                left[name] = gone.nonzero().squeeze(1)
        return left


def put_(tensor: Tensor, places: Tensor, values: Tensor) -> None:
    """Sets the entries of a tensor at flat indices, whatever its memory format."""
    if tensor.is_contiguous():
        tensor.view(-1)[places] = values
    else:
        whole = tensor.flatten()
        whole[places] = values
        tensor.copy_(whole.view(tensor.shape))


def compact(model: nn.Module, alive: Mask, input_shape: Shape, multiple: int = 1) -> Compact:
    """The network without its dead channels. It computes the same, in training too; analysis/channels.py says why.

    If all channels of a layer are dead, one stays.

    Args:
        alive: which entries of the parameters are not kept at zero. A missing name means all of them.
        multiple: the number of channels of a layer is rounded up to a multiple of it, by keeping dead ones.

    Raises:
        ConfigError: the network's channels cannot be traced.
    """
    small = copy.deepcopy(model)
    graph = Graph(small, input_shape)
    named = [*small.named_parameters(), *small.named_buffers()]
    full = {name: tensor.detach().clone() for name, tensor in named}
    # On the CPU, where many small operations are faster than on a GPU.
    alive = {
        name: alive[name].cpu().clone() if name in alive else torch.ones(parameter.shape, dtype=torch.bool)
        for name, parameter in small.named_parameters()
    }
    groups = list(channel_groups(graph))
    remove_dead_(groups, alive)
    # Every tensor holds its own indices while torch-pruning cuts it. Afterwards they tell what is left.
    for _, tensor in named:
        if tensor.ndim:
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
    for group in groups:
        staying = max(1, int((~group.gone).sum()))
        spare = -staying % multiple + (staying - int((~group.gone).sum()))
        group.gone[group.gone.nonzero().squeeze(1)[:spare]] = False
        if group.gone.any():
            graph.group(group.root, group.gone.nonzero().squeeze(1).tolist()).prune()
    places = {}
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        if tensor.ndim:
            place = tensor.data.long()
            tensor.data = full[name].flatten()[place]
            if place.numel() < full[name].numel():
                places[name] = place
    return Compact(small, places)
