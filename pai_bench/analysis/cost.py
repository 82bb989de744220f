"""What a network costs: floating-point operations, and multiply-adds of its layers."""

from typing import Any, Self, cast

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pai_bench.analysis import operations
from pai_bench.analysis.mode import mode
from pai_bench.core import Mask, Shape
from pai_bench.masks import masks
from pai_bench.system import counters


class CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations while it is active. A multiply-add counts two.

    Matrix products, convolutions and attention count, by the formulas of torch.utils.flop_counter.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # it imports triton, which takes a fifth of a second

        self.flops, self._formulas = 0, flop_registry
        self.paused = False  # nothing is counted meanwhile

    def __enter__(self) -> Self:
        counters.active.append(self)
        return cast(Self, super().__enter__())  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        counters.active.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # scores are not compiled, and True would import torch._dynamo, which takes a second

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = None if self.paused else self._formulas.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def multiply_adds(model: nn.Module, input_shape: Shape) -> dict[str, int]:
    """The multiply-adds of the dense network for one image (C, H, W), by the weight that is applied.

    Prunable weights come first. Products of two activations, as in attention, count under operations.ACTIVATIONS.
    Biases and norms do not count.

    Raises:
        ConfigError: the network does not take such images.
    """
    with mode(model, training=False):
        return operations.watch(model, input_shape).multiply_adds


def masked_multiply_adds(counts: dict[str, int], mask: Mask) -> int:
    """The multiply-adds for one image if pruned weights cost nothing: a bound, not a speed.

    Args:
        counts: what `multiply_adds` returned.
    """
    densities = masks.densities(mask)
    return round(sum(count * densities.get(name, 1.0) for name, count in counts.items()))
