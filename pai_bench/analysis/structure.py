"""Weights and filters: which filters can go, what goes with them, and the smaller network that is left."""

import copy
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from pai_bench.core import Mask, Reduction, Scores, Shape
from pai_bench.errors import ConfigError
from pai_bench.masks import masks


@dataclass(frozen=True)
class Layer:
    """The filters of one convolution, and the parameters that hold one slice for each of them."""

    num_filters: int
    slices: dict[
        str, Tensor
    ]  # norms, biases, depthwise kernels -> (O,): the entry of each filter in the first dimension
    readers: dict[str, Tensor]  # weights that read the filters' channels -> (O, n): the n input channels of each


@dataclass(frozen=True)
class Filters:
    """The filters of a network that structured pruning ranks, by the name of their convolution's weight."""

    layers: dict[str, Layer]

    def full(self, like: Mask) -> Mask:
        """Every filter kept: one bool for each, (O,), by layer."""
        return {
            name: torch.ones(like[name].shape[0], dtype=torch.bool, device=like[name].device) for name in self.layers
        }

    def reduce(self, scores: Scores, how: Reduction) -> Scores:
        """Scores of the weights (O, I, H, W) -> scores of the filters (O,)."""
        return {name: _REDUCTIONS[how](scores[name].flatten(1)) for name in self.layers}

    def expand(self, model: nn.Module, units: Mask) -> Mask:
        """What is masked when these filters are kept: the prunable weights, and norms and biases that go with them.

        A pruned filter takes its norm along (its shift would leak into the next layer), the depthwise kernel that
        follows it, and the weights that read it, unless the channel is a sum that others contribute to.
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


_LOOKS = 20  # at the dependencies of a node, on average; DenseNet-121 takes 3, ResNeSt-14 takes 6 and half a minute


def _torch_pruning() -> ModuleType:
    """The library, without timm: it wants only its layers' counters, and to import that takes two seconds.

    Raises:
        ConfigError: it is not installed.
    """
    hidden = "torch_pruning" not in sys.modules and "timm" not in sys.modules
    if hidden:
        sys.modules["timm"] = None  # type: ignore[assignment]  # to import it fails, which the library expects
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        if error.name != "torch_pruning":
            raise
        raise ConfigError(
            "channels are followed by torch-pruning, which is not installed: pip install torch-pruning, or choose a "
            "pruner of single weights (PHEW and filters need it)"
        ) from error
    finally:
        if hidden:
            del sys.modules["timm"]


class _Bounded(list[Any]):
    """The dependencies of a node, which may be looked at only so often: some searches would not come to an end."""

    def __init__(self, dependencies: list[Any], graph: "_Graph") -> None:
        super().__init__(dependencies)
        self._graph = graph

    def __iter__(self) -> Iterator[Any]:
        self._graph.steps_left -= 1
        if self._graph.steps_left < 0:
            raise _EndlessError("the search for what goes with a channel does not come to an end")
        return super().__iter__()


class _EndlessError(Exception):
    """Channels are split and joined in rings."""


class _Graph:
    """The channels of a network: which convolutions write them and which weights read them (by torch-pruning)."""

    def __init__(self, model: nn.Module, input_shape: Shape) -> None:
        tp = _torch_pruning()
        self.model, self.steps_left = model, sys.maxsize
        self.names = {module: name for name, module in model.named_modules()}
        parameter = next(model.parameters())
        image = torch.zeros((1, *input_shape), device=parameter.device, dtype=parameter.dtype)
        was_training = {module: module.training for module in model.modules()}
        wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            with _disable_current_modes():  # tracing is no work of a score that is being counted
                self.graph = tp.DependencyGraph().build_dependency(model.eval(), example_inputs=image, verbose=False)
        except Exception as error:
            raise self._untraceable(error) from error
        finally:
            for module, training in was_training.items():
                module.training = training
            for parameter, wants in wanted.items():
                parameter.requires_grad_(wants)
        for node in self.graph.module2node.values():
            node.dependencies = _Bounded(node.dependencies, self)

    def _untraceable(self, error: Exception) -> ConfigError:
        reason = str(error) if isinstance(error, _EndlessError) else f"{type(error).__name__}: {error}"
        return ConfigError(
            f"the channels of {type(self.model).__name__} cannot be traced ({reason}); prune weights instead of filters"
        )

    def group(self, module: nn.Module, channels: list[int] | None = None) -> Any:
        """The group of layers that share the output channels of a module."""
        chosen = list(range(self.graph.get_out_channels(module))) if channels is None else channels
        handler = self.graph.get_pruner_of_module(module).prune_out_channels
        self.steps_left = _LOOKS * len(self.graph.module2node)
        try:
            return self.graph.get_pruning_group(module, handler, chosen)
        except Exception as error:
            raise self._untraceable(error) from error
        finally:
            self.steps_left = sys.maxsize

    def by_channel(self, module: nn.Module, indices: Sequence[int]) -> Tensor:
        """Entries that go with the output channels of a module: (channels, entries of each)."""
        number = self.graph.get_out_channels(module)
        if len(indices) % number:
            raise ConfigError(
                f"{self.names[module]} of {type(self.model).__name__} shares its channels out among layers, which "
                "cannot be followed; prune weights instead of filters"
            )
        return torch.tensor(list(indices)).view(number, -1)

    def following(self, module: nn.Module) -> Iterator[nn.Module]:
        """The norms and depthwise convolutions that a convolution's output runs through before it meets another."""
        node, seen = self.graph.module2node[module], set()
        while node not in seen and len(node.outputs) == 1 and len(node.outputs[0].inputs) == 1:
            seen.add(node)
            node = node.outputs[0]
            if isinstance(node.module, _BatchNorm) or _depthwise(node.module):
                yield node.module
            elif node.module in self.names:  # a layer that mixes channels
                return


def _depthwise(module: object) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.out_channels == module.in_channels > 1


def _norms_over_channels(group: Any) -> bool:
    """Whether a group runs into a norm that mixes channels, so that one that is zero changes the others."""
    for dependency, _ in group:
        module = dependency.target.module
        known = not isinstance(module, nn.Module) or isinstance(module, (nn.Conv2d, nn.Linear, _BatchNorm))
        if not known and next(module.parameters(recurse=False), None) is not None:
            return True
    return False


def _writers_and_readers(group: Any) -> tuple[list[nn.Module], list[tuple[nn.Module, list[int]]]]:
    """The layers of a group that write its channels, and those that read them, with the columns."""
    writers: list[nn.Module] = []
    readers: list[tuple[nn.Module, list[int]]] = []
    for dependency, indices in group:
        module = dependency.target.module
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not _depthwise(module):
            if dependency.handler.__name__ == "prune_in_channels":
                readers.append((module, list(indices)))
            else:
                writers.append(module)
    return writers, readers


def filters(model: nn.Module, input_shape: Shape) -> Filters:
    """The filters of every convolution that can be pruned one by one.

    Not among them: depthwise and grouped convolutions (the former go with the filter that they follow), filters that
    run into a norm over channels (layer norm), and the stem of a residual network. A filter whose output is added to
    other channels (the last of a residual block, or a projection shortcut) is masked alone: the sum stays, and its
    readers.

    Raises:
        ConfigError: the network's channels cannot be traced.

    Reference: Lubana and Dick 2021, arXiv:2009.11839, and their released code.
    """
    graph = _Graph(model, input_shape)
    layers: dict[str, Layer] = {}
    first = True
    for module, name in graph.names.items():
        if not isinstance(module, nn.Conv2d):
            continue
        is_first, first = first, False
        if module.groups > 1 or module not in graph.graph.module2node:
            continue
        group = graph.group(module)
        writers, readers = _writers_and_readers(group)
        shared = len(writers) > 1
        if not readers or (shared and is_first) or _norms_over_channels(group):
            continue
        slices = {f"{name}.bias": torch.arange(module.out_channels)} if module.bias is not None else {}
        followers = set(graph.following(module))
        for dependency, indices in group:
            follower = dependency.target.module
            # Behind a sum the norm belongs to the others, too.
            if follower in followers or (not shared and (isinstance(follower, _BatchNorm) or _depthwise(follower))):
                at = graph.names[follower]
                entries = graph.by_channel(module, indices).flatten()
                slices |= {f"{at}.{key}": entries for key, _ in follower.named_parameters(recurse=False)}
        columns = {}
        if not shared:
            for reader, indices in readers:
                # A flattened map gives every channel several columns, next to each other.
                columns[f"{graph.names[reader]}.weight"] = graph.by_channel(module, indices)
        layers[f"{name}.weight"] = Layer(module.out_channels, slices, columns)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no filters that can be pruned; prune weights instead of filters")
    return Filters(layers)


@dataclass(frozen=True)
class Compact:
    """A network without the channels that play no part, and where its entries lie in the full network."""

    model: nn.Module
    places: dict[str, Tensor]  # parameters and buffers of which some entries are gone -> flat indices of the others

    def gather(self, name: str, full: Tensor) -> Tensor:
        """The entries of a tensor of the full network, one for each of a parameter or buffer, that are left."""
        place = self.places.get(name)
        return full.detach().clone() if place is None else full.detach().flatten()[place]

    def scatter_(self, name: str, small: Tensor, full: Tensor) -> None:
        """Writes entries of the smaller network to their places in a tensor of the full one."""
        place = self.places.get(name)
        if place is None:
            full.copy_(small)
        else:
            put_(full, place, small)

    def gone(self, mask: Mask) -> dict[str, Tensor]:
        """Flat indices of what a mask keeps in channels that are gone."""
        left = {}
        for name, place in self.places.items():
            if name in mask:
                gone = mask[name].flatten().clone()
                gone[place] = False
                left[name] = gone.nonzero().squeeze(1)
        return left


def put_(tensor: Tensor, places: Tensor, values: Tensor) -> None:
    """Sets entries of a tensor at flat indices, whatever its memory format."""
    if tensor.is_contiguous():
        tensor.view(-1)[places] = values
    else:
        whole = tensor.flatten()
        whole[places] = values
        tensor.copy_(whole.view(tensor.shape))


@dataclass
class _Channels:
    """The channels that a group of layers shares: where they are written and read."""

    root: nn.Module
    rows: list[tuple[str, Tensor]]  # parameters with a slice for each channel, and the slices of each: (C, n)
    columns: list[tuple[str, Tensor]]  # weights that read the channels, and the columns of each: (C, n)
    gone: Tensor  # (C,) bool
    shifted: bool = False  # by a norm that has no scale and shift to be zero

    def idle(self, alive: Mask) -> Tensor:
        """Which channels nothing reads, or hold zero for every image: (C,) bool."""
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
    return torch.from_numpy(tensor.numpy().any(dimensions))  # a tenth of the time of torch's


def compact(model: nn.Module, alive: Mask, input_shape: Shape, multiple: int = 1) -> Compact:
    """A smaller dense network that computes the same, in training too, without the channels that play no part.

    A channel plays none if nothing reads it: every weight that would is masked. Or if it holds zero for every image:
    every weight that writes it is masked, and with it the scale and shift of every norm on its way. What only feeds a
    channel that is gone goes with it. A channel that nothing feeds but whose norm has a shift stays: training moves it.
    One channel stays where all of a layer could go.

    Args:
        alive: which entries of the parameters are not held at zero; all, of a parameter that is not named.
        multiple: of which the number of channels that stay is to be, idle ones among them if need be.

    Raises:
        ConfigError: the network's channels cannot be traced.
    """
    small = copy.deepcopy(model)
    graph = _Graph(small, input_shape)
    named = [*small.named_parameters(), *small.named_buffers()]
    full = {name: tensor.detach().clone() for name, tensor in named}
    # On the CPU, where many small questions are cheaper than on a GPU.
    alive = {
        name: alive[name].cpu().clone() if name in alive else torch.ones(parameter.shape, dtype=torch.bool)
        for name, parameter in small.named_parameters()
    }
    groups = list(_channels(graph))
    _settle(groups, alive)
    # Whatever cuts the tensors also cuts their indices, which tells what it did.
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


def _settle(groups: list[_Channels], alive: Mask) -> None:
    """Marks the channels that play no part, and in `alive` that nothing of them is left, until no more are found."""
    changed = True
    while changed:
        changed = False
        for group in reversed(groups):
            new = group.idle(alive) & ~group.gone
            if new.any():
                changed = True
                group.gone |= new
                for name, rows in group.rows:
                    alive[name][rows[new].flatten()] = False
                for name, columns in group.columns:
                    alive[name][:, columns[new].flatten()] = False


@dataclass(frozen=True)
class Slice:
    """What is left of a parameter or buffer without idle channels: not all of its rows, or columns, or both."""

    rows: Tensor | None = None  # entries of the first dimension that are left, int64, ascending; None = all
    columns: Tensor | None = None  # of the second

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is left."""
        return tensor[self._index()]

    def put_(self, tensor: Tensor, part: Tensor) -> None:
        """Writes such a part into a tensor, whose other entries stay as they are."""
        tensor[self._index()] = part

    def clear_(self, tensor: Tensor, before: "Slice") -> None:
        """Sets to zero what an earlier slice held of a tensor and this one does not."""
        for dimension, (then, now) in enumerate(((before.rows, self.rows), (before.columns, self.columns))):
            if now is not None:
                gone = torch.ones(tensor.shape[dimension], dtype=torch.bool, device=tensor.device)
                gone[now] = False
                if then is not None:
                    gone &= torch.zeros_like(gone).index_fill_(0, then, True)
                tensor.index_fill_(dimension, gone.nonzero().squeeze(1), 0)

    def shape(self, of: torch.Size) -> tuple[int, ...]:
        """The shape of the part of a tensor of some shape."""
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
    """The channels of a network, traced once, to ask many times which of them play a part.

    Raises:
        ConfigError: they cannot be traced.
    """

    def __init__(self, model: nn.Module, input_shape: Shape) -> None:
        self._groups = [group for group in _channels(_Graph(model, input_shape)) if not group.shifted]
        self._shapes = {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._parameters = [name for name, _ in model.named_parameters()]
        self._buffers = [name for name, _ in model.named_buffers()]

    def left(self, mask: Mask) -> dict[str, Slice]:
        """What is left of parameters and buffers without idle channels, as in `compact`; all, where one is missing.

        Args:
            mask: of the prunable weights; all other parameters are taken as they are, zero or not.
        """
        for group in self._groups:
            group.gone.zero_()
        alive = {name: torch.ones(self._shapes[name][:1], dtype=torch.bool) for name in self._parameters}
        alive |= {name: masks.connected(kept).cpu().clone() for name, kept in mask.items()}
        _settle(self._groups, alive)
        stays: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})  # of rows and of columns
        for group in self._groups:
            group.gone[group.gone.nonzero().squeeze(1)[: int(group.gone.all())]] = False  # one channel, if all could go
            if not group.gone.any():
                continue
            for dimension, entries in enumerate((group.rows, group.columns)):
                for name, at in entries:
                    size = self._shapes[name][dimension]
                    part = stays[dimension].setdefault(name, torch.ones(size, dtype=torch.bool))
                    part[at[group.gone].flatten()] = False
        for name in self._buffers:  # running statistics go with the norm's scale
            scale = f"{name.rpartition('.')[0]}.weight"
            if scale in stays[0] and self._shapes[name] == self._shapes[scale]:
                stays[0][name] = stays[0][scale]
        device = next(iter(mask.values())).device
        rows, columns = (
            {name: part.nonzero().squeeze(1).to(device) for name, part in parts.items()} for parts in stays
        )
        return {name: Slice(rows.get(name), columns.get(name)) for name in rows | columns}


def _channels(graph: _Graph) -> Iterator[_Channels]:
    """Every set of channels that could be cut down, in the order of the layers that write them first."""
    seen: set[nn.Module] = set()
    for module in list(graph.names):
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or _depthwise(module) or module in seen:
            continue
        if module not in graph.graph.module2node:  # within attention, or not used
            continue
        group = graph.group(module)
        writers, readers = _writers_and_readers(group)
        seen.update(writers)
        grouped = any(isinstance(w, nn.Conv2d) and w.groups > 1 for w in [*writers, *(r for r, _ in readers)])
        if not readers or grouped or _norms_over_channels(group):
            continue
        number = graph.graph.get_out_channels(module)
        if any(len(indices) % number for _, indices in group):  # shared out among layers, as queries, keys and values
            continue
        channels = _Channels(module, [], [], torch.zeros(number, dtype=torch.bool))
        for dependency, indices in group:
            layer = dependency.target.module
            if layer not in graph.names:
                continue
            channels.shifted |= isinstance(layer, _BatchNorm) and not layer.affine
            at = graph.by_channel(module, indices)  # behind a flattened map a channel has several entries
            if dependency.handler.__name__ == "prune_in_channels":
                channels.columns.append((f"{graph.names[layer]}.weight", at))
            else:
                channels.rows += [
                    (f"{graph.names[layer]}.{key}", at) for key, _ in layer.named_parameters(recurse=False)
                ]
        yield channels


@dataclass(frozen=True)
class Step:
    """One operation of a network, as a walk along its channels sees it."""

    weight: str | None  # of a convolution or linear layer; None where a channel passes through as it is
    groups: int
    inputs: list[int]  # the steps that it reads, by index
    outputs: list[int]


def steps(model: nn.Module, input_shape: Shape) -> list[Step]:
    """The operations on the way from the image to the outputs, inputs before what reads them.

    Raises:
        ConfigError: the channels cannot be traced, or are split or concatenated.
    """
    graph = _Graph(model, input_shape)
    nodes = [node for module, node in graph.graph.module2node.items()]
    for node in nodes:
        if type(node.module).__name__ in ("_ConcatOp", "_SplitOp", "_UnbindOp"):
            raise ConfigError(f"{type(model).__name__} splits or concatenates channels, which a walk cannot follow yet")
    mixing = {node: graph.names.get(node.module) for node in nodes if isinstance(node.module, (nn.Conv2d, nn.Linear))}
    # What is fed by no layer is not on the way: the transposes of weights, for one.
    fed = {node for node in nodes if node in mixing}
    order: list[Any] = []
    waiting = [node for node in nodes if node in mixing and not any(_comes_from(n, fed) for n in node.inputs)]
    reached = set(waiting)
    while waiting:
        node = waiting.pop()
        for after in node.outputs:
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    while tail := {node for node in reached - set(mixing) if not any(after in reached for after in node.outputs)}:
        reached -= tail  # a walk ends with the last layer
    while len(order) < len(reached):
        ready = [
            n for n in nodes if n in reached and n not in order and all(i in order for i in n.inputs if i in reached)
        ]
        if not ready:
            raise ConfigError(f"{type(model).__name__} has a loop, which a walk cannot follow")
        order += ready
    index = {node: number for number, node in enumerate(order)}
    return [
        Step(
            f"{mixing[node]}.weight" if node in mixing else None,
            node.module.groups if isinstance(node.module, nn.Conv2d) else 1,
            [index[other] for other in node.inputs if other in index],
            [index[other] for other in node.outputs if other in index],
        )
        for node in order
    ]


def _comes_from(node: Any, layers: set[Any]) -> bool:
    """Whether a node is one of the layers or is fed by one."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node in layers:
            return True
        seen.add(node)
        waiting += [other for other in node.inputs if other not in seen]
    return False
