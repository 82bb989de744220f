"""The gates of a network of ReLUs: which units pass their input on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pai_bench.errors import UserError

_RELU = {F.relu, torch.relu, Tensor.relu}
_RELU_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}
# What is neither linear, nor a norm or a pool, nor a ReLU.
_OTHERS = {
    F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.prelu, F.rrelu, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.relu6, F.softplus, F.softmax, F.tanh, F.sigmoid, F.scaled_dot_product_attention,
    F.multi_head_attention_forward, torch.sigmoid, torch.tanh, torch.softmax, torch.prelu, Tensor.sigmoid,
    Tensor.tanh, Tensor.softmax, Tensor.prelu, F.threshold, F.softsign, F.logsigmoid, F.softshrink, F.hardshrink,
    F.tanhshrink, F.glu, F.log_softmax, F.softmin, torch.threshold, torch.clamp, torch.clamp_min, torch.clamp_max,
    torch.clip, torch.maximum, torch.minimum, torch.exp, torch.log_softmax, torch.selu, torch.celu, Tensor.clamp,
    Tensor.clamp_min, Tensor.clamp_max, Tensor.clip, Tensor.maximum, Tensor.minimum, Tensor.exp, Tensor.log_softmax,
    Tensor.sigmoid_, Tensor.tanh_, Tensor.clamp_, Tensor.clamp_min_, Tensor.clamp_max_, Tensor.clip_, Tensor.exp_,
    F.elu_, F.selu_, F.celu_, F.leaky_relu_, F.rrelu_, F.hardtanh_, torch.threshold_, torch.selu_,
    torch.celu_, torch.rrelu, torch.rrelu_, torch.sigmoid_, torch.tanh_, torch.clamp_, torch.clamp_min_,
    torch.clamp_max_, torch.clip_, torch.exp_,
}  # fmt: skip


class _EachRelu(TorchFunctionMode):
    """Puts a function in the place of every ReLU."""

    def __init__(self, of_score: str, instead: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of_score, self.instead = of_score, instead

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _RELU or function in _RELU_IN_PLACE:
            given = args[0] if args else kwargs["input"]
            result = self.instead(given)
            in_place = function in _RELU_IN_PLACE or kwargs.get("inplace") or args[1:2] == (True,)
            return given.copy_(result) if in_place and result is not given else result
        if function in _OTHERS:
            name = getattr(function, "__name__", "another function")
            raise UserError(
                f"{self.of_score} is defined for networks of ReLUs, whose gates are open or shut, and this one applies "
                f"{name}; choose another pruner, such as synflow, or another model"
            )
        return function(*args, **kwargs)


@contextmanager
def recorded(of_score: str, gates: list[Tensor]) -> Iterator[None]:
    """Runs a block, and appends the gates of every ReLU that it calls: bools in the shape of its input, True = open.

    Args:
        of_score: what an error calls the score.

    Raises:
        UserError: an activation is no ReLU.
    """

    def record(given: Tensor) -> Tensor:
        gates.append(given > 0)
        return given * gates[-1]

    with _EachRelu(of_score, record):
        yield


@contextmanager
def replayed(of_score: str, gates: list[Tensor]) -> Iterator[None]:
    """Runs a block in which every ReLU multiplies by the gates that were recorded, in their order."""
    rest = iter(gates)
    with _EachRelu(of_score, lambda given: given * next(rest)):
        yield


@contextmanager
def opened(of_score: str) -> Iterator[None]:
    """Runs a block in which every ReLU passes its input on as it is."""
    with _EachRelu(of_score, lambda given: given):
        yield
