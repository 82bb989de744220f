"""The operations of a network in order, for a walk along its channels."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pai_bench.analysis.graph import Graph
from pai_bench.core import Shape
from pai_bench.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """One operation of a network, as a walk along its channels sees it."""

    weight: str | None  # the weight of a convolution or linear layer; None: channels pass through unchanged
    groups: int
    inputs: list[int]  # indices of the steps that it reads
    outputs: list[int]  # indices of the steps that read it


def steps(model: nn.Module, input_shape: Shape) -> list[Step]:
    """The operations on the way from the image to the outputs. An operation comes after those that it reads.

    Identity shortcuts are left out: a sum does not read what reaches it from a fork past no layer, if it reads anything
    else.

    Raises:
        ConfigError: the channels cannot be traced; they are split or concatenated; a map is flattened so that its
            channels do not lie next to each other; the network has a loop.
    """
    graph = Graph(model, input_shape)
    nodes = [node for module, node in graph.graph.module2node.items()]
    for node in nodes:
        if type(node.module).__name__ in ("_ConcatOp", "_SplitOp", "_UnbindOp"):
            raise ConfigError(f"{type(model).__name__} splits or concatenates channels, which a walk cannot follow yet")
    mixing = {node: graph.names.get(node.module) for node in nodes if isinstance(node.module, (nn.Conv2d, nn.Linear))}
    # An operation that no layer feeds is not on the way: the transpose of a weight, for example.
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
    reads = {node: [other for other in node.inputs if other in reached] for node in nodes if node in reached}
    for node in [n for n in reads if str(getattr(n.grad_fn, "name", str)()).startswith("Add")]:
        _skip_identities(node, reads, mixing)
    while len(order) < len(reads):
        ready = [n for n in reads if n not in order and all(other in order for other in reads[n])]
        if not ready:
            raise ConfigError(f"{type(model).__name__} has a loop, which a walk cannot follow")
        order += ready
    for node in order:
        if isinstance(node.module, nn.Linear):
            for writer in _convolutions_before(node, reads, mixing):
                number = graph.graph.get_out_channels(writer)
                if node.module.in_features % number == 0:
                    columns = torch.arange(node.module.in_features).view(number, -1)
                    graph.check_flattening(writer, node.module, columns, input_shape)
    index = {node: number for number, node in enumerate(order)}
    return [
        Step(
            f"{mixing[node]}.weight" if node in mixing else None,
            node.module.groups if isinstance(node.module, nn.Conv2d) else 1,
            [index[other] for other in reads[node]],
            [index[other] for other in node.outputs if node in reads.get(other, [])],
        )
        for node in order
    ]


def _convolutions_before(node: Any, reads: dict[Any, list[Any]], layers: Collection[Any]) -> list[nn.Conv2d]:
    """The convolutions whose channels a node reads, past no other layer."""
    found, waiting = dict[Any, None](), list(reads[node])
    while waiting:
        other = waiting.pop()
        if other not in layers:
            waiting += reads[other]
        elif isinstance(other.module, nn.Conv2d):
            found[other] = None
    return [other.module for other in found]


def _skip_identities(total: Any, reads: dict[Any, list[Any]], layers: Collection[Any]) -> None:
    """Takes the identity shortcuts that end in a sum out of the operations and what each of them reads."""
    for end in list(reads[total]):
        between, node = [], end
        while (num_readers := sum(node in read for read in reads.values())) == 1:
            if node in layers or len(reads[node]) != 1:
                break  # a branch with layers, or what another sum gives
            between.append(node)
            node = reads[node][0]
        if num_readers > 1 and len(reads[total]) > 1:
            reads[total].remove(end)
            for passed in between:
                del reads[passed]


def _comes_from(node: Any, layers: set[Any]) -> bool:
    """Whether a node is one of these layers, or is fed by one of them."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node in layers:
            return True
        seen.add(node)
        waiting += [other for other in node.inputs if other not in seen]
    return False
