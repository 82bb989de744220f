"""What a network does with its weights, observed while one image passes through it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pai_bench.core import Shape
from pai_bench.errors import ConfigError
from pai_bench.masks import masks

ACTIVATIONS = ""  # in place of a weight, for products of two activations, as in attention


@dataclass(frozen=True)
class Operations:
    """What was observed while one image passed through a network."""

    multiply_adds: dict[str, int]  # by the parameter that is applied, prunable ones first; or ACTIVATIONS
    computed: list[str]  # prunable weights that a layer changes before it applies them, so zeros do not stay zeros
    output_shape: torch.Size


def watch(model: nn.Module, input_shape: Shape) -> Operations:
    """Passes one black image (C, H, W) through a network, in the mode that it is in, and observes the operations.

    Raises:
        ConfigError: the network does not take such images.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    output, watcher = _pass(model, parameters, input_shape)
    computed = []
    if watcher.computed:
        # If a layer only scales its weights, zeros stay zeros. So a second pass has every second weight at zero, and
        # the density of what is applied tells.
        prunable = masks.prunable(model)
        halves = {name: _every_second(parameters[name].detach()) for name in prunable}
        _, watcher_of_halves = _pass(model, parameters | halves, input_shape)
        for names, density in watcher_of_halves.computed:
            ours = [name for name in names if name in prunable]
            if density > max((_density(halves[name]) for name in ours), default=1.0):
                computed += [name for name in ours if name not in computed]
    counts = watcher.multiply_adds
    ordered = {name: counts[name] for name in [*masks.prunable(model), *counts] if name in counts}
    return Operations(ordered, computed, output.shape)


def _pass(model: nn.Module, parameters: dict[str, Tensor], input_shape: Shape) -> tuple[Tensor, "_Watcher"]:
    image = torch.zeros((1, *input_shape)).to(next(model.parameters()))
    watcher = _Watcher(parameters, image)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path hides its products
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), watcher:
            return torch.func.functional_call(model, parameters, (image,)), watcher
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"{type(model).__name__} does not take images of {'x'.join(map(str, input_shape))} "
            f"({type(error).__name__}: {reason}); give images of another size, or another network"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows parameters, tensors computed from parameters alone, and tensors that depend on the image."""

    def __init__(self, parameters: dict[str, Tensor], image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # it imports triton, which takes a fifth of a second

        self.multiply_adds: dict[str, int] = {}
        self.computed: list[tuple[list[str], float]] = []  # the parameters of each applied tensor, and its density
        self._formulas = flop_registry
        self._names = {_key(parameter): name for name, parameter in parameters.items()}
        self._origins: dict[int, list[str]] = {}  # of tensors that are computed from parameters alone
        self._signals = {_key(image)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        inputs = list(_tensors((args, tuple(kwargs.values()))))
        formula = self._formulas.get(function._overloadpacket)
        if formula is not None:
            self._apply(inputs, formula(*args, **kwargs, out_val=result) // 2)
        # The result of a product is no weight, even if both factors are parameters: a learned query and a weight.
        signal = formula is not None or any(_key(tensor) in self._signals for tensor in inputs)
        origin = list(dict.fromkeys(name for tensor in inputs for name in self._origin(tensor)))
        for tensor in _tensors(result):
            key = _key(tensor)
            if key in self._names:
                continue
            self._signals.discard(key)  # the memory may have held another tensor
            self._origins.pop(key, None)
            if signal:
                self._signals.add(key)
            elif origin:
                self._origins[key] = origin
        return result

    def _origin(self, tensor: Tensor) -> list[str]:
        key = _key(tensor)
        return [self._names[key]] if key in self._names else self._origins.get(key, [])

    def _apply(self, inputs: list[Tensor], multiply_adds: int) -> None:
        """Records a product. Its weight is the largest input that is a parameter, or computed from parameters."""
        weights = [tensor for tensor in inputs if tensor.ndim > 1 and self._origin(tensor)]
        name = ACTIVATIONS
        if weights:
            weight = max(weights, key=Tensor.numel)
            names = self._origin(weight)
            name = next((n for n in names if n.endswith("weight")), names[0])
            if _key(weight) not in self._names:
                self.computed.append((names, _density(weight)))
        self.multiply_adds[name] = self.multiply_adds.get(name, 0) + multiply_adds


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


def _every_second(weight: Tensor) -> Tensor:
    flat = weight.flatten().clone()
    flat[1::2] = 0
    return flat.view(weight.shape)


def _density(tensor: Tensor) -> float:
    return int(tensor.count_nonzero()) / tensor.numel()
