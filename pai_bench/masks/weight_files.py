"""Weights from files, of this runner or of others: read, checked, and fitted to a model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pai_bench.errors import ConfigError
from pai_bench.masks.mask_files import Arrays, check_finite, first_names, tensors_in

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pai_bench.core import Weights


def load_(model: "nn.Module", path: str) -> None:
    """Gives a model the parameters in a file, and the buffers if it holds them; NAME_orig is the weight NAME.

    Raises:
        ConfigError: the file cannot be read, or names or shapes are not those of the model.
    """
    import torch

    where = f"weights={path}"
    tensors = _values_in(where, path)
    state = model.state_dict()
    unknown = [name for name in tensors if name not in state]
    absent = [name for name, _ in model.named_parameters() if name not in tensors]
    if unknown or absent:
        wrong = [f"the model has no {first_names(unknown)}"] if unknown else []
        wrong += [f"there is no {first_names(absent)}"] if absent else []
        raise ConfigError(f"{where}: {', and '.join(wrong)}; give a state dict of this model")
    _check_shapes(where, tensors, state)
    check_finite(where, tensors)
    with torch.no_grad():
        for name, array in tensors.items():
            state[name].copy_(torch.from_numpy(np.array(array)))


def read(setting: str, path: str, weights: "Mapping[str, Tensor]") -> "Weights":
    """The values that a file has for some weights of a model, on their device. Its other tensors are ignored.

    Args:
        setting: the setting that names the file, for errors.
        weights: of the model, by parameter name.

    Raises:
        ConfigError: the file cannot be read, a weight is not in it, or a shape is another.
    """
    import torch

    where = f"{setting}={path}"
    tensors = _values_in(where, path)
    absent = [name for name in weights if name not in tensors]
    if absent:
        raise ConfigError(f"{where}: there is no {first_names(absent)}; give a state dict of this model")
    found = {name: tensors[name] for name in weights}
    _check_shapes(where, found, weights)
    check_finite(where, found)
    return {name: torch.from_numpy(np.array(array)).to(weights[name]) for name, array in found.items()}


def _values_in(where: str, path: str) -> Arrays:
    """The tensors of a file without its masks."""
    tensors = tensors_in(where, path).items()
    return {name.removesuffix("_orig"): array for name, array in tensors if not name.endswith("_mask")}


def _check_shapes(where: str, tensors: Arrays, state: "Mapping[str, Tensor]") -> None:
    for name, array in tensors.items():
        if array.shape != state[name].shape:
            raise ConfigError(
                f"{where}: {name} is {array.shape}, in the model {tuple(state[name].shape)}; give one of this model"
            )
