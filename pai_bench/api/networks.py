"""Models as users hand them over: wrapped, of any architecture, with masks that may be of another model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from pai_bench.core import Mask, Pruner
from pai_bench.errors import ConfigError
from pai_bench.masks import masks


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what torch.compile and data parallelism put around it. Names in masks are its own."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_model(model: object) -> nn.Module:
    """The unwrapped model.

    Raises:
        ConfigError: it is no module, its parameters have no shapes yet, or no weight in it can be pruned.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {type(model).__name__} is no torch.nn.Module; give a model")
    network = unwrapped(model)
    name = type(network).__name__
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise ConfigError(f"model: {name} has lazy layers without shapes; pass one batch through it first")
    if not masks.prunable(network):
        raise ConfigError(
            f"model: {name} has no weight that can be pruned; convolutions, linear layers and nn.MultiheadAttention "
            "have some (remove torch.nn.utils.prune and parametrizations first)"
        )
    return network


def copied(network: nn.Module) -> nn.Module:
    """A copy to score and prune, so that the model itself keeps its modes, buffers, gradients and memory.

    Raises:
        ConfigError: it cannot be copied.
    """
    try:
        return copy.deepcopy(network)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"model: {type(network).__name__} cannot be copied by copy.deepcopy ({type(error).__name__}: {reason}); "
            "remove weight_norm and tensors that are kept as plain attributes"
        ) from error


def checked_shape(given: object) -> tuple[int, ...]:
    """The shape of one input, as a user gives it.

    Raises:
        ConfigError: it is no shape.
    """
    sizes = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if not sizes or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
        raise ConfigError(f"input_shape={given!r}: give the shape of one image without its batch, such as (3, 32, 32)")
    return tuple(map(int, sizes))


def check_build(network: nn.Module, pruner: Pruner, build: Callable[[], nn.Module] | None) -> None:
    """Refuses a function that makes no such network, or that is missing or plays no part.

    Raises:
        ConfigError: the pruner draws weights and there is no function, or it draws none, or another network is made.
    """
    if build is None:
        if pruner.redraws:
            raise ConfigError(
                f"pruner={pruner.name}: it draws new weights as those of the model were drawn; give build=, a function "
                "that makes such a model"
            )
        return
    if not pruner.redraws:
        raise ConfigError(f"build: pruner={pruner.name} draws no weights; leave it out")
    made = build()
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    if not isinstance(made, nn.Module) or {name: p.shape for name, p in made.named_parameters()} != shapes:
        raise ConfigError(
            f"build: it makes no {type(network).__name__} with the parameters of model; give a function that does, "
            "without wrappers"
        )


def check_mask(network: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Refuses a mask that is not of this network.

    Raises:
        ConfigError: it names no parameter of the network, or a tensor is not bool or of another shape.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    if not isinstance(mask, Mapping) or not mask:
        raise ConfigError("mask: give a dictionary of parameter names and bool tensors, as prune returns it")
    for name, kept in mask.items():
        if name not in parameters:
            raise ConfigError(
                f"mask: {type(network).__name__} has no parameter {name!r}; give the mask of this model, with its names"
            )
        if not isinstance(kept, Tensor) or str(kept.dtype) != "torch.bool":
            raise ConfigError(f"mask: {name} is {getattr(kept, 'dtype', type(kept).__name__)}; give bool, True = kept")
        if kept.shape != parameters[name].shape:
            raise ConfigError(
                f"mask: {name} has shape {tuple(kept.shape)} and the parameter {tuple(parameters[name].shape)}; give "
                "the mask of this model"
            )


def completed(network: nn.Module, mask: Mask, prunable: masks.Which = "all") -> Mask:
    """A mask of every prunable weight, on its device. A weight that the mask does not name is kept.

    Args:
        prunable: which layers the mask is of, as in masks.prunable.
    """
    whole = masks.full(network, prunable)
    first = {parameter: name for name, parameter in network.named_parameters()}  # of the names of a shared weight
    every = dict(network.named_parameters(remove_duplicate=False))
    mask = {first[every[name]]: kept for name, kept in mask.items()}
    return {name: mask[name].to(kept.device) if name in mask else kept for name, kept in whole.items()}
