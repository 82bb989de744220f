"""Pruned weights stay at zero in a training loop of the user's own."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pai_bench.api import networks
from pai_bench.core import Mask
from pai_bench.errors import ConfigError


class Attachment:
    """What `attach` returns. `remove` ends it; as a context manager it ends with its block."""

    def __init__(self, optimizer: Optimizer, weights: list[tuple[nn.Parameter, Tensor]]) -> None:
        self._optimizer = optimizer
        self._weights = weights  # each with a bool tensor of what is pruned
        self._hooks: list[Any] = [optimizer.register_step_post_hook(self._after_step)]
        for number, (weight, _) in enumerate(weights):
            if weight.requires_grad:
                self._hooks.append(weight.register_hook(self._masked_gradient(number)))  # type: ignore[no-untyped-call]
        self._clear()
        for number, (weight, _) in enumerate(weights):
            if weight.grad is not None:
                weight.grad = self._masked_gradient(number)(weight.grad)

    def remove(self) -> None:
        """Lets pruned weights move again. They are zero now."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _pruned(self, number: int) -> Tensor:
        """What is pruned of a weight, on its device: a model may move after it was attached."""
        weight, pruned = self._weights[number]
        if pruned.device != weight.device:
            pruned = pruned.to(weight.device)
            self._weights[number] = (weight, pruned)
        return pruned

    def _masked_gradient(self, number: int) -> Callable[[Tensor], Tensor]:
        """Gradients of pruned weights are zero, as if the mask were part of the forward pass.

        Then clipping by the norm, line searches and moments of an optimizer never see them.
        """

        def masked(gradient: Tensor) -> Tensor:
            return gradient.masked_fill(self._pruned(number), 0)

        return masked

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._clear()

    @torch.no_grad()
    def _clear(self) -> None:
        """Sets pruned weights to zero, and what the optimizer keeps for each of them."""
        for number, (weight, _) in enumerate(self._weights):
            pruned = self._pruned(number)
            weight.masked_fill_(pruned, 0)
            for value in self._optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(pruned, 0)


def attach(optimizer: Optimizer, model: nn.Module, mask: Mask) -> Attachment:
    """Keeps pruned weights at zero: sets them to zero now, and after every step of the optimizer.

    Kept weights move as if the forward pass used weight * mask: gradients of pruned weights are zero too, and so is
    what the optimizer keeps for them, such as momentum. It works with any torch optimizer, gradient scaling, gradient
    clipping, and data parallelism. The optimizer's state_dict and the model stay as they are without it, so attach
    again after loading a checkpoint into a new process.

    Args:
        optimizer: holds the weights of the model.
        model: the model, wrapped or not.
        mask: as `prune` returns it. Parameters that it does not name are left alone.

    Returns:
        A handle; its remove() ends it.

    Raises:
        ConfigError: an argument is of another kind, the mask is of another model, or the optimizer holds none of the
            weights that it names.

    Example:
        >>> handle = pai_bench.attach(optimizer, model, mask)
    """
    for name, given, kind in (("optimizer", optimizer, Optimizer), ("model", model, nn.Module)):
        if not isinstance(given, kind):
            wanted = "torch.optim.Optimizer" if kind is Optimizer else "torch.nn.Module"
            raise ConfigError(f"{name}: {type(given).__name__} is no {wanted}; give attach(optimizer, model, mask)")
    network = networks.unwrapped(model)
    networks.check_mask(network, mask)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameters[name]) in held for name in mask):
        raise ConfigError(
            "optimizer: it holds none of the weights that the mask names; give the optimizer of this model "
            "(made after the model was copied or its parameters were replaced)"
        )
    with torch.inference_mode(False):  # else gradients and masks that are made here could not be used outside of it
        weights = [(parameters[name], ~kept.to(parameters[name].device)) for name, kept in mask.items()]
        return Attachment(optimizer, weights)
