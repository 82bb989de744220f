"""Stochastic gradient descent that leaves pruned weights alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pai_bench.core import Mask, Weights


class SGD:
    """SGD with momentum and weight decay: torch.optim.SGD(foreach=True) bit for bit, under a mask.

    A subclass of torch.optim.Optimizer would import torch._dynamo, which takes as long as torch itself; what
    torch.amp.GradScaler asks of an optimizer is here.

    Args:
        groups: parameters by name, and the weight decay that holds for them; a parameter belongs to one group.
        lr: the learning rate of the next step; to be set anew at any time.
        momentum: in [0, 1); 0 keeps no buffers.
        nesterov: look ahead along the momentum.
        capturable: keep the learning rate in a tensor on the device, where a captured step finds its value.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Mapping[str, nn.Parameter], float]],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        capturable: bool = False,
    ) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        self._groups = groups
        self._parameters = {name: parameter for parameters, _ in groups for name, parameter in parameters.items()}
        # By parameter, zero before the first step. They and the factors change in place, as a captured step needs it.
        self.buffers: Weights = (
            {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()} if momentum else {}
        )
        self._factors: Weights = {}  # 0 where a weight is pruned and 1 elsewhere
        device = next(iter(self._parameters.values())).device
        self.rate = torch.tensor(lr, device=device) if capturable else None
        self.lr = lr

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr
        if self.rate is not None:
            self.rate.fill_(lr)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Where torch.amp.GradScaler finds the gradients that it unscales."""
        return [{"params": list(self._parameters.values())}]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that a step reads or writes, gradients excepted."""
        kept = [*self._parameters.values(), *self.buffers.values(), *self._factors.values()]
        return kept if self.rate is None else [*kept, self.rate]

    @torch.no_grad()
    def hold(self, mask: Mask) -> None:
        """Sets pruned weights and their momentum to zero, and lets no step move them until another mask is given.

        Kept weights move as if the mask were part of the forward pass.
        """
        pruned = {name: kept for name, kept in mask.items() if not kept.all()}
        if self._factors.keys() != pruned.keys():
            # The weight's type and memory format, or the fused multiplication falls back to one call for each tensor.
            self._factors = {name: torch.empty_like(self._parameters[name], requires_grad=False) for name in pruned}
        for name, kept in pruned.items():
            factor = self._factors[name].copy_(kept)
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
                buffers = [self.buffers[name] for name in gradients]
                torch._foreach_mul_(buffers, self.momentum)
                torch._foreach_add_(buffers, changes)
                if self.nesterov:
                    torch._foreach_add_(changes, buffers, alpha=self.momentum)
                else:
                    changes = buffers
            self._move(moved, changes)

    def _move(self, parameters: list[Tensor], changes: list[Tensor]) -> None:
        if self.rate is None:
            torch._foreach_add_(parameters, changes, alpha=-self.lr)
        else:
            torch._foreach_add_(parameters, list(torch._foreach_mul(changes, -self.rate)))

    def _gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: gradient for name in names if (gradient := self._parameters[name].grad) is not None}

    @torch.no_grad()
    def set_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Takes over momentum, by parameter; where it names none the momentum is zero."""
        for name, buffer in self.buffers.items():
            if name in momentum:
                buffer.copy_(momentum[name])
            else:
                buffer.zero_()
