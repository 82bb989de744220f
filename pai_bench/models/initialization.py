"""How weights are drawn. Every model states it: magnitude pruning at initialization ranks nothing but these weights."""

from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Scheme = Literal[
    "kaiming_normal_fan_in", "kaiming_normal_fan_out", "xavier_normal", "lecun_normal", "normal_0.01", "framework"
]


class Init(TypedDict):
    """The scheme for each kind of layer."""

    conv: Scheme
    linear: Scheme
    norm: Literal["ones", "uniform"]


_TRUNCATED = 0.87962566103423978  # the deviation of a standard normal distribution that is cut off at -2 and 2


def _lecun_normal_(weight: Tensor) -> Tensor:
    """Variance 1 / fan_in, cut off at two deviations: the default of TensorFlow's variance scaling."""
    std = weight[0].numel() ** -0.5 / _TRUNCATED
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


_DRAW: dict[str, Callable[[Tensor], object]] = {
    "kaiming_normal_fan_in": lambda w: nn.init.kaiming_normal_(w, mode="fan_in", nonlinearity="relu"),
    "kaiming_normal_fan_out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "xavier_normal": nn.init.xavier_normal_,
    "lecun_normal": _lecun_normal_,
    "normal_0.01": lambda w: nn.init.normal_(w, std=0.01),
}
_NORM: dict[str, Callable[[Tensor], object]] = {"ones": nn.init.ones_, "uniform": nn.init.uniform_}


@torch.no_grad()
def initialize_(model: nn.Module, init: Init) -> nn.Module:
    """Draws the weights of a model anew, in place, from torch's global generator.

    Args:
        init: the scheme for `conv`, `linear` and `norm` layers. "framework" leaves a layer unchanged: torch draws
            weights and biases uniformly in +-1/sqrt(fan_in). With every other scheme the bias becomes zero.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            _NORM[init["norm"]](module.weight)
            module.bias.zero_()
        elif isinstance(module, (_ConvNd, nn.Linear)):
            scheme = init["linear" if isinstance(module, nn.Linear) else "conv"]
            if scheme != "framework":
                _DRAW[scheme](module.weight)
                if scheme == "kaiming_normal_fan_out" and isinstance(module, _ConvNd) and module.groups > 1:
                    module.weight.mul_(module.groups**0.5)  # torch counts the outputs of all groups
                if module.bias is not None:
                    module.bias.zero_()
    return model
