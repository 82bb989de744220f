"""The dead channels of a masked network, and what is left of its parameters without them.

A channel is dead if it plays no part. Either nothing reads it: every weight that would read it is masked. Or it is zero
for every image: every weight that writes it is masked, and the scale and shift of every norm on its way too. A channel
that only feeds dead channels is dead. A channel that nothing feeds, but whose norm has a shift, is not dead: training
moves the shift.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pai_bench.analysis.graph import Graph, has_norm_over_channels, is_depthwise, writers_and_readers
from pai_bench.core import Mask, Shape
from pai_bench.masks import masks


@dataclass
class ChannelGroup:
    """C channels that a group of layers shares: where they are written, where they are read, and which are gone."""

    root: nn.Module
    rows: list[tuple[str, Tensor]]  # parameters that write the channels, and for each channel its n rows: (C, n)
    columns: list[tuple[str, Tensor]]  # weights that read the channels, and for each channel its n columns: (C, n)
    gone: Tensor  # (C,) bool
    shifted: bool = False  # a norm without scale and shift may move a zero

    def dead(self, alive: Mask) -> Tensor:
        """Which channels are dead: (C,) bool, given which entries of the parameters are alive."""
        unread = torch.ones_like(self.gone)
        for name, columns in self.columns:
            read = _any(alive[name].flatten(2), (0, 2)) if alive[name].ndim > 2 else _any(alive[name], 0)
            unread &= ~read[columns].any(1)
        silent = torch.full_like(self.gone, not self.shifted)
        for name, rows in self.rows:
            written = _any(alive[name].flatten(1), 1) if alive[name].ndim > 1 else alive[name]
            silent &= ~written[rows].any(1)
        return unread | silent


def _any(tensor: Tensor, dimensions: int | tuple[int, ...]) -> Tensor:
    return torch.from_numpy(tensor.numpy().any(dimensions))  # a tenth of torch's time


def channel_groups(graph: Graph) -> Iterator[ChannelGroup]:
    """Every group of channels of which some could be removed, in the order of the first layers that write them."""
    seen: set[nn.Module] = set()
    for module in list(graph.names):
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or is_depthwise(module) or module in seen:
            continue
        if module not in graph.graph.module2node:  # it lies within attention, or is not used
            continue
        group = graph.group(module)
        writers, readers = writers_and_readers(group)
        seen.update(writers)
        grouped = any(isinstance(w, nn.Conv2d) and w.groups > 1 for w in [*writers, *(r for r, _ in readers)])
        if not readers or grouped or has_norm_over_channels(group):
            continue
        number = graph.graph.get_out_channels(module)
        # Channels that are shared out among layers, as queries, keys and values are.
        if any(len(indices) % number for _, indices in group):
            continue
        channels = ChannelGroup(module, [], [], torch.zeros(number, dtype=torch.bool))
        for dependency, indices in group:
            layer = dependency.target.module
            if layer not in graph.names:
                continue
            channels.shifted |= isinstance(layer, _BatchNorm) and not layer.affine
            at = graph.by_channel(module, indices)  # in a linear layer behind a map a channel has several entries
            if dependency.handler.__name__ == "prune_in_channels":
                channels.columns.append((f"{graph.names[layer]}.weight", at))
            else:
                channels.rows += [
                    (f"{graph.names[layer]}.{key}", at) for key, _ in layer.named_parameters(recurse=False)
                ]
        yield channels


def remove_dead_(groups: list[ChannelGroup], alive: Mask) -> None:
    """Marks the dead channels as gone, and their entries in `alive` as False, until no more are found."""
    changed = True
    while changed:
        changed = False
        for group in reversed(groups):
            new = group.dead(alive) & ~group.gone
            if new.any():
                changed = True
                group.gone |= new
                for name, rows in group.rows:
                    alive[name][rows[new].flatten()] = False
                for name, columns in group.columns:
                    alive[name][:, columns[new].flatten()] = False


@dataclass(frozen=True)
class Slice:
    """The part of a parameter or buffer that is left without dead channels."""

    rows: Tensor | None = None  # indices of the first dimension that are left, int64, ascending; None: all
    columns: Tensor | None = None  # the same for the second dimension

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is left."""
        return tensor[self._index()]

    def put_(self, tensor: Tensor, part: Tensor) -> None:
        """Writes a part into its place in a tensor. The other entries stay."""
        tensor[self._index()] = part

    def clear_(self, tensor: Tensor, before: "Slice") -> None:
        """Sets the entries of a tensor to zero that an earlier slice had and this one has not."""
        for dimension, (then, now) in enumerate(((before.rows, self.rows), (before.columns, self.columns))):
            if now is not None:
                gone = torch.ones(tensor.shape[dimension], dtype=torch.bool, device=tensor.device)
                gone[now] = False
                if then is not None:
                    gone &= torch.zeros_like(gone).index_fill_(0, then, True)
                tensor.index_fill_(dimension, gone.nonzero().squeeze(1), 0)

    def shape(self, of: torch.Size) -> tuple[int, ...]:
        """The shape of the part, given the shape of the whole tensor."""
        sizes = list(of)
        for dimension, entries in enumerate((self.rows, self.columns)):
            if entries is not None:
                sizes[dimension] = len(entries)
        return tuple(sizes)

    def _index(self) -> Any:
        if self.rows is not None and self.columns is not None:
            return self.rows[:, None], self.columns
        return (slice(None), self.columns) if self.columns is not None else self.rows


class Channels:
    """The channels of a network, traced once, to ask for many masks which of them are dead.

    Raises:
        ConfigError: they cannot be traced.
    """

    def __init__(self, model: nn.Module, input_shape: Shape) -> None:
        self._groups = [group for group in channel_groups(Graph(model, input_shape)) if not group.shifted]
        self._shapes = {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._parameters = [name for name, _ in model.named_parameters()]
        self._buffers = [name for name, _ in model.named_buffers()]

    def left(self, mask: Mask) -> dict[str, Slice]:
        """What is left of parameters and buffers without dead channels. Of a name that is missing all is left.

        Args:
            mask: of the prunable weights. All other parameters count as alive, whatever their values.
        """
        for group in self._groups:
            group.gone.zero_()
        alive = {name: torch.ones(self._shapes[name][:2], dtype=torch.bool) for name in self._parameters}
        alive |= {name: masks.connected(kept).cpu().clone() for name, kept in mask.items()}
        remove_dead_(self._groups, alive)
        stays: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})  # of rows and of columns
        for group in self._groups:
            group.gone[group.gone.nonzero().squeeze(1)[: int(group.gone.all())]] = False  # one stays
            if not group.gone.any():
                continue
            for dimension, entries in enumerate((group.rows, group.columns)):
                for name, at in entries:
                    size = self._shapes[name][dimension]
                    part = stays[dimension].setdefault(name, torch.ones(size, dtype=torch.bool))
                    part[at[group.gone].flatten()] = False
        for name in self._buffers:  # running statistics go with the scale of their norm
            scale = f"{name.rpartition('.')[0]}.weight"
            if scale in stays[0] and self._shapes[name] == self._shapes[scale]:
                stays[0][name] = stays[0][scale]
        device = next(iter(mask.values())).device
        rows, columns = (
            {name: part.nonzero().squeeze(1).to(device) for name, part in parts.items()} for parts in stays
        )
        return {name: Slice(rows.get(name), columns.get(name)) for name in rows | columns}
