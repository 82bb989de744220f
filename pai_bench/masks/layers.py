"""How the weights of layers connect channels: in groups, and in transposed convolutions from inputs to outputs."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pai_bench.core import Allocate, Mask, Scores, Selection
from pai_bench.masks import flow


def groups(model: nn.Module, name: str) -> int:
    """The groups of the layer with this weight: each connects outputs of its own with inputs of its own."""
    return int(getattr(_layer(model, name), "groups", 1))


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether this weight is of a transposed convolution, and so (inputs, outputs of a group, ...)."""
    layer = _layer(model, name)
    return isinstance(layer, _ConvNd) and layer.transposed


def turned(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, masks or scores such that all are (outputs, inputs of a group, ...); and turned again, as they were.

    Those of transposed convolutions alone change. Tensors of filters, with one dimension, stay.
    """
    return {
        name: tensor.reshape(groups(model, name), -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 1).contiguous()
        if tensor.ndim > 2 and is_transposed(model, name)
        else tensor
        for name, tensor in tensors.items()
    }


def allocated(model: nn.Module, allocation: Callable[..., Selection], *, repair: bool) -> Allocate:
    """An allocation for a model, to which all weights are (outputs, inputs of a group, ...).

    Args:
        repair: whether the flow of its masks is repaired.
    """

    def allocate(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        scores, candidates = turned(model, scores), turned(model, candidates)
        selection = allocation(scores, candidates, keep, generator)
        if repair:
            of_names = {name: groups(model, name) for name in candidates}
            selection = flow.repaired(selection, scores, candidates, of_names)
        scale = None if selection.scale is None else turned(model, selection.scale)
        return replace(selection, mask=turned(model, selection.mask), scale=scale)

    return allocate


def _layer(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
