"""How weights are drawn. An explicit choice of every model: magnitude pruning at initialization ranks nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pai_bench.errors import ConfigError

_DRAW: dict[str, Callable[[Tensor], object]] = {
    "kaiming_normal_fan_in": lambda w: nn.init.kaiming_normal_(w, mode="fan_in", nonlinearity="relu"),
    "kaiming_normal_fan_out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "xavier_normal": nn.init.xavier_normal_,
    "normal_0.01": lambda w: nn.init.normal_(w, std=0.01),
}
_NORM: dict[str, Callable[[Tensor], object]] = {"ones": nn.init.ones_, "uniform": nn.init.uniform_}


@torch.no_grad()
def initialize_(model: nn.Module, init: dict[str, str]) -> nn.Module:
    """Draws the weights of a model anew, in place, from torch's global generator.

    Args:
        init: the scheme for `conv`, `linear` and `norm` layers. "framework" leaves a layer as torch made it: weights
            and bias uniform in +-1/sqrt(fan_in). Under every other scheme the bias becomes zero.

    Raises:
        ConfigError: there is no such scheme.
    """
    for kind, choices in (("conv", _DRAW), ("linear", _DRAW), ("norm", _NORM)):
        allowed = [*choices, "framework"] if kind != "norm" else [*choices]
        if init.get(kind) not in allowed:
            raise ConfigError(f"model.init.{kind}={init.get(kind)}: give one of {', '.join(allowed)}")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            _NORM[init["norm"]](module.weight)
            module.bias.zero_()
        elif isinstance(module, (_ConvNd, nn.Linear)):
            scheme = init["linear" if isinstance(module, nn.Linear) else "conv"]
            if scheme != "framework":
                _DRAW[scheme](module.weight)
                if module.bias is not None:
                    module.bias.zero_()
    return model
