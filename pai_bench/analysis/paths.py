"""Which weights lie on a path from the image to the outputs."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pai_bench.analysis.mode import mode
from pai_bench.core import Mask, Shape
from pai_bench.masks.layers import turned

log = logging.getLogger(__name__)

# Functions of torch that normalise.
NORMS = frozenset(
    {"batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "normalize", "rms_norm"}
)


def effective(model: nn.Module, mask: Mask, input_shape: Shape) -> Mask | None:
    """The kept weights on a path of kept weights from a pixel to an output. None: the network cannot be followed.

    Residual connections are paths too. Biases and learned positions start no path. The result is exact for networks of
    convolutions and linear layers of any depth. Where values would decide, every path passes: in normalisation, in
    scales of layers, in gates and in attention. If a unit is on no path of the dense network, its kept weights count.

    Reference: Vysogorets and Kempe 2023, arXiv:2107.02306, for effective sparsity.
    Deviates: only reachability decides, so no path is lost to rounding.
    """
    of_masks = Effective(model, {name: torch.ones_like(kept) for name, kept in mask.items()}, input_shape)
    if of_masks.unknown is not None:
        log.warning("effective sparsity is left out: what %s does to paths is not known", of_masks.unknown)
        return None
    return of_masks(mask)


class Effective:
    """`effective` for many masks of one network.

    Args:
        full: the mask that keeps every prunable weight.
    """

    def __init__(self, model: nn.Module, full: Mask, input_shape: Shape) -> None:
        self._model, self._input_shape = model, input_shape
        self.unknown: str | None = None  # an operation for which there is no rule; then no mask can be followed
        try:
            dense = turned(model, _reached(model, full, input_shape))
            self._dead = {name: ~reached.flatten(1).any(1) for name, reached in dense.items()}
        except _UnknownError as error:
            self.unknown = str(error)

    def __call__(self, mask: Mask) -> Mask:
        """The kept weights on a path of kept weights."""
        found = turned(self._model, _reached(self._model, mask, self._input_shape))
        for name, reached in found.items():
            reached[self._dead[name]] = True
        return {name: mask[name] & reached for name, reached in turned(self._model, found).items()}


def dead_units(model: nn.Module, reached: Mask) -> dict[str, int]:
    """The number of output units (filters, neurons) of each layer that lie on no path.

    Args:
        reached: the weights on a path, as `effective` returns them.
    """
    return {name: int((~tensor.flatten(1).any(1)).sum()) for name, tensor in turned(model, reached).items()}


class _UnknownError(Exception):
    """There is no rule for an operation."""


class _Presence(torch.autograd.Function):
    """1 where there is a signal and 0 elsewhere, forward and backward, so sums of paths neither overflow nor vanish."""

    @staticmethod
    def forward(_: Any, signal: Tensor) -> Tensor:
        return (signal > 0).to(signal.dtype)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return (gradient > 0).to(gradient.dtype)


def _present(signal: Tensor) -> Tensor:
    marked: Tensor = _Presence.apply(signal)  # type: ignore[no-untyped-call]
    return marked


def _reached(model: nn.Module, mask: Mask, input_shape: Shape) -> Mask:
    """The weights on a path: those with a gradient, in the network with its mask as weights and rules as operations."""
    parameters = dict(model.named_parameters())
    like = next(iter(parameters.values()))
    weights = {name: kept.to(like.dtype).requires_grad_() for name, kept in mask.items()}
    others = {name: torch.ones_like(p, requires_grad=False) for name, p in parameters.items() if name not in mask}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    image = like.detach().new_ones((1, *input_shape)).requires_grad_()  # a tensor that needs a gradient is a signal
    with mode(model, training=False), torch.enable_grad():
        with _Paths():
            outputs = torch.func.functional_call(model, weights | others | buffers, (image,))
        gradients = torch.autograd.grad(outputs.sum(), list(weights.values()), materialize_grads=True)
    return {name: gradient > 0 for name, gradient in zip(weights, gradients, strict=True)}


class _Paths(TorchFunctionMode):
    """Replaces operations on signals by rules that pass paths on.

    A signal is a tensor that needs a gradient. It is never negative. A tensor that depends neither on a weight nor on
    the image is a constant.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if not any(map(_is_signal, _tensors((args, tuple(kwargs.values()))))):
            return function(*args, **kwargs)
        bare = name.strip("_")
        if name.startswith("__i"):  # x += y is x = x + y
            bare = bare.removeprefix("i")
        if bare in _RULES:
            return _RULES[bare](*args, **kwargs)
        if bare in _LINEAR or bare.startswith("conv"):
            if bare == "linear" or bare.startswith("conv"):
                args, kwargs = _without_bias(args, kwargs)
            result = function(*map(_not_negative, args), **{key: _not_negative(v) for key, v in kwargs.items()})
            return _present(result)
        result = function(*args, **kwargs)
        if bare not in _MOVES and any(map(_is_signal, _tensors(result))):
            raise _UnknownError(name or str(function))
        return result


def _is_signal(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (list, tuple)) else []


def _without_bias(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a convolution or linear layer without its bias, which starts no path."""
    return (*args[:2], *(None for _ in args[2:3]), *args[3:]), {k: v for k, v in kwargs.items() if k != "bias"}


def _not_negative(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_not_negative, value))
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shaped(signal: Tensor, other: Any) -> Tensor:
    shape = torch.broadcast_shapes(signal.shape, getattr(other, "shape", ()))  # type: ignore[no-untyped-call]
    return signal.expand(shape)


# Rules ----------------------------------------------------------------------------------------------------------------


def _same(signal: Tensor, *_: Any, **__: Any) -> Tensor:
    """Functions that are zero at zero, and norms."""
    return signal


def _open(signal: Tensor, *_: Any, **__: Any) -> Tensor:
    """Functions that are not zero at zero: a gate without a signal lets other signals through."""
    return 1 + signal


def _add(one: Any, other: Any, **_: Any) -> Tensor:
    if _is_signal(one) and _is_signal(other):
        return one + other  # type: ignore[no-any-return]
    return _shaped(one, other) if _is_signal(one) else _shaped(other, one)


def _subtract(one: Any, other: Any, **_: Any) -> Tensor:
    return _add(one, other) if _is_signal(one) else _shaped(1 + other, one)


def _multiply(one: Any, other: Any, **_: Any) -> Tensor:
    if _is_signal(one) and _is_signal(other):
        return one * other  # type: ignore[no-any-return]
    return _add(one, other)


def _divide(one: Any, other: Any, **_: Any) -> Tensor:
    return _multiply(one, 1 + other) if _is_signal(other) else _add(one, other)


def _add_product(base: Tensor, one: Tensor, other: Tensor, **_: Any) -> Tensor:
    product = _multiply(one, other) if _is_signal(one) or _is_signal(other) else one
    return _add(base, product)


def _add_matrix_product(base: Tensor, one: Tensor, other: Tensor, **_: Any) -> Tensor:
    product = _present(one.abs() @ other.abs())
    return base + product if _is_signal(base) else product


def _choose(_: Tensor, one: Any, other: Any) -> Tensor:
    return _add(one, other)


def _join(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Constants, such as the embedding of a class, start no path."""

    def joined(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        return function([t if _is_signal(t) else torch.zeros_like(t) for t in tensors], *args, **kwargs)

    return joined


def _summary(signal: Tensor, *args: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    """Extremes, norms and deviations over dimensions: they depend on every entry."""
    for value in args:
        if isinstance(value, bool):
            keepdim = value
        elif isinstance(value, (int, tuple, list)):
            dim = value
    return _present(signal.sum() if dim is None else signal.sum(dim, keepdim=keepdim))


def _norm(signal: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _summary(signal, dim=dim, keepdim=keepdim)


def _extreme(signal: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):
        return _add(signal, args[0])
    found = _summary(signal, *args, **kwargs)
    if not args and not kwargs:
        return found
    return torch.return_types.max((found, torch.zeros_like(found, dtype=torch.int64)))  # values and indices


def _average(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An average in place of a maximum, whose gradient would follow only one of several equal entries."""

    def averaged(
        signal: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if {1} != set(dilation if isinstance(dilation, tuple | list) else (dilation,)):
            raise _UnknownError("max pooling with dilation")
        return _present(function(signal, kernel_size, stride or kernel_size, padding, ceil_mode))

    return averaged


def _adaptive_average(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda signal, output_size, *_, **__: _present(function(signal, output_size))


def _gated_half(signal: Tensor, dim: int = -1) -> Tensor:
    one, gate = signal.chunk(2, dim)
    return one * (1 + gate)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
    """Every query sees every value. The weights of attention are paths too."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    return _present((1 + _present(query.abs() @ key.abs().transpose(-2, -1))) @ value.abs())


def _multi_head_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    num_heads, packed, output = args[1], args[2], args[8]
    if kwargs.get("use_separate_proj_weight"):
        weights = [kwargs[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = packed.chunk(3)
    split = [  # (tokens, batch, width) -> (batch, heads, tokens, width of a head)
        _present(F.linear(tensor.abs(), weight)).view(*tensor.shape[:2], num_heads, -1)
        for tensor, weight in zip((query, key, value), weights, strict=True)
    ]
    merged = _attention(*(tensor.movedim(0, -2) for tensor in split)).movedim(-2, 0).flatten(-2)
    return _present(F.linear(merged, output)), None


def _recurrent(signal: Tensor, _: Any, weights: Any, *settings: Any) -> Any:
    """An LSTM mixes all features of all steps."""
    both, batch_first = settings[4], settings[5]
    width = weights[1].shape[1] * (1 + both)
    mixed = signal.sum((1 if batch_first else 0, 2), keepdim=True)
    return _present(mixed).expand(*signal.shape[:2], width), None, None


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _rules(rule: Callable[..., Any], names: str) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(_names(names), rule)


_RULES: dict[str, Callable[..., Any]] = (
    _rules(
        _same,
        "relu relu6 gelu silu hardswish hardtanh tanh elu celu selu leaky_relu mish prelu softsign tanhshrink "
        "hardshrink softshrink threshold rrelu dropout dropout1d dropout2d dropout3d alpha_dropout "
        "feature_alpha_dropout abs neg sqrt square pow clamp clip clamp_min clamp_max detach nan_to_num masked_fill "
        "sin sign erf log1p expm1 asinh round floor",
    )
    | dict.fromkeys(NORMS, _same)
    | _rules(
        _open, "sigmoid hardsigmoid softmax softmin log_softmax exp cos softplus logsigmoid reciprocal rsqrt log rpow"
    )
    | _rules(_add, "add radd maximum minimum logaddexp")
    | _rules(_subtract, "sub subtract")
    | _rules(lambda one, other, **_: _subtract(other, one), "rsub")
    | _rules(_multiply, "mul multiply rmul")
    | _rules(_divide, "div divide truediv true_divide")
    | _rules(lambda one, other, **_: _divide(other, one), "rdiv rtruediv")
    | _rules(_add_product, "addcmul addcdiv")
    | _rules(_add_matrix_product, "addmm baddbmm addbmm")
    | _rules(_choose, "where lerp")
    | _rules(_join(torch.cat), "cat concat concatenate")
    | _rules(_join(torch.stack), "stack")
    | _rules(_summary, "amax amin std var logsumexp")
    | _rules(_extreme, "max min")
    | _rules(_norm, "norm vector_norm linalg_vector_norm")
    | _rules(_average(F.avg_pool1d), "max_pool1d")
    | _rules(_average(F.avg_pool2d), "max_pool2d")
    | _rules(_adaptive_average(F.adaptive_avg_pool1d), "adaptive_max_pool1d")
    | _rules(_adaptive_average(F.adaptive_avg_pool2d), "adaptive_max_pool2d")
    | _rules(_gated_half, "glu")
    | _rules(_attention, "scaled_dot_product_attention")
    | _rules(_multi_head_attention, "multi_head_attention_forward")
    | _rules(_recurrent, "lstm")
)

# Sums of products, convolutions aside.
_LINEAR = _names(
    "linear matmul rmatmul mm bmm einsum tensordot bilinear mean sum avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample grid_sample fold cumsum"
)

# What only moves values.
_MOVES = _names(
    "get view reshape permute transpose t flatten unflatten squeeze unsqueeze expand expand_as repeat contiguous clone "
    "repeat_interleave chunk split split_with_sizes tensor_split unbind select narrow index_select gather getitem "
    "setitem roll flip swapaxes swapdims movedim pad pixel_shuffle pixel_unshuffle unfold to type float half double "
    "bfloat16 type_as view_as reshape_as channel_shuffle tile ravel broadcast_to rot90 copy take_along_dim diagonal "
    "fill requires_grad index_copy index_put slice_scatter zero"
)
