"""Stochastic gradient descent that leaves pruned weights alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pai_bench.core import Mask


class SGD:
    """SGD with momentum and weight decay: torch.optim.SGD(foreach=True) bit for bit, under a mask.

    A subclass of torch.optim.Optimizer would import torch._dynamo, which takes as long as torch itself; what
    torch.amp.GradScaler asks of an optimizer is here.

    Args:
        groups: parameters by name, and the weight decay that holds for them; a parameter belongs to one group.
        lr: the learning rate of the next step; to be set anew at any time.
        momentum: in [0, 1); 0 keeps no buffers.
        nesterov: look ahead along the momentum.
    """

    def __init__(
        self, groups: Sequence[tuple[Mapping[str, nn.Parameter], float]], *, lr: float, momentum: float, nesterov: bool
    ) -> None:
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.buffers: dict[str, Tensor] = {}  # momentum, by the name of its parameter, from its first step on
        self._groups = groups
        self._parameters = {name: parameter for parameters, _ in groups for name, parameter in parameters.items()}
        self._factors: dict[str, Tensor] = {}  # 0 where a weight is pruned and 1 elsewhere

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Where torch.amp.GradScaler finds the gradients that it unscales."""
        return [{"params": list(self._parameters.values())}]

    @torch.no_grad()
    def hold(self, mask: Mask) -> None:
        """Sets pruned weights and their momentum to zero, and lets no step move them until another mask is given.

        Kept weights move as if the mask were part of the forward pass.
        """
        # The weight's type and memory format, or the fused multiplication falls back to one call for each tensor.
        self._factors = {
            name: torch.empty_like(self._parameters[name]).copy_(kept) for name, kept in mask.items() if not kept.all()
        }
        for name, factor in self._factors.items():
            self._parameters[name].mul_(factor)
            if name in self.buffers:
                self.buffers[name].mul_(factor)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Moves every parameter that has a gradient. The gradients serve as scratch space."""
        # Here, where GradScaler has looked for gradients that overflowed: inf * 0 is no zero.
        held = self._gradients(self._factors)
        if held:
            torch._foreach_mul_(list(held.values()), [self._factors[name] for name in held])
        for parameters, weight_decay in self._groups:
            gradients = self._gradients(parameters)
            if not gradients:
                continue
            moved: list[Tensor] = [parameters[name] for name in gradients]
            changes = list(gradients.values())
            if weight_decay:
                changes = list(torch._foreach_add(changes, moved, alpha=weight_decay))
            if self.momentum:
                buffers = self._gathered(dict(zip(gradients, changes, strict=True)))
                if self.nesterov:
                    torch._foreach_add_(changes, buffers, alpha=self.momentum)
                else:
                    changes = buffers
            torch._foreach_add_(moved, changes, alpha=-self.lr)

    def _gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: gradient for name in names if (gradient := self._parameters[name].grad) is not None}

    def _gathered(self, changes: dict[str, Tensor]) -> list[Tensor]:
        """The momentum of some parameters, once their changes have joined it."""
        earlier = [name for name in changes if name in self.buffers]
        if earlier:
            buffers = [self.buffers[name] for name in earlier]
            torch._foreach_mul_(buffers, self.momentum)
            torch._foreach_add_(buffers, [changes[name] for name in earlier])
        self.buffers |= {name: change.clone() for name, change in changes.items() if name not in self.buffers}
        return [self.buffers[name] for name in changes]

    def state_dict(self) -> dict[str, Any]:
        """Learning rate and momentum, by parameter name. Tensors are those in use, not copies."""
        return {"lr": self.lr, "momentum": self.buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned, on whatever device it lies."""
        self.lr = state["lr"]
        self.buffers = {name: buffer.to(self._parameters[name].device) for name, buffer in state["momentum"].items()}
